"""Annotated pictures: COCO files, data sets of the Hub, and crops of single objects."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image

from ..disk import inside
from ..pictures import open_picture, picture_size
from .fields import read_json, strings

if TYPE_CHECKING:
    import datasets

_ID, _NUMBER, _NAME, _BOX = "a number or a string", "a number", "a non-empty string", "four numbers (x, y, width, height)"
_CROWD, _OWN_ID = "0 or 1", "a number or a string, or left out"
COCO_FIELDS = {
    "images": {"id": _ID, "file_name": _NAME, "width": _NUMBER, "height": _NUMBER},
    "categories": {"id": _ID, "name": _NAME},
    "annotations": {"id": _OWN_ID, "image_id": _ID, "category_id": _ID, "bbox": _BOX, "iscrowd": _CROWD},
}
"""What the lists of a COCO instances file hold."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) > 1e300  # whole numbers know no bound


_IS: dict[str, Callable[[Any], bool]] = {
    _ID: lambda value: isinstance(value, str) or _is_number(value),
    _OWN_ID: lambda value: value is None or isinstance(value, str) or _is_number(value),
    _NUMBER: _is_number,
    _NAME: lambda value: isinstance(value, str) and bool(value.strip()),
    _BOX: lambda value: isinstance(value, list) and len(value) == 4 and all(map(_is_number, value)),
    _CROWD: lambda value: value is None or value in (0, 1),
}


