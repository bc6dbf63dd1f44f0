"""The paper's detection setting in full (section 4.1, Table 1): Florence-2, LoRA on five classes of COCO.

    python examples/florence2_coco.py --annotations annotations --images . --output coco-icm --rank 2 --dtype bfloat16
    python examples/florence2_coco.py --demo      # the same code at demo size, offline, on a CPU

`--annotations` is the folder with COCO's instances_train2017.json and instances_val2017.json, `--images` that with train2017/ and
val2017/. 150 epochs, the LoRA of the last 50 kept; ranks 1, 2, 4 and 8 are the paper's Table 4.
"""

import argparse
import json
from pathlib import Path

from peft import LoraConfig
from transformers import AutoProcessor

from peft_icm import CollectingArguments, ICMConfig, ICMGenerator, ICMTrainer, ICMTrainingArguments, collect, evaluate_detection
from peft_icm.bundled import bundled_encoder, bundled_folder
from peft_icm.conditioning import ClipEncoder
from peft_icm.figures import plot_task_vectors
from peft_icm.tasks.annotated_images import crops, load_coco
from peft_icm.tasks.detection import detection_tasks

CLASSES = {"dog": "dog", "bicycle": "bicycle", "cat": "cat", "sofa": "couch", "motorbike": "motorcycle"}  # the paper's names: COCO's
SENTENCES = ("detect {}s", "Detect the {} in the picture.", "find every {}", "locate {}s", "where are the {}s?", "boxes of all {}s")
TARGETS = ["q_proj", "o_proj", "k_proj", "v_proj", "linear", "Conv2d", "lm_head", "fc2"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="bundled Florence-2, bundled scenes, a few epochs")
    parser.add_argument("--base-model", default="florence-community/Florence-2-base")
    parser.add_argument("--annotations", type=Path, help="folder of COCO's instances files")
    parser.add_argument("--images", type=Path, help="folder of train2017/ and val2017/")
    parser.add_argument("--output", type=Path, default=Path("florence2-coco"))
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--dtype", default="float32", help="dtype of the frozen base")
    parser.add_argument("--launcher", choices=["local", "ray", "submitit"], default="local", help="where LoRAs are trained")
    args = parser.parse_args()
    if not args.demo and not (args.annotations and args.images):
        parser.error("--annotations and --images are required without --demo")

    if args.demo:  # most of the held-out scenes, which the base has never seen, are trained on here
        folder = bundled_folder("detection")
        base = str(folder / "generator" / "base_model")
        scenes = load_coco(folder / "tasks" / "test.json", folder / "tasks" / "images")
        train, test = scenes[:-60], scenes[-60:]
        epochs, snapshots, rate, dataset = 10, 4, 5e-3, {"location_step": 20, "negatives": 0.5}
    else:
        base = args.base_model
        train, test = (
            load_coco(args.annotations / f"instances_{split}2017.json", args.images / f"{split}2017") for split in ("train", "val")
        )
        epochs, snapshots, rate, dataset = 150, 50, 1e-4, {}
    encoder = ClipEncoder.from_pretrained(bundled_encoder()) if args.demo else ClipEncoder.from_pretrained("ViT-L-14", pretrained="openai")
    tasks = detection_tasks(train, test, CLASSES, {name: [sentence.format(name) for sentence in SENTENCES] for name in CLASSES})

    recipe = CollectingArguments(
        str(args.output / "collecting"),
        num_train_epochs=epochs,
        num_snapshots=snapshots,
        learning_rate=rate,
        dtype=args.dtype,
        dataset_kwargs=dataset,
        launcher=args.launcher,
    )
    lora = LoraConfig(r=args.rank, lora_alpha=4 * args.rank, target_modules=TARGETS, task_type=None)
    collection = collect(base, tasks, lora, recipe)
    if collection is None:
        print("Other processes are still training tasks: run again when they are done.")
        return
    print(f"{len(collection.tasks)} tasks, P = {collection.layout.numel:,}")
    collection.encode(encoder, images={task.name: crops(task.train_images, task.label, 64) for task in tasks})
    plot_task_vectors(collection.task_vectors, args.output / "task_vectors.png", title="CLIP task vectors of sentences and objects")

    training = ICMTrainingArguments(
        str(args.output / "training"),
        num_train_epochs=400 if args.demo else 2000,
        lr_scheduler_type="cosine",
        eval_strategy="no",
        save_strategy="no",
        disable_tqdm=False,
    )
    trainer = ICMTrainer(ICMConfig(latent_size=16 if args.demo else 64), training, collection=collection, encoder=encoder)
    trainer.train()
    trainer.generator.save_pretrained(args.output / "generator")

    generator = ICMGenerator.from_pretrained(args.output / "generator")
    own = {task: collection.final(task) for task in collection.tasks}
    variants = ("generated", "pictures", "text_and_pictures")  # Tables 1 and 6
    report = evaluate_detection(generator, AutoProcessor.from_pretrained(base), tasks, own, variants=variants, seeds=(0,))
    print(report.table())
    report.plot(args.output / "report.png")
    (args.output / "report.json").write_text(json.dumps(report.to_dict(), indent=1))


if __name__ == "__main__":
    main()
