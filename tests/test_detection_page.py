"""docs/data.md on detection data: its files become tasks, and its three commands make an adapter that beats the base."""

import json
import shlex
from pathlib import Path

import pytest
from command_line import run
from peft import PeftModel
from PIL import Image
from test_house import blocks
from transformers import AutoProcessor, Florence2ForConditionalGeneration

from peft_icm.bundled import bundled_folder
from peft_icm.evaluation.detection import class_precision
from peft_icm.tasks import load_tasks
from peft_icm.tasks.annotated_images import crops, load_coco
from peft_icm.tasks.detection import detect

SCENES = bundled_folder("detection") / "tasks"
CLASSES = ("couch", "motorcycle", "horse", "clock", "pizza")  # the bundled base was never taught these names


def block(language, word):
    """The example of docs/data.md that has a word."""
    (found,) = [text for text in blocks("data.md", language) if word in text]
    return found


def pictures(folder, *names):
    folder.mkdir(parents=True)
    for name in names:
        Image.new("RGB", (640, 480), "grey").save(folder / f"{name}.jpg")


def write_example(form, folder):
    """The page's file of a form, with pictures; that of one split stands for both."""
    for split in ("train", "val"):
        if form == "yolo":
            pictures(folder / "images" / split, "room", "hall")
            (folder / "labels" / split).mkdir(parents=True)
            (folder / "labels" / split / "room.txt").write_text(block("text", "0.31"))
        else:
            pictures(folder / split, "room", "hall", "wall")
        if form == "coco":
            (folder / f"{split}.json").write_text(block("json", "categories"))
    if form == "yolo":
        (folder / "data.yaml").write_text(block("yaml", "val:"))
    elif form != "coco":
        file, word = {"roboflow": ("annotations.jsonl", "<OD>"), "hub": ("metadata.jsonl", "bbox")}[form]
        for split in ("train", "val"):
            (folder / split / file).write_text(block("jsonl", word))
    return folder


@pytest.mark.parametrize(("form", "tasks"), [("coco", 1), ("yolo", 2), ("roboflow", 2), ("hub", 2)])
def test_the_files_of_the_page_become_tasks(form, tasks, tmp_path):
    assert run("tasks", write_example(form, tmp_path / "data"), "--from", form, "-o", tmp_path / "tasks") == 0
    sofa, *others = load_tasks(tmp_path / "tasks")
    assert sofa.name == "sofa" and len(others) == tasks - 1
    box = next(image for image in sofa.train_images + sofa.test_images if str(image.image).endswith("room.jpg")).boxes[0]
    assert box == pytest.approx([10, 20, 210, 170], abs=2)


def write_yolo(folder):
    """The scenes that the package carries for tests, with five classes, as a person has them."""
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    for scene in load_coco(SCENES / "test.json", SCENES / "images"):
        file, (width, height) = Path(scene.image), scene.size
        (folder / "images" / file.name).symlink_to(file)
        lines = [
            f"{CLASSES.index(label)} {(x1 + x2) / 2 / width} {(y1 + y2) / 2 / height} {(x2 - x1) / width} {(y2 - y1) / height}\n"
            for (x1, y1, x2, y2), label in zip(scene.boxes, scene.labels, strict=True)
            if label in CLASSES
        ]
        (folder / "labels" / f"{file.stem}.txt").write_text("".join(lines))
    (folder / "data.yaml").write_text(f"train: images\nnames: {json.dumps(CLASSES)}\n")


@pytest.mark.slow
def test_three_commands_from_a_yolo_folder_to_an_adapter_that_beats_the_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_yolo(tmp_path / "my-yolo")
    base = bundled_folder("detection") / "generator" / "base_model"
    lines = block("bash", "my-yolo").replace("\\\n", " ").replace("$BASE", str(base)).splitlines()
    to_tasks, train, generate = (shlex.split(line)[1:] for line in lines if line.startswith("peft-icm"))
    assert run(*to_tasks) == 0 and run(*train) == 0
    florence = Florence2ForConditionalGeneration.from_pretrained(base)
    processor, precision = AutoProcessor.from_pretrained(base), {}
    for task in load_tasks("tasks"):
        crops(task.train_images, task.label, 1)[0].save(f"{task.name}.jpg")
        assert run(*(word.replace("pizza", task.name) for word in generate)) == 0
        model = PeftModel.from_pretrained(Florence2ForConditionalGeneration.from_pretrained(base), f"{task.name}-lora")
        precision[task.name] = [
            class_precision(detect(one, processor, task.test_images), task.test_images, task.label)["map_50"] for one in (florence, model)
        ]
        print(f"{task.name}: AP50 {precision[task.name][0]:.2f} (base) {precision[task.name][1]:.2f} (generated)")
    of_base, generated = (sum(column) / len(precision) for column in zip(*precision.values(), strict=True))
    print(f"mean: AP50 {of_base:.2f} (base) {generated:.2f} (generated)")
    assert generated > of_base + 0.05
