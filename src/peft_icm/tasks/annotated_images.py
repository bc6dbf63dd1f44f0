"""Annotated pictures: COCO files, data sets of the Hub, and crops of single objects."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import PIL.Image


@dataclass
class AnnotatedImage:
    """A picture and the objects in it.

    Args:
        image (`str` or `PIL.Image.Image`): A file, opened only when it is needed, or a picture.
        boxes (`list[list[float]]`): `[N, 4]`, xyxy in pixels.
        labels (`list[str]`): N labels.

    Example:

    ```python
    >>> AnnotatedImage(PIL.Image.new("L", (40, 30)), [[0, 0, 20, 30]], ["door"]).load().mode
    'RGB'

    ```
    """

    image: str | PIL.Image.Image
    boxes: list[list[float]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)

    def load(self) -> PIL.Image.Image:
        """The picture, in RGB.

        Raises:
            `ValueError`: If the file is no picture.
        """
        with self._opened() as picture:
            return picture.convert("RGB")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, read without decoding the picture; raises `ValueError` if the file is no picture."""
        with self._opened() as picture:
            return picture.size

    @contextmanager
    def _opened(self) -> Iterator[PIL.Image.Image]:
        if isinstance(self.image, PIL.Image.Image):
            yield self.image
            return
        try:
            with PIL.Image.open(self.image) as picture:
                yield picture
        except (OSError, SyntaxError) as error:  # SyntaxError is how Pillow reports a broken PNG
            raise ValueError(f"{self.image} is no picture that Pillow can read ({error}).") from error


def load_coco(annotations: str | os.PathLike[str], images: str | os.PathLike[str]) -> list[AnnotatedImage]:
    """Read a COCO instances file; crowds (`iscrowd`) are left out, images without objects are kept.

    Args:
        annotations (`str` or `Path`): The JSON file, such as `instances_train2017.json`.
        images (`str` or `Path`): The folder that its `file_name`s lie in.

    Returns:
        `list[AnnotatedImage]`: In the order of the file.

    Raises:
        `ValueError`: If the file is no COCO instances JSON, images are missing, an annotation names an unknown image or category, or a
            box is empty or more than a pixel outside its image.
    """
    try:
        document = json.loads(Path(annotations).read_text(encoding="utf-8"))
        entries = {entry["id"]: (entry["file_name"], (entry["width"], entry["height"])) for entry in document["images"]}
        categories = {entry["id"]: entry["name"] for entry in document["categories"]}
        objects = [(o["image_id"], o["category_id"], o["bbox"]) for o in document["annotations"] if not o.get("iscrowd")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{annotations} is no COCO instances file, {{"images": [...], "annotations": [...], "categories": [...]}} ({error!r}).'
        ) from error
    folder = Path(images)
    if missing := [name for name, _ in entries.values() if not (folder / name).is_file()]:
        raise ValueError(f"{len(missing)} of the {len(entries)} images of {annotations} are not in {folder}, the first is {missing[0]}.")
    found = {key: AnnotatedImage(str(folder / name)) for key, (name, _) in entries.items()}
    for image, category, bbox in objects:
        if image not in entries or category not in categories:
            unknown = f"category_id {category}" if image in entries else f"image_id {image}"
            raise ValueError(f"{annotations} has an annotation of {unknown}, which the file does not define.")
        found[image].boxes.append(_corners(bbox, entries[image][1], entries[image][0]))
        found[image].labels.append(categories[category])
    return list(found.values())


def from_dataset(dataset: datasets.Dataset) -> list[AnnotatedImage]:
    """Read a data set with the Hub's usual columns for object detection; its pictures are decoded into memory.

    Args:
        dataset (`datasets.Dataset`): Columns `image` and `objects`, `{"bbox": [[x, y, width, height], ...], "category": [...]}`, with
            categories of a `ClassLabel` or as strings.

    Returns:
        `list[AnnotatedImage]`

    Raises:
        `ValueError`: If the columns are others, or a box is empty or more than a pixel outside its image.
    """
    objects = dataset.features.get("objects")
    category = getattr(objects.get("category"), "feature", None) if isinstance(objects, dict) else None
    is_known = isinstance(category, datasets.ClassLabel) or category == datasets.Value("string")
    if not (is_known and isinstance(dataset.features.get("image"), datasets.Image)):
        raise ValueError(
            'The data set needs the columns image and objects {"bbox", "category"}, with categories of a ClassLabel or strings; '
            f"found {dataset.features}."
        )
    found = []
    for index, row in enumerate(dataset):
        boxes = [_corners(bbox, row["image"].size, f"image {index}") for bbox in row["objects"]["bbox"]]
        labels = row["objects"]["category"]
        found.append(AnnotatedImage(row["image"], boxes, category.int2str(labels) if isinstance(category, datasets.ClassLabel) else labels))
    return found


def _corners(bbox: Sequence[float], size: tuple[int, int], name: str) -> list[float]:
    """COCO's xywh as xyxy, clipped to the image."""
    x, y, width, height = bbox
    corners, limits = (x, y, x + width, y + height), (*size, *size)
    inside = all(-1 <= value <= limit + 1 for value, limit in zip(corners, limits, strict=True))
    # COCO itself has boxes a fraction of a pixel too large, and two (in train2017) that rounding left without any height.
    if not (inside and min(width, height) >= 0 and max(width, height) > 0):
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
            left, top = (max(0, round(value - edge)) for value in box[:2])
            right, bottom = (min(limit, round(value + edge)) for value, limit in zip(box[2:], picture.size, strict=True))
            found.append(picture.crop((left, top, right, bottom)))
    return found
