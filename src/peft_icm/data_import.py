"""Data that people have, made a folder of tasks: of annotated pictures one task a class, with its sentences; data sets of the Hub."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .conditioning.phrasings import phrasings
from .disk import safe_name
from .tasks.annotated_images import AnnotatedImage
from .tasks.detection_files import load_coco_folder, load_florence_jsonl, load_hub_dataset
from .tasks.florence_answers import is_answerable
from .tasks.import_text import text_tasks_of
from .tasks.splits import DetectionData, divide, load_splits
from .tasks.yolo import load_yolo

UNSEEN = 4  # sentences of each task that are kept for evaluation


def detection_tasks(
    data: DetectionData,
    source: str | os.PathLike[str],
    output: Path,
    *,
    descriptions: Mapping[str, list[str]] | None = None,
    test_share: float = 0.2,
    seed: int = 0,
) -> dict[str, Any]:
    """Write a folder of detection tasks, as [`load_detection_tasks`] reads it, from annotated pictures.

    Pictures are not copied: `tasks.json` names the folder that they lie in by its absolute path, as a data set may be larger than the
    space that is left, and two copies would part. All are decoded
    once: what is broken is found here and not in the middle of a training.

    A class that has pictures in both splits becomes a task: its name is the class's, without what no file name may have; its sentences
    are "detect sofas" and "detect sofa", and four of frames that nothing is trained on for evaluation. A name that Florence-2 cannot
    write, such as one that is not ASCII, is answered with "object".

    Args:
        data ([`DetectionData`]): Of [`load_coco_folder`], [`load_yolo`], [`load_florence_jsonl`] or [`load_hub_dataset`].
        source (`str` or `Path`): Where it was read, for messages.
        output (`Path`): An empty folder.
        descriptions (`Mapping[str, list[str]]`, *optional*): Sentences that ask for a task, in the place of those above.
        test_share (`float`, defaults to 0.2): What is held out of the pictures of each class where the source has no split for that, or
            holds out the very pictures that it trains on.
        seed (`int`, defaults to 0): Of what is held out, and of the sentences.

    Returns:
        `dict`: `unit`, `"pictures"`; `tasks`, of each `name`, `descriptions` and the pictures that have it in `train` and `test`; and
        `warnings`, which classes were left out.

    Raises:
        `ValueError` or `OSError`: If a picture is broken or in both splits, no class has pictures
            in both, two classes would have one name, or `descriptions` names none of the tasks.
    """
    train, test = _splits(data, source, test_share, seed)
    for image in tqdm([*train, *test], desc="looking at pictures", leave=False, delay=2):
        image.load()
    trained, tested = (Counter(label for image in images for label in set(image.labels)) for images in (train, test))
    kept = [label for label in data.classes if trained[label] and tested[label]]
    if not kept:
        raise ValueError(f"{source}: none of its {len(data.classes)} classes has pictures to train on and pictures to test on.")
    tasks = _tasks(kept, descriptions or {}, seed)
    document = {"train": _write_coco(train, data.classes, output, "train"), "test": _write_coco(test, data.classes, output, "test")}
    (output / "tasks.json").write_text(json.dumps({**document, "tasks": tasks}, indent=1, ensure_ascii=False), encoding="utf-8")
    absent = [f"{label} ({trained[label]} to train on, {tested[label]} to test on)" for label in data.classes if label not in kept]
    warnings = [f"classes without pictures to train on or to test on are left out: {', '.join(absent)}."] if absent else []
    said = [
        {"name": task["name"], "descriptions": task["descriptions"], "train": trained[task["label"]], "test": tested[task["label"]]}
        for task in tasks
    ]
    return {"unit": "pictures", "tasks": said, "warnings": warnings}


def _read_by(reader: Callable[[Path], DetectionData], source: Path, output: Path, **options: Any) -> dict[str, Any]:
    return detection_tasks(reader(source), source, output, **options)


coco_tasks, yolo_tasks, roboflow_tasks = (partial(_read_by, reader) for reader in (load_coco_folder, load_yolo, load_florence_jsonl))


def hub_tasks(source: Path, output: Path, **options: Any) -> dict[str, Any]:
    """Write a folder of tasks from a data set of the Hub: of detection where it has pictures, else of language.

    Args:
        source (`Path`): Its id or folder.
        output, **options: See [`detection_tasks`] and [`text_tasks`]. Pictures that lie in no files are written to `images/`.

    Raises:
        `ValueError`: If it cannot be loaded, or is of neither kind.
    """
    splits = load_splits(source)
    if any({"image", "objects"} & set(rows.column_names) for rows in splits.values()):
        return detection_tasks(load_hub_dataset(splits, source, output / "images"), source, output, **options)
    return text_tasks_of(splits, source, output, **options)


def _splits(data: DetectionData, source: Any, share: float, seed: int) -> tuple[list[AnnotatedImage], list[AnnotatedImage]]:
    trained, held = ({Path(str(image.image)).resolve() for image in images} for images in (data.train, data.test))
    if not held or trained == held:
        return divide(data.train, share, seed)
    if both := sorted(trained & held):
        raise ValueError(
            f"{source}: {len(both)} pictures are to be trained on and held out, the first is {both[0]}: take them out of one split."
        )
    return data.train, data.test


def _write_coco(images: Sequence[AnnotatedImage], classes: list[str], folder: Path, split: str) -> dict[str, str]:
    """Write `SPLIT.json`; returns the split's entry of `tasks.json`."""
    files = [Path(str(image.image)).resolve() for image in images]
    root = Path(os.path.commonpath([file.parent for file in files]))
    number_of = {label: number for number, label in enumerate(classes)}
    rows, objects = [], list[dict[str, Any]]()
    for number, (file, image) in enumerate(zip(files, images, strict=True)):
        width, height = image.size
        rows.append({"id": number, "file_name": str(file.relative_to(root)), "width": width, "height": height})
        for (x1, y1, x2, y2), label in zip(image.boxes, image.labels, strict=True):
            box = [x1, y1, x2 - x1, y2 - y1]
            objects.append({"id": len(objects), "image_id": number, "category_id": number_of[label], "bbox": box})
    categories = [{"id": number, "name": label} for label, number in number_of.items()]
    (folder / f"{split}.json").write_text(json.dumps({"images": rows, "annotations": objects, "categories": categories}))
    return {"annotations": f"{split}.json", "images": str(root.relative_to(folder) if root.is_relative_to(folder) else root)}


