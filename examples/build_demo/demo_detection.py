"""The stages that build the detection bundle; `build_demo_models.py` runs them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from demo_bundle import bundled_size, train_generator, write_bundle
from demo_detector import SCENE, STEP
from demo_scenes import (
    CLASSES,
    COLOUR_STYLES,
    GLYPH_STYLES,
    PACKAGES,
    PHOTOGRAPHS,
    TEST_PHOTOGRAPHS,
    TEST_STYLES,
    Icons,
    photographs,
    scenes,
    write_coco,
)
from peft import LoraConfig

from peft_icm import CollectingArguments, ICMConfig, collect
from peft_icm.tasks.annotated_images import crops, load_coco
from peft_icm.tasks.detection import DetectionTask, detection_tasks

TRAIN_SCENES, TEST_SCENES = 10_000, 2_700
BUNDLED_SCENES = 120
PICTURES = 160  # crops of each class that the generator learns to read

TARGETS = ["q_proj", "o_proj", "k_proj", "v_proj", "linear", "Conv2d", "lm_head", "fc2"]  # the paper's
LORA_RANK = 4
LORA_EPOCHS, LORA_SNAPSHOTS = 20, 8
LORA_IMAGES = 320  # in an epoch
LORA_LEARNING_RATE = 2e-3  # higher ones cost AP75

GENERATOR_COMPONENTS, GENERATOR_LATENT, GENERATOR_KL_WEIGHT = 15, 32, 0.01

LICENCES = """# Licences of what is bundled

Generator, base model, LoRAs and the image tower of `../encoder` were trained by `examples/build_demo/build_demo_models.py` and
`examples/build_demo/train_image_tower.py`: Apache-2.0. The scenes in `tasks/images/` are
icons pasted on photographs, under the licences of both;
where they differ, the stricter one holds (CC BY-SA 4.0).

| what | package | licence |
|---|---|---|
{table}
"""


def draw_coco(build: Path) -> None:
    """`coco/train.json` and `coco/test.json` with their pictures: all 24 classes; the test set in styles and on photographs of its own."""
    icons = Icons(build)
    labels = list(CLASSES)
    coco = build / "coco"
    train = icons.of_classes(labels, COLOUR_STYLES + GLYPH_STYLES)
    backgrounds = photographs(build, test=False, crops=1500, size=SCENE, seed=2)
    found = scenes(train, backgrounds, TRAIN_SCENES, seed=2, distractors=icons.distractors)
    write_coco(found, coco / "train", coco / "train.json", labels, total=TRAIN_SCENES)
    test = icons.of_classes(labels, TEST_STYLES)
    found = scenes(test, photographs(build, test=True, crops=800, size=SCENE, seed=3), TEST_SCENES, seed=3, jitter=0.0)
    write_coco(found, coco / "test", coco / "test.json", labels, total=TEST_SCENES)


def tasks(build: Path) -> list[DetectionTask]:
    """The one-class tasks with their sentences. Each is tested on the scenes that show it and on as many that do not."""
    phrasings = json.loads((Path(__file__).parent / "detection_phrasings.json").read_text(encoding="utf-8"))
    classes = phrasings["classes"]

    def say(templates: list[str], name: str, words: int) -> list[str]:
        pairs = classes[name]["names"][:words]
        return [line.format(singular=singular, plural=plural) for singular, plural in pairs for line in templates]

    found = detection_tasks(
        load_coco(build / "coco" / "train.json", build / "coco" / "train"),
        load_coco(build / "coco" / "test.json", build / "coco" / "test"),
        {name: entry["label"] for name, entry in classes.items()},
        {name: [f"detect {plural}" for _, plural in entry["names"]] for name, entry in classes.items()},
        {name: say(phrasings["unseen_templates"], name, 2) for name in classes},
    )
    for task in found:
        positive = [image for image in task.test_images if task.label in image.labels]
        negative = [image for image in task.test_images if task.label not in image.labels]
        task.test_images = positive + negative[: len(positive)]
    return found


def collect_loras(build: Path) -> None:
    """One LoRA for each class, on both cores; goes on where it was stopped."""
    recipe = CollectingArguments(
        output_dir=str(build / "detection_collecting"),
        num_train_epochs=LORA_EPOCHS,
        num_snapshots=LORA_SNAPSHOTS,
        learning_rate=LORA_LEARNING_RATE,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=16,
        dataset_kwargs={"location_step": STEP, "negatives": 2.0, "images_per_epoch": LORA_IMAGES, "in_memory": True},
        launcher="ray",
    )
    lora = LoraConfig(r=LORA_RANK, lora_alpha=4 * LORA_RANK, target_modules=TARGETS, task_type=None)
    collection = collect(build / "florence", tasks(build), lora, recipe)
    assert collection is not None
    collection.save_pretrained(build / "detection_collection")


def generator(build: Path) -> None:
    """Train the generator on sentences and crops."""
    found = tasks(build)
    config = ICMConfig(num_components=GENERATOR_COMPONENTS, latent_size=GENERATOR_LATENT, kl_weight=GENERATOR_KL_WEIGHT)
    sentences = {task.name: task.descriptions for task in found}
    images = {task.name: crops(task.train_images, task.label, PICTURES) for task in found}
    train_generator(build / "detection_collection", build / "encoder", config, build / "detection_generator", sentences, images)


def bundle(build: Path) -> None:
    """Write what the package carries, with a part of the test scenes."""
    found = tasks(build)
    target = write_bundle("detection", build / "detection_generator", build / "detection_collection", found)
    (target / "tasks" / "images").mkdir(parents=True)
    document = json.loads((build / "coco" / "test.json").read_text())
    document["images"] = document["images"][:BUNDLED_SCENES]
    document["annotations"] = [entry for entry in document["annotations"] if entry["image_id"] < BUNDLED_SCENES]
    for image in document["images"]:
        shutil.copy(build / "coco" / "test" / image["file_name"], target / "tasks" / "images")
    (target / "tasks" / "test.json").write_text(json.dumps(document))
    entries = [
        {"name": task.name, "label": task.label, "descriptions": task.descriptions[:1], "unseen_descriptions": task.unseen_descriptions}
        for task in found
    ]
    split = {"train": None, "test": {"annotations": "test.json", "images": "images"}}
    (target / "tasks" / "tasks.json").write_text(json.dumps({**split, "tasks": entries}, indent=1) + "\n", encoding="utf-8")

    rows = []
    for style, version in PACKAGES.items():
        licence = json.loads((build / "icons" / style / "info.json").read_text())["license"]["title"]
        use = "icons of the scenes" if style in TEST_STYLES else "icons trained on, none bundled"
        rows.append(f"| {use} | npm:@iconify-json/{style} {version} | {licence} |")
    files = sorted((build / "photographs").glob("usr/share/backgrounds/**/*.jpg"))[:TEST_PHOTOGRAPHS]
    names = ", ".join(file.stem.replace("_", " ") for file in files)
    rows.append(f"| photographs of the scenes: {names} | debian:{', '.join(PHOTOGRAPHS)} | CC BY-SA 4.0, CC BY 4.0, CC0 |")
    (target / "LICENSES.md").write_text(LICENCES.format(table="\n".join(rows)), encoding="utf-8")
    print(bundled_size())
