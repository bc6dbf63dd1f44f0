"""What the bundled detection generator is worth on the whole test set: the paper's Tables 1 and 6, its Figures 2 and 4.

    python examples/build_demo/build_demo_models.py detection-scenes --build build   # draws the test set, the bundle carries a part of it
    OMP_NUM_THREADS=1 python benchmarks/detection.py --build build

Writes detection.json (AP of base, own LoRA and generated adapters from text, pictures, both, unseen phrasings, another task's sentence and
gibberish), detection.png (what each gains over the base), task_vectors.png and detections.png beside this file, and
docs/detection_matrix.png (adapter x class).
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path

import peft
import torch
import transformers
from matplotlib import pyplot
from transformers import AutoProcessor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "build_demo"))
from demo_detection import tasks as build_tasks
from demo_scenes import TAUGHT

from peft_icm import AdapterCollection, ICMGenerator, evaluate_detection
from peft_icm.bundled import bundled_folder
from peft_icm.conditioning import HiddenStateEncoder
from peft_icm.demo.run import TABLE_1
from peft_icm.evaluation.detection import cross_detection
from peft_icm.figures import plot_detections, plot_task_vectors, save_figure
from peft_icm.tasks.annotated_images import AnnotatedImage, crops, load_coco
from peft_icm.tasks.average_precision import mean_average_precision
from peft_icm.tasks.detection import detect

HERE = Path(__file__).parent
MATRIX_SCENES = 400
STATES = 24  # pictures of each class for the t-SNE of hidden states


def plot_matrix(matrix: dict[str, dict[str, float]], file: Path) -> None:
    """AP50 by adapter (row) and class (column)."""
    figure, axes = pyplot.subplots(figsize=(7.5, 6.5), layout="constrained")
    axes.imshow([list(row.values()) for row in matrix.values()], vmin=0, vmax=1, cmap="viridis")
    for y, row in enumerate(matrix.values()):
        for x, value in enumerate(row.values()):
            axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color="white" if value < 0.6 else "black")
    axes.set_xticks(range(len(matrix)), list(matrix), rotation=60, ha="right")
    axes.set_yticks(range(len(matrix)), list(matrix))
    axes.set(xlabel="class of the objects", ylabel="generated adapter", title="AP50 in percent, labels not looked at")
    save_figure(figure, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=Path("build"), help="build area with coco/")
    args = parser.parse_args()
    bundle = bundled_folder("detection")
    generator = ICMGenerator.from_pretrained(bundle / "generator")
    base = generator.load_base()
    processor = AutoProcessor.from_pretrained(base.name_or_path)
    collection = AdapterCollection.from_pretrained(bundle / "own")
    own = {task: collection.final(task) for task in collection.tasks}
    tasks = build_tasks(args.build)
    scenes = load_coco(args.build / "coco" / "test.json", args.build / "coco" / "test")
    counts = {task.label: sum(image.labels.count(task.label) for image in scenes) for task in tasks}

    found = detect(base, processor, scenes, batch_size=64)
    references = [{"boxes": image.boxes, "labels": image.labels} for image in scenes]
    precision = mean_average_precision(found, references, TAUGHT)
    result = {name: round(precision[name], 4) for name in ("map", "map_50", "map_75")}
    print(f"base on its {len(TAUGHT)} own classes, {len(scenes)} scenes: {result}", flush=True)

    vectors = {task.name: generator.encoder.encode(crops(task.test_images, task.label, 20)) for task in tasks}
    for task in tasks:
        vectors[task.name] = torch.cat([generator.encoder.encode(task.descriptions[:20]), vectors[task.name]])
    plot_task_vectors(vectors, HERE / "task_vectors.png", title="CLIP task vectors: 20 sentences and 20 objects of each class")
    states = HiddenStateEncoder(base, processor, base.name_or_path)
    five = {task.name: states.encode(crops(task.test_images, task.label, STATES)) for task in tasks if task.name in TABLE_1}
    plot_task_vectors(five, HERE / "hidden_states.png", title="Last decoder states of the unadapted Florence-2 on objects of five classes")

    matrix = cross_detection(generator, processor, tasks, scenes[:MATRIX_SCENES], batch_size=64)
    plot_matrix(matrix, HERE.parent / "docs" / "detection_matrix.png")
    print(f"{'adapter x class':16}" + "".join(f"{name[:7]:>8}" for name in matrix))
    print("\n".join(f"{name:16}" + "".join(f"{value:8.2f}" for value in row.values()) for name, row in matrix.items()), flush=True)
    sheet(generator, processor, tasks, own, scenes)
    report = evaluate_detection(generator, processor, tasks, own, batch_size=64)
    print(report.table())
    report.plot(HERE / "detection.png")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    facts = {"date": datetime.date.today().isoformat(), "threads": torch.get_num_threads(), "versions": versions}
    document = {"base_on_taught_classes": result, "test_objects": counts, **report.to_dict(), "adapter_x_class": matrix, **facts}
    (HERE / "detection.json").write_text(json.dumps(document, indent=1) + "\n")


def sheet(generator: ICMGenerator, processor: object, tasks: list, own: dict, scenes: list[AnnotatedImage]) -> None:
    """Figure 4: one scene of each of the paper's classes under base, own LoRA and generated adapter."""
    from peft_icm.adapters.attach import attach

    images, columns = [], {"base": [], "own LoRA": [], "generated": []}
    model = generator.generate_adapter(tasks[0].descriptions[0])
    for task in (task for task in tasks if task.name in TABLE_1):
        image = next(image for image in scenes if image.labels.count(task.label) == 1 and len(image.labels) > 2)
        mine = [box for box, label in zip(image.boxes, image.labels, strict=True) if label == task.label]
        images.append(AnnotatedImage(image.image, mine, [task.label]))
        with model.disable_adapter():
            columns["base"] += detect(model, processor, [image])
        attach(model, generator.layout, generator.layout.unflatten(own[task.name].to(generator.layout.torch_dtype)))
        columns["own LoRA"] += detect(model, processor, [image])
        generator.generate_adapter(task.descriptions[0], model, generator=torch.Generator().manual_seed(0))
        columns["generated"] += detect(model, processor, [image])
    plot_detections(images, columns, HERE / "detections.png")


if __name__ == "__main__":
    main()
