"""Annotated pictures as they are handed on: folders of COCO files, Roboflow's JSON lines for Florence-2, data sets of the Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE
from tqdm.auto import tqdm

from ..disk import inside
from ..pictures import picture_size
from .annotated_images import AnnotatedImage, category_of, from_dataset, load_coco
from .fields import read_json
from .florence_answers import read_answer
from .splits import DetectionData, split_files


def load_coco_folder(source: str | os.PathLike[str]) -> DetectionData:
    """Read COCO files and their pictures.

    Args:
        source (`str` or `Path`): An annotation file, or a folder with `annotations/instances_train*.json` (and `_val`),
            `annotations/*.json`, `train/_annotations.coco.json` (and `valid/`), or `train.json` (and `val.json`). Pictures lie beside the
            file or its folder, in `images/`, or in a folder of the split's name (`train2017`) or of its name in `images/`.

    Returns:
        [`DetectionData`]

    Raises:
        `ValueError`: If there is no such file, its pictures are not there, or [`load_coco`] refuses it.
    """
    patterns = ("annotations/instances_*.json", "annotations/*.json", "*/_annotations.coco.json", "*.json")
    classes: dict[str, None] = {}
    read: dict[str, list[AnnotatedImage]] = {"test": []}
    for split, file in split_files(Path(source), *patterns).items():
        pictures, names = _look_into(file)
        read[split] = load_coco(file, pictures)
        classes |= dict.fromkeys(names)
    return DetectionData(read["train"], read["test"], list(classes))


def _look_into(file: Path) -> tuple[Path, list[str]]:
    """The folder that holds the first picture of a COCO file, and its categories."""
    document = read_json(file, f"{file} is no COCO instances file")
    try:
        first, names = Path(document["images"][0]["file_name"]), [entry["name"] for entry in document["categories"]]
    except (LookupError, TypeError):
        return file.parent, []  # load_coco says what is wrong
    split = file.stem.removeprefix("instances_")
    folders = [root / part for root in (file.parent, file.parent.parent) for part in (f"images/{split}", split, ".", "images")]
    found = next((folder for folder in folders if (folder / first).is_file()), None)
    if found is None:
        places = ", ".join(map(str, folders))
        raise ValueError(f"{file}: its first picture, {first}, is in none of {places}: move the pictures to one of them.")
    return found, names


def load_florence_jsonl(source: str | os.PathLike[str]) -> DetectionData:
    """Read what Roboflow exports for Florence-2.

    Args:
        source (`str` or `Path`): A file of lines `{"image": "a.jpg", "prefix": "<OD>", "suffix": "dog<loc_1><loc_2><loc_3><loc_4>"}`, its
            pictures beside it, or a folder with `train/annotations.jsonl` (and `valid/`) or `train.jsonl` (and `valid.jsonl`).

    Returns:
        [`DetectionData`]

    Raises:
        `ValueError`: If there is no such file, or a line is broken or asks something else than `<OD>`, or its picture is missing or comes
            twice: file and line are named.
    """
    files = split_files(Path(source), "*/annotations.jsonl", "*/*.jsonl", "*.jsonl")
    read = {split: _read_lines(file) for split, file in files.items()}
    classes = dict.fromkeys(label for images in read.values() for image in images for label in image.labels)
    return DetectionData(read["train"], read.get("test", []), list(classes))


def _read_lines(file: Path) -> list[AnnotatedImage]:
    form = '{"image": "a.jpg", "prefix": "<OD>", "suffix": "dog<loc_1><loc_2><loc_3><loc_4>"}'
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is no file of JSON lines ({error}).") from error
    found: dict[Path, AnnotatedImage] = {}
    for number, line in enumerate(tqdm(lines, desc=str(file), leave=False, delay=2), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("image", "prefix", "suffix")):
                raise ValueError(f"it is {line!r:.80}")
            if row["prefix"].strip() != "<OD>":
                raise ValueError(f"prefix is {row['prefix']!r:.80}, only <OD> is read")
            picture = inside(file.parent, row["image"])
            if picture in found:
                raise ValueError(f"{row['image']} has a line before")
            found[picture] = AnnotatedImage(str(picture), *read_answer(row["suffix"], picture_size(picture)))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}, line {number} must be of the form {form} ({error}).") from error
    return list(found.values())


def load_hub_dataset(splits: Mapping[str, Any], source: str | os.PathLike[str], folder: Path) -> DetectionData:
    """Read a data set as [`from_dataset`] does; no code of it is run, and it has no pictures but its own.

    Args:
        splits (`Mapping[str, datasets.Dataset]`): See [`load_splits`].
        source (`str` or `Path`): Its id or folder.
        folder (`Path`): Where the pictures go that lie in no files of their own; a folder in it for each split.

    Returns:
        [`DetectionData`]

    Raises:
        `ValueError`: If it names a file that is not of its folder or of the Hub's cache, or [`from_dataset`] refuses it.
    """
    from datasets.config import HF_DATASETS_CACHE

    roots = [Path(root).resolve() for root in (source, folder, HF_DATASETS_CACHE, HF_HUB_CACHE)]
    read: dict[str, list[AnnotatedImage]] = {"test": []}
    classes: dict[str, None] = {}
    for split, rows in splits.items():
        try:
            read[split] = from_dataset(rows, folder / split)
        except ValueError as error:
            raise ValueError(f"{source}, {rows.split}: {error}") from error
        for file in (Path(str(image.image)).resolve() for image in read[split]):
            if not any(file.is_relative_to(root) for root in roots):
                raise ValueError(f"{source} names the picture {file}, which is no file of it: write the pictures themselves into it.")
        names = getattr(category_of(rows), "names", None) or [label for image in read[split] for label in image.labels]
        classes |= dict.fromkeys(names)
    return DetectionData(read["train"], read["test"], list(classes))