@dataclass
class AnnotatedImage:
    """A picture and the objects in it.

    Args:
        image (`str` or `PIL.Image.Image`): A file, opened only when it is needed, or a picture.
        boxes (`list[list[float]]`): `[N, 4]`, xyxy in pixels of the picture as it is shown, turned by its EXIF data.
        labels (`list[str]`): N labels.

    Raises:
        `ValueError`: If the image is neither, a box is not four finite numbers `x1 <= x2, y1 <= y2`, a label is no string, or there are
            more of one than of the other.

    Example:

    ```python
    >>> AnnotatedImage(PIL.Image.new("L", (40, 30)), [[0, 0, 20, 30]], ["door"]).load().mode
    'RGB'

    ```
    """

    image: str | PIL.Image.Image
    boxes: list[list[float]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not isinstance(self.image, str | os.PathLike | PIL.Image.Image):
            raise ValueError(f"image={self.image!r:.80} must be a PIL image or the path of a picture's file.")
        self.labels = strings(self.labels, f"{self._name}: labels")
        try:
            self.boxes = [[float(value) for value in box] for box in self.boxes]
            ordered = all(-math.inf < x1 <= x2 < math.inf and -math.inf < y1 <= y2 < math.inf for x1, y1, x2, y2 in self.boxes)
        except (TypeError, ValueError, OverflowError):
            ordered = False
        if not ordered:
            raise ValueError(f"{self._name}: boxes must be lists of four numbers x1 <= x2, y1 <= y2; found {self.boxes!r:.80}.")
        if len(self.boxes) != len(self.labels):
            raise ValueError(f"{self._name} has {len(self.boxes)} boxes and {len(self.labels)} labels: each box needs one.")

    @property
    def _name(self) -> str:
        return "A picture" if isinstance(self.image, PIL.Image.Image) else str(self.image)

    def load(self) -> PIL.Image.Image:
        """The picture, in RGB, as [`open_picture`] reads it.

        Raises:
            `ValueError`: If the file is no picture.
        """
        return open_picture(self.image)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height as shown, read without decoding the picture; raises `ValueError` if the file is no picture."""
        return picture_size(self.image)


def load_coco(annotations: str | os.PathLike[str], images: str | os.PathLike[str]) -> list[AnnotatedImage]:
    """Read a COCO instances file; crowds (`iscrowd`) are left out, images without objects are kept.

    Args:
        annotations (`str` or `Path`): The JSON file, such as `instances_train2017.json`.
        images (`str` or `Path`): The folder that its `file_name`s lie in.

    Returns:
        `list[AnnotatedImage]`: In the order of the file.

    Raises:
        `ValueError`: If the file is no COCO instances JSON, two entries have one id or picture, images are missing, outside the folder or,
            as they are shown, of another size than the file says, an annotation names an unknown image or category, or a box is empty or
            more than a pixel outside its image.
    """
    refusal = f"{annotations} is no COCO instances file"
    document = read_json(annotations, f'{refusal}, {{"images": [...], "annotations": [...], "categories": [...]}}')
    rows = {key: _coco_rows(document, key, refusal) for key in COCO_FIELDS}
    categories = {row["id"]: row["name"] for row in rows["categories"]}
    try:
        files = {row["id"]: inside(images, row["file_name"]) for row in rows["images"]}
    except ValueError as error:
        raise ValueError(f"{annotations}: each file_name must be that of a file inside {images} ({error})") from error
    if len(set(files.values())) < len(files):
        twice = next(row["file_name"] for row in rows["images"] if list(files.values()).count(files[row["id"]]) > 1)
        raise ValueError(f"{annotations} has two images with the file_name {twice!r}: give each picture one entry, with all its boxes.")
    if missing := [row["file_name"] for row in rows["images"] if not files[row["id"]].is_file()]:
        raise ValueError(f"{len(missing)} of the {len(files)} images of {annotations} are not in {images}, the first is {missing[0]}.")
    sizes = {}
    for row in rows["images"]:
        sizes[row["id"]] = picture_size(files[row["id"]])
        _check_size((row["width"], row["height"]), sizes[row["id"]], f"{annotations}: {row['file_name']}")
    names = {row["id"]: f"{annotations}: {row['file_name']}" for row in rows["images"]}
    boxes: dict[Any, list[list[float]]] = {number: [] for number in files}
    labels: dict[Any, list[str]] = {number: [] for number in files}
    for row in rows["annotations"]:
        if row.get("iscrowd"):
            continue
        for key, known in (("image_id", files), ("category_id", categories)):
            if row[key] not in known:
                raise ValueError(f"{annotations} has an annotation of {key} {row[key]!r}, which the file does not define.")
        image = row["image_id"]
        boxes[image].append(clipped_corners(row["bbox"], sizes[image], names[image]))
        labels[image].append(categories[row["category_id"]])
    return [AnnotatedImage(str(file), boxes[number], labels[number]) for number, file in files.items()]


def _coco_rows(document: Mapping[str, Any], key: str, refusal: str) -> list[dict[str, Any]]:
    """One of the lists of a COCO file, its fields checked."""
    rows = document.get(key)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{refusal}: {key} must be a list of objects; found {rows!r:.80}.")
    seen = set()
    for place, row in enumerate(rows):
        for name, allowed in COCO_FIELDS[key].items():
            if not _IS[allowed](row.get(name)):
                raise ValueError(f"{refusal}: {name} of {key}[{place}] must be {allowed}; found {row.get(name)!r:.80}.")
        if row.get("id") in seen:
            raise ValueError(f"{refusal}: two of its {key} have the id {row['id']!r}. Files that are joined need ids of their own.")
        if row.get("id") is not None:
            seen.add(row["id"])
    return rows


def _check_size(said: tuple[Any, Any], size: tuple[int, int], name: str) -> None:
    """Boxes of a picture that is stored otherwise, or of another size, would lie beside their objects."""
    if said != size:
        raise ValueError(
            f"{name} is said to have {said[0]} x {said[1]} pixels, but is shown with {size[0]} x {size[1]}: correct the sizes and boxes or,"
            " if they are of the picture before EXIF turns it, remove its EXIF orientation."
        )


def from_dataset(dataset: datasets.Dataset, folder: Path | None = None) -> list[AnnotatedImage]:
    """Read a data set with the Hub's usual columns for object detection.

    Args:
        dataset (`datasets.Dataset`): Columns `image` and `objects`, `{"bbox": [[x, y, width, height], ...], "category": [...]}`, with
            categories of a `ClassLabel` or as strings; `width` and `height`, where it has them, are compared to the picture's.
        folder (`Path`, *optional*): A new folder that pictures are written to, byte by byte; those that are files of this machine stay
            where they are. By default all are decoded into memory.

    Returns:
        `list[AnnotatedImage]`

    Raises:
        `ValueError`: If the columns are others or hold no value, two rows have one `image_id`, a picture is of another size than the row
            says, or a box is empty or more than a pixel outside its image.
    """
    import datasets

    category = category_of(dataset)
    dataset = dataset.with_format(None)
    dataset = dataset.cast_column("image", datasets.Image(decode=False)) if folder else dataset
    found, seen = [], set()
    for index, row in enumerate(dataset):
        boxes, labels = (row["objects"] or {}).get("bbox"), (row["objects"] or {}).get("category")
        if not (row["image"] and isinstance(boxes, list) and isinstance(labels, list) and all(map(_IS[_BOX], boxes))):
            raise ValueError(f"image {index} must be a picture with lists of bbox, {_BOX}, and category; found {row['objects']!r:.200}.")
        if len(boxes) != len(labels):
            raise ValueError(f"image {index} has {len(boxes)} boxes and {len(labels)} categories: each box needs one.")
        if isinstance(category, datasets.ClassLabel):
            if not all(isinstance(label, int) and 0 <= label < category.num_classes for label in labels):
                raise ValueError(f"image {index} has the categories {labels!r:.80}: each must be one of 0 to {category.num_classes - 1}.")
            labels = category.int2str(labels)
        if row.get("image_id") in seen:
            raise ValueError(f"image {index}: a second row has the image_id {row['image_id']!r}.")
        if row.get("image_id") is not None:
            seen.add(row["image_id"])
        image = _file(row["image"], folder / f"{index:06d}") if folder else row["image"]
        size = picture_size(image)
        if row.get("width") is not None and row.get("height") is not None:
            _check_size((row["width"], row["height"]), size, f"image {index}")
        found.append(AnnotatedImage(image, [clipped_corners(bbox, size, f"image {index}") for bbox in boxes], labels))
    return found


def category_of(dataset: datasets.Dataset) -> datasets.ClassLabel | datasets.Value:
    """The feature of a data set's categories; `ValueError` if its columns are not those of [`from_dataset`]."""
    import datasets

    features = getattr(dataset, "features", None)
    features = features if isinstance(features, Mapping) else {}  # a DatasetDict has none: its splits have
    objects = features.get("objects")
    category = getattr(objects.get("category"), "feature", None) if isinstance(objects, dict) else None
    is_known = isinstance(category, datasets.ClassLabel) or category == datasets.Value("string")
    if not (is_known and isinstance(features.get("image"), datasets.Image)):
        raise ValueError(
            'The data set needs the columns image and objects {"bbox", "category"}, with categories of a ClassLabel or strings; '
            f"found {dict(features) or type(dataset).__name__}."
        )
    return category


def _file(image: Mapping[str, Any], target: Path) -> str:
    """The file of a picture that is not decoded: its own, or one that its bytes are written to."""
    if image["bytes"] is None:
        return str(image["path"])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(image["bytes"])
    return str(target)


def clipped_corners(bbox: Sequence[float], size: tuple[int, int], name: str) -> list[float]:
    """COCO's box as corners, clipped to the image.

    Args:
        bbox (`Sequence[float]`): x, y, width, height in pixels.
        size (`tuple[int, int]`): Width and height of the image.
        name (`str`): Of the image, for the message.

    Returns:
        `list[float]`: x1, y1, x2, y2.

    Raises:
        `ValueError`: If the box is empty or more than a pixel outside its image.

    Example:

    ```python
    >>> clipped_corners([-0.5, 3, 20, 5], (80, 40), "a.jpg")
    [0.0, 3.0, 19.5, 8.0]

    ```
    """
    x, y, width, height = bbox
    corners, limits = (x, y, x + width, y + height), (*size, *size)
    within = all(-1 <= value <= limit + 1 for value, limit in zip(corners, limits, strict=True))
    # COCO itself has boxes a fraction of a pixel too large, and two (in train2017) that rounding left without any height.
    if not (within and min(width, height) >= 0 and max(width, height) > 0):
        raise ValueError(
            f"{name}: the box {list(bbox)} (x, y, width, height) is empty or outside its image of {size[0]} x {size[1]} pixels."
        )
    return [min(max(float(value), 0.0), float(limit)) for value, limit in zip(corners, limits, strict=True)]


def crops(images: Sequence[AnnotatedImage], label: str, count: int | None = None, margin: float = 0.15) -> list[PIL.Image.Image]:
    """Pictures of single objects of one class, cut out of annotated ones: what a task encoder sees of a class.

    Args:
        images (`Sequence[AnnotatedImage]`): In this order.
        label (`str`): The class.
        count (`int`, *optional*): So many at the most.
        margin (`float`, defaults to 0.15): What is left around a box, as a share of its longer side.

    Returns:
        `list[PIL.Image.Image]`: In RGB.

    Example:

    ```python
    >>> scene = AnnotatedImage(PIL.Image.new("RGB", (100, 100)), [[0, 0, 20, 40], [50, 50, 60, 60]], ["door", "knob"])
    >>> [picture.size for picture in crops([scene], "door")]
    [(26, 46)]

    ```
    """
    found: list[PIL.Image.Image] = []
    for image in images:
        for box, name in zip(image.boxes, image.labels, strict=True):
            if name != label:
                continue
            if len(found) == count:
                return found
            picture, edge = image.load(), margin * max(box[2] - box[0], box[3] - box[1])
            # At least a pixel, of boxes that rounding left without any height too.
            left, top = (min(max(0, round(value - edge)), limit - 1) for value, limit in zip(box[:2], picture.size, strict=True))
            right, bottom = (min(limit, round(value + edge)) for value, limit in zip(box[2:], picture.size, strict=True))
            found.append(picture.crop((left, top, max(right, left + 1), max(bottom, top + 1))))
    return found
