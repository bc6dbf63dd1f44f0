"""YOLO's data sets: a data.yaml, folders of pictures, and a text file of boxes for each picture."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from tqdm.auto import tqdm

from ..pictures import picture_size
from .annotated_images import AnnotatedImage, clipped_corners
from .splits import HELD_OUT, DetectionData, chosen_splits

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
ROUNDED = 1.01  # as ultralytics has it: shares are rounded, and what is above 1 is 1
_FORM = "class x y width height, or class x1 y1 x2 y2 x3 y3 ... of a polygon"


def load_yolo(source: str | os.PathLike[str]) -> DetectionData:
    """Read a data set in the form of ultralytics.

    `data.yaml` holds `names`, a list or a mapping of numbers, and `train`, `val` and `test`: folders, `.txt` files that list pictures, or
    lists of either, in `path` (the file's own folder by default, and where `path` is not on this machine). A picture's boxes lie in
    the file of its name with `.txt`, in the folder `labels` for its `images`, else beside it; a picture without that file has no objects.
    Polygons and turned boxes become their bounds. This is a person's own data: its paths may lead anywhere, as ultralytics has it.

    Args:
        source (`str` or `Path`): The YAML file, or the folder with a `data.yaml`.

    Returns:
        [`DetectionData`]

    Raises:
        `ValueError`: If the YAML file is none, has no names or is of poses, a folder or picture is missing, no picture has a file of boxes,
            or a line of one is broken, has an unknown class or coordinates out of range: file and line are named.
    """
    file = Path(source) / "data.yaml" if Path(source).is_dir() else Path(source)
    document = _read_yaml(file)
    names = _names(document, file)
    given = {split: document[split] for split in ("train", *HELD_OUT) if document.get(split)}
    root = (file.parent / str(document.get("path") or "")).absolute()
    root = root if root.is_dir() else file.parent.absolute()
    read = {split: _read_split(root, entry, names, f"{file}: {split}") for split, entry in chosen_splits(given, file).items()}
    return DetectionData(read["train"], read.get("test", []), list(names.values()))


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(
            f"{file} is no YAML file of a data set ({' '.join(str(error).split())}): name the folder with data.yaml."
        ) from error
    if not isinstance(document, dict):
        raise ValueError(f"{file} must be a mapping with train, val and names; it holds {document!r:.80}.")
    if "kpt_shape" in document:
        raise ValueError(f"{file} is of poses (kpt_shape), whose lines are no boxes: export it for detection.")
    return document


def _names(document: dict[str, Any], file: Path) -> dict[int, str]:
    names = document.get("names")
    names = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{file} has no names: list the classes, such as names: [sofa, dog]; found {names!r:.80}.")
    for number, name in names.items():
        if type(number) is not int or type(name) not in (str, int) or not str(name).strip():
            raise ValueError(
                f"{file}: names must be words by whole numbers; found {number!r}: {name!r:.80}. Put a word such as no in quotes."
            )
    if len({str(name) for name in names.values()}) < len(names):
        raise ValueError(f"{file}: names has a class twice; found {list(names.values())!r:.200}.")
    if document.get("nc", len(names)) != len(names):
        raise ValueError(f"{file}: nc is {document['nc']!r}, but names has {len(names)} classes: correct one of them.")
    return {number: str(name) for number, name in names.items()}


def _read_split(root: Path, entry: Any, names: dict[int, str], field: str) -> list[AnnotatedImage]:
    entries = entry if isinstance(entry, list) else [entry]
    pictures = list(dict.fromkeys(picture for one in entries for picture in _pictures(root, one, field)))
    if not pictures:
        raise ValueError(f"{field} names no pictures ({', '.join(PICTURES)}); found {entry!r:.80} in {root}.")
    if not any(_label_file(picture).is_file() for picture in pictures):
        raise ValueError(
            f"{field}: none of its {len(pictures)} pictures has a file of boxes; that of {pictures[0]} would be {_label_file(pictures[0])}."
        )
    return [_read_picture(picture, names) for picture in tqdm(pictures, desc=field, leave=False, delay=2)]


def _pictures(root: Path, name: Any, field: str) -> Iterator[Path]:
    """Those of a folder or of a list, in their order."""
    path = root / str(name)
    if not path.exists() and str(name).startswith("../"):  # Roboflow writes such names, and ultralytics reads them so
        path = root / str(name)[3:]
    if path.is_dir():
        found = sorted(glob.glob(f"{glob.escape(str(path))}/**/*", recursive=True))  # which follows links, as ultralytics does
        yield from (file for file in map(Path, found) if file.suffix.lower() in PICTURES)
    elif path.suffix == ".txt" and path.is_file():
        for number, line in _lines(path):
            if not (picture := path.parent / line).is_file():
                raise ValueError(f"{path}, line {number}: {line} is not there: names are absolute or begin at {path.parent}.")
            yield picture
    else:
        raise ValueError(f"{field} must name a folder of pictures or a .txt file that lists them; found {name!r:.80}, and no {path}.")


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Numbered from 1, without the blank ones."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except ValueError as error:
        raise ValueError(f"{file} is no text in UTF-8 ({error}).") from error
    return ((number, line.strip()) for number, line in enumerate(lines, 1) if line.strip())


def _label_file(picture: Path) -> Path:
    before, images, after = str(picture).rpartition(f"{os.sep}images{os.sep}")
    return Path(f"{before}{os.sep}labels{os.sep}{after}" if images else picture).with_suffix(".txt")


def _read_picture(picture: Path, names: dict[int, str]) -> AnnotatedImage:
    file, size = _label_file(picture), picture_size(picture)
    boxes, labels = [], []
    for number, line in _lines(file) if file.is_file() else ():
        where = f"{file}, line {number}"
        try:
            kind, *values = map(float, line.split())
        except ValueError as error:
            raise ValueError(f"{where}: {line!r:.80} must be numbers: {_FORM}.") from error
        if len(values) != 4 and (len(values) < 6 or len(values) % 2):
            raise ValueError(f"{where}: {line!r:.80} has {len(values) + 1} numbers; it must be {_FORM}.")
        if kind not in names:
            raise ValueError(f"{where}: the class {line.split()[0]} is none of names, {min(names)} to {max(names)}.")
        if not all(0 <= value <= ROUNDED for value in values):
            raise ValueError(f"{where}: {line!r:.80} must hold shares of the picture's width and height, between 0 and 1, not pixels.")
        boxes.append(clipped_corners(_pixels(values, size), size, where))
        labels.append(names[int(kind)])
    return AnnotatedImage(str(picture), boxes, labels)


def _pixels(values: list[float], size: tuple[int, int]) -> list[float]:
    """x, y, width, height from the left upper corner, of a box by its middle or of a polygon's bounds, as far as it lies in the picture."""
    if len(values) > 4:
        (x, y), (right, bottom) = ((pick(values[::2]), pick(values[1::2])) for pick in (min, max))
    else:
        (x, right), (y, bottom) = ((middle - side / 2, middle + side / 2) for middle, side in zip(values[:2], values[2:], strict=True))
    x, y, right, bottom = (min(max(value, 0.0), 1.0) for value in (x, y, right, bottom))
    return [x * size[0], y * size[1], (right - x) * size[0], (bottom - y) * size[1]]
