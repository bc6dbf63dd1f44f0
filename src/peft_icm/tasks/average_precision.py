"""Average precision of detections, by COCO's own evaluation."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .fields import strings

if TYPE_CHECKING:
    from pycocotools.coco import COCO

# In the order of COCOeval's stats.
SUMMARY = [
    "map", "map_50", "map_75", "map_small", "map_medium", "map_large",
    "mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large",
]  # fmt: skip


def mean_average_precision(
    predictions: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]], labels: Sequence[str] | None = None
) -> dict[str, Any]:
    """COCO's mean average precision.

    Args:
        predictions (`Sequence[Mapping]`): For each image `boxes` (`[N, 4]`, xyxy in pixels), `labels` (N strings) and `scores` (N
            numbers), as [`detect`] gives them.
        references (`Sequence[Mapping]`): For each image `boxes` and `labels`, and optionally `iscrowd` (N times 0 or 1) and `area` (N
            numbers; by default the boxes').
        labels (`Sequence[str]` or `str`, *optional*): The classes that count; by default those of the references. Objects of others are
            ignored.

    Returns:
        `dict`: COCO's twelve numbers under the names that torchmetrics gives them: `map` (IoU 0.50 to 0.95), `map_50`, `map_75`,
        `map_small`, `map_medium`, `map_large`, `mar_1`, `mar_10`, `mar_100`, `mar_small`, `mar_medium`, `mar_large`; and `per_class`, with
        `map`, `map_50` and `map_75` of each label. A number with no reference to measure is -1, as in COCO.

    Raises:
        `ValueError`: If there are not as many predictions as references, boxes are not `[N, 4]`, those of a reference not x1 <= x2 and
            y1 <= y2, N differs within an image, a label is no string, or a number is not finite.

    Example:

    ```python
    >>> cat = {"boxes": [[10, 10, 50, 50]], "labels": ["cat"]}
    >>> result = mean_average_precision([{**cat, "scores": [0.9]}], [cat])
    >>> round(result["map"], 3), round(result["per_class"]["cat"]["map_50"], 3)
    (1.0, 1.0)

    ```
    """
    from pycocotools.cocoeval import COCOeval

    for kind, rows in (("predictions", predictions), ("references", references)):
        if not isinstance(rows, Sequence):
            raise ValueError(f"{kind} must be a list of dicts, one for each image; found {rows!r:.80}.")
    if len(predictions) != len(references):
        raise ValueError(f"There are {len(predictions)} predictions for {len(references)} references: give one of each for every image.")
    found = [_checked("predictions", image, row, ("scores",)) for image, row in enumerate(predictions)]
    truth = [_checked("references", image, row, ("area", "iscrowd")) for image, row in enumerate(references)]
    for image, row in enumerate(truth):
        _check_reference(f"references[{image}]", row)
    names = sorted({label for row in truth for label in row["labels"]} if labels is None else set(strings(labels, "labels")))
    categories = {name: index for index, name in enumerate(names, 1)}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        evaluation = COCOeval(
            _coco(truth, categories),
            _coco(found, categories),
            "bbox",
        )
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][..., 0, -1]  # [IoU threshold, recall, class] for all areas and 100 detections

    def mean(values: np.ndarray) -> float:
        known = values[values > -1]
        return float(known.mean()) if known.size else -1.0

    per_class = {
        name: {"map": mean(precision[..., k]), "map_50": mean(precision[0, :, k]), "map_75": mean(precision[5, :, k])}
        for k, name in enumerate(names)
    }
    return {**dict(zip(SUMMARY, evaluation.stats.tolist(), strict=True)), "per_class": per_class}


def _checked(kind: str, image: int, row: Mapping[str, Any], numbers: Sequence[str]) -> dict[str, Any]:
    """Boxes, labels and what each box has a number of, `scores` always, `area` and `iscrowd` by default the boxes' area and 0."""
    name = f"{kind}[{image}]"
    if not isinstance(row, Mapping) or not {"boxes", "labels"} <= row.keys():
        raise ValueError(f"{name} must be a dict of boxes and labels; found {row!r:.80}.")
    boxes = _numbers(row["boxes"], f"{name}: boxes")
    boxes = boxes if boxes.size else boxes.reshape(0, 4)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{name}: boxes must be [N, 4], xyxy in pixels; found the shape {list(boxes.shape)}.")
    extent = boxes[:, 2:] - boxes[:, :2]
    labels = strings(row["labels"], f"{name}: labels", blank=kind == "predictions")  # a model may find a thing and not name it
    checked: dict[str, Any] = {"bbox": np.concatenate([boxes[:, :2], extent], 1), "labels": labels}
    checked |= {"area": extent.prod(1), "iscrowd": np.zeros(len(boxes))}
    checked |= {key: _numbers(row[key], f"{name}: {key}") for key in numbers if row.get(key) is not None}
    if "scores" in numbers and "scores" not in checked:
        raise ValueError(f"{name} has no scores: each box needs one.")
    for key, values in checked.items():
        if np.shape(values)[:1] != (len(boxes),) or np.ndim(values) != (2 if key == "bbox" else 1):
            raise ValueError(
                f"{name} has {len(boxes)} boxes and {np.size(values)} {key} of shape {list(np.shape(values))}: each box needs one."
            )
    return checked


def _check_reference(name: str, row: Mapping[str, Any]) -> None:
    """What is true is a box; a model may answer any four numbers, which then match nothing."""
    for box, area, crowd in zip(row["bbox"], row["area"], row["iscrowd"], strict=True):
        if min(box[2:]) < 0 or area < 0 or crowd not in (0, 1):
            raise ValueError(
                f"{name}: boxes must be xyxy with x1 <= x2 and y1 <= y2, area at least 0, iscrowd 0 or 1; found the width {box[2]:g}, the"
                f" height {box[3]:g}, the area {area:g} and iscrowd {crowd:g}."
            )


def _numbers(values: Any, name: str) -> np.ndarray:
    """An array of finite numbers in fp64."""
    try:
        found = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # lists of unequal lengths, tensors of another device or dtype
        raise ValueError(f"{name} must be an array of numbers on the CPU; {error}") from error
    if found.dtype.kind not in "biuf" or not np.isfinite(found).all():
        raise ValueError(f"{name} must be finite numbers; found {values!r:.80}.")
    return found.astype(float)


def _coco(rows: Sequence[Mapping[str, Any]], categories: Mapping[str, int]) -> COCO:
    """The rows as a COCO data set."""
    from pycocotools.coco import COCO

    annotations: list[dict[str, Any]] = []
    for image, row in enumerate(rows):
        columns = {"bbox": row["bbox"], "area": row["area"], "iscrowd": row["iscrowd"].astype(int)}
        columns |= {"score": row["scores"]} if "scores" in row else {}
        for label, *values in zip(row["labels"], *(column.tolist() for column in columns.values()), strict=True):
            if label in categories:
                own = {"id": len(annotations) + 1, "image_id": image, "category_id": categories[label]}
                annotations.append({**own, **dict(zip(columns, values, strict=True))})
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in range(len(rows))],
        "categories": [{"id": index, "name": name} for name, index in categories.items()],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco
