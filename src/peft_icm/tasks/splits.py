"""Data in the splits that it comes with, or divided anew."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .annotated_images import AnnotatedImage

Found = TypeVar("Found")
HELD_OUT = ("val", "valid", "validation", "dev", "test")  # in this order: the test split of a public data set often has no annotations
_SPLIT = re.compile(rf"(?<![a-z])(train|{'|'.join(HELD_OUT)})(?![a-z])")


@dataclass
class DetectionData:
    """What a reader of annotated pictures found.

    Args:
        train (`list[AnnotatedImage]`): To train on.
        test (`list[AnnotatedImage]`): Held out; empty where the source has no such split.
        classes (`list[str]`): All that the source names, whether a picture has them or not.
    """

    train: list[AnnotatedImage]
    test: list[AnnotatedImage]
    classes: list[str]


def chosen_splits(found: Mapping[str, Found], source: str | os.PathLike[str]) -> dict[str, Found]:
    """What to train on and what to hold out, of the splits that a source has.

    Args:
        found (`Mapping[str, Found]`): By the names of the splits.
        source (`str` or `Path`): For the message.

    Returns:
        `dict[str, Found]`: `"train"`, and `"test"` where there is one: the first of val, valid, validation, dev, test. A single split,
        whatever its name, is `"train"`.

    Raises:
        `ValueError`: If there is no split, or none of several is named train.

    Example:

    ```python
    >>> chosen_splits({"train": 1, "test": 2, "val": 3}, "data.yaml")
    {'train': 1, 'test': 3}

    ```
    """
    if len(found) == 1:
        return {"train": next(iter(found.values()))}
    if "train" not in found:
        raise ValueError(f"{source} has the splits {', '.join(found) or '(none)'}: it needs train, and one of {', '.join(HELD_OUT)}.")
    held = next((found[name] for name in HELD_OUT if name in found), None)
    return {"train": found["train"]} if held is None else {"train": found["train"], "test": held}


def load_splits(source: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a data set; no code of it is run.

    Args:
        source (`str` or `Path`): What `datasets.load_dataset` takes: an id of the Hub, or a folder.

    Returns:
        `dict[str, datasets.Dataset]`: `"train"` and `"test"` as in [`chosen_splits`].

    Raises:
        `ValueError`: If it cannot be loaded, or it is not clear which split is trained on.
    """
    import datasets

    try:
        found = datasets.load_dataset(str(source))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{source} is no data set that can be loaded ({' '.join(str(error).split())}).") from error
    return chosen_splits(found, source)


def split_files(source: Path, *patterns: str) -> dict[str, Path]:
    """The annotation files of a folder, by the split that their path names.

    Args:
        source (`Path`): The folder, or a single file.
        *patterns (`str`): Of files in the folder; the first that finds one holds.

    Returns:
        `dict[str, Path]`: `"train"` and `"test"` as in [`chosen_splits`].

    Raises:
        `ValueError`: If there is no such file, or it is not clear which of them is of which split.
    """
    if not source.is_dir():
        return {"train": source}
    files = next((files for pattern in patterns if (files := sorted(source.glob(pattern)))), [])
    if not files:
        raise ValueError(f"{source} holds none of {', '.join(patterns)}: name another folder, or the file.")
    found: dict[str, Path] = {}
    for file in files:
        names = _SPLIT.findall(file.relative_to(source).as_posix().lower()) or [file.stem]
        if names[-1] in found:
            raise ValueError(f"{file} and {found[names[-1]]} are both of {names[-1]}: leave one of them in {source}, or name one file.")
        found[names[-1]] = file
    return chosen_splits(found, source)


def divide(images: Sequence[AnnotatedImage], share: float, seed: int) -> tuple[list[AnnotatedImage], list[AnnotatedImage]]:
    """Hold out a share of the pictures of every class, the rare classes first; a class never loses its last picture to train on.

    Args:
        images (`Sequence[AnnotatedImage]`): All.
        share (`float`): Between 0 and 1, of the pictures of each class; one picture at least.
        seed (`int`): Of which.

    Returns:
        `tuple[list[AnnotatedImage], list[AnnotatedImage]]`: To train on and held out, each in the order of `images`.

    Raises:
        `ValueError`: If `share` is out of range.
    """
    if not 0 < share < 1:
        raise ValueError(f"test_share={share} must be between 0 and 1.")
    labels = [list(dict.fromkeys(image.labels)) or [""] for image in images]  # pictures without objects are a class too
    holders: dict[str, list[int]] = {}
    for row in random.Random(seed).sample(range(len(images)), len(images)):
        for label in labels[row]:
            holders.setdefault(label, []).append(row)
    left = {label: len(rows) for label, rows in holders.items()}
    held: set[int] = set()
    for rows in sorted(holders.values(), key=len):
        wanted = max(1, round(share * len(rows))) - len(held.intersection(rows))
        for row in rows:
            if wanted > 0 and row not in held and all(left[label] > 1 for label in labels[row]):
                held.add(row)
                wanted -= 1
                for label in labels[row]:
                    left[label] -= 1
    return [image for row, image in enumerate(images) if row not in held], [images[row] for row in sorted(held)]
