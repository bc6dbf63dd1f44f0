"""The demo: one sentence becomes an adapter, then bundled tasks are scored on held-out text or pictures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoProcessor

from ..adapters.attach import attach
from ..adapters.collection import AdapterCollection
from ..adapters.saving import save_adapter
from ..bundled import bundled_folder
from ..evaluation.detection import DetectionEvaluation, class_precision, evaluate_detection
from ..evaluation.figures import plot_detections
from ..evaluation.text import Evaluation, evaluate_generator
from ..generator.modeling_icm import ICMGenerator
from ..tasks import load_tasks
from ..tasks.detection import DetectionTask, detect

SENTENCES = {"text": "continue a Shakespeare play", "detection": "detect sofas"}
TABLE_1 = ("dog", "bicycle", "cat", "sofa", "motorbike")  # the paper's classes
SHOWN = 3  # pictures on the sheet
SEED = 0


def run_demo(output: str | Path, task: str = "text", *, quiet: bool = False) -> dict[str, Any]:
    """Generate an adapter from a sentence, save it, and score bundled tasks.

    Args:
        output (`str` or `Path`): Folder for `adapter/`, `demo.json` and `demo.png`, and for detection `detections.png`.
        task (`str`, defaults to `"text"`): The bundle: `"text"` (18 domains of text) or `"detection"` (the five classes of the paper).
        quiet (`bool`, defaults to `False`): Print nothing; progress bars stay.

    Returns:
        `dict`: [`Evaluation.to_dict`] or [`DetectionEvaluation.to_dict`]; under `adapter` the folder written; for detection under `picture`
        the drawing of what base, own LoRA and generated adapter find, and under `shown` their boxes and AP50 in it.
    """
    say = (lambda *_: None) if quiet else print
    bundle, folder, sentence = bundled_folder(task), Path(output), SENTENCES[task]
    folder.mkdir(parents=True, exist_ok=True)
    say(f'ICMGenerator.from_pretrained(bundled_generator("{task}")).generate_adapter({sentence!r})')
    generator = ICMGenerator.from_pretrained(bundle / "generator")
    model = generator.generate_adapter(sentence, generator=torch.Generator().manual_seed(SEED))
    adapter = save_adapter(model, folder / "adapter").resolve()
    say(f"-> {type(model).__name__}, {generator.layout.numel:,} numbers; an ordinary PEFT folder: {adapter}\n")
    collection = AdapterCollection.from_pretrained(bundle / "own")
    own = {name: collection.final(name) for name in collection.tasks}
    processor = AutoProcessor.from_pretrained(model.get_base_model().name_or_path)
    tasks: Any = load_tasks(bundle / "tasks")
    more: dict[str, Any] = {"adapter": str(adapter)}
    evaluation: Evaluation | DetectionEvaluation
    if task == "text":
        say(f"Now on held-out text of all {len(tasks)} tasks (this takes about two minutes):")
        evaluation = evaluate_generator(generator, processor, tasks, own, batch_size=4)
    else:
        (sofas,) = (found for found in tasks if sentence in found.descriptions)
        more["picture"] = str(folder.resolve() / "detections.png")
        more["shown"] = _draw(generator, model, processor, sofas, own[sofas.name], Path(more["picture"]))
        precisions = ", ".join(f"{name} {found['map_50']:.2f}" for name, found in more["shown"].items())
        say(f"AP50 on the {SHOWN} pictures drawn in {more['picture']}: {precisions}")
        say(f"\nNow the paper's five classes, on {len(sofas.test_images)} pictures in styles never trained on (this takes about a minute):")
        tasks = [found for found in tasks if found.name in TABLE_1]
        evaluation = evaluate_detection(generator, processor, tasks, own, variants=("generated",))
    result = {**evaluation.to_dict(), **more}
    evaluation.plot(folder / "demo.png")
    temporary = folder / "demo.json.part"
    temporary.write_text(json.dumps(result, indent=1))
    os.replace(temporary, folder / "demo.json")
    say(evaluation.table())
    say(f"\nown: the LoRA that was trained for the task. Seeds {evaluation.seeds}; {evaluation.seconds:.0f} s.")
    say(f"Also in {folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}.")
    say(f'Load the adapter without peft_icm: PeftModel.from_pretrained(base, "{adapter}")')
    return result


def _draw(
    generator: ICMGenerator, model: PeftModel, processor: Any, task: DetectionTask, own: torch.Tensor, picture: Path
) -> dict[str, dict[str, Any]]:
    """Draw a few pictures with the class under base, own LoRA and the generated adapter; returns boxes and AP50 of each."""
    images = [image for image in task.test_images if task.label in image.labels][:SHOWN]
    generated = detect(model, processor, images, progress=False)
    with model.disable_adapter():
        base = detect(model, processor, images, progress=False)
    layout = generator.layout
    attach(model, layout, layout.unflatten(own.to(layout.torch_dtype)))
    columns = {"base": base, "own": detect(model, processor, images, progress=False), "generated": generated}
    shown = {}
    for name, found in columns.items():
        boxes = [[box for box, label in zip(one["boxes"].tolist(), one["labels"], strict=True) if label == task.label] for one in found]
        shown[name] = {"map_50": round(class_precision(found, images, task.label)["map_50"], 4), "boxes": boxes}
    titles = {f"{name}: AP50 {shown[name]['map_50']:.2f}": found for name, found in columns.items()}
    plot_detections(images, titles, picture, label=task.label)
    return shown