def _tasks(labels: list[str], descriptions: Mapping[str, list[str]], seed: int) -> list[dict[str, Any]]:
    """Entries of `tasks.json`."""
    found: dict[str, dict[str, Any]] = {}
    for label in labels:
        name = safe_name(re.sub(r"[/\\:\x00-\x1f\x7f-\x9f]", "-", label).strip(), "class's")
        if (same := found.setdefault(name.casefold(), {"label": label})["label"]) != label:
            raise ValueError(f"The classes {same!r} and {label!r} would both be the task {name!r}: rename one of them, or make them one.")
        noun = label.replace("_", " ").strip()
        noun = noun.lower() if noun.istitle() else noun
        asked = descriptions.get(name) or list(dict.fromkeys([f"detect {_plural(noun)}", f"detect {noun}"]))
        unseen = phrasings(asked[0], UNSEEN, seed=seed, held_out=True)
        entry = {"name": name, "label": label, "descriptions": asked, "unseen_descriptions": unseen}
        found[name.casefold()] = entry if is_answerable(label) else {**entry, "answer": "object"}
    names = [entry["name"] for entry in found.values()]
    if unknown := descriptions.keys() - set(names):
        raise ValueError(f"--description names {min(unknown)!r}: the tasks are {', '.join(names)}.")
    return list(found.values())


def _plural(noun: str) -> str:
    """By the rules of English where they are plain: not of what ends in s, no letter or a foreign one."""
    if not ("a" <= noun[-1:].lower() <= "z") or (noun.endswith("s") and not noun.endswith(("ss", "us"))):
        return noun
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return f"{noun}es"
    return f"{noun[:-1]}ies" if re.search("[^aeiou]y$", noun) else f"{noun}s"
