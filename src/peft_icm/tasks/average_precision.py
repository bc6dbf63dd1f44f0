"""Average precision of detections, by COCO's own evaluation."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

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
        labels (`Sequence[str]`, *optional*): The classes that count; by default those of the references. Objects of others are ignored.

    Returns:
        `dict`: COCO's twelve numbers under the names that torchmetrics gives them: `map` (IoU 0.50 to 0.95), `map_50`, `map_75`,
        `map_small`, `map_medium`, `map_large`, `mar_1`, `mar_10`, `mar_100`, `mar_small`, `mar_medium`, `mar_large`; and `per_class`, with
        `map`, `map_50` and `map_75` of each label. A number with no reference to measure is -1, as in COCO.

    Raises:
        `ValueError`: If there are not as many predictions as references, boxes are not `[N, 4]`, or N differs within an image.

    Example:

    ```python
    >>> cat = {"boxes": [[10, 10, 50, 50]], "labels": ["cat"]}
    >>> result = mean_average_precision([{**cat, "scores": [0.9]}], [cat])
    >>> round(result["map"], 3), round(result["per_class"]["cat"]["map_50"], 3)
    (1.0, 1.0)

    ```
    """
    if len(predictions) != len(references):
        raise ValueError(f"There are {len(predictions)} predictions for {len(references)} references: give one of each for every image.")
    names = sorted(set(labels if labels is not None else (label for reference in references for label in reference["labels"])))
    categories = {name: index for index, name in enumerate(names, 1)}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        evaluation = COCOeval(
            _coco("references", references, categories, {"area": "area", "iscrowd": "iscrowd"}),
            _coco("predictions", predictions, categories, {"score": "scores"}),
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


def _coco(kind: str, rows: Sequence[Mapping[str, Any]], categories: Mapping[str, int], columns: Mapping[str, str]) -> COCO:
    """The rows as a COCO data set; `columns` are the numbers of an object beside its box, by COCO's name for them."""
    annotations: list[dict[str, Any]] = []
    for image, row in enumerate(rows):
        boxes = np.asarray(row["boxes"], dtype=float)
        boxes = boxes if boxes.size else boxes.reshape(0, 4)
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise ValueError(f"{kind}[{image}]: boxes must be [N, 4], xyxy in pixels; found the shape {list(boxes.shape)}.")
        corner, extent = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
        bbox = np.concatenate([corner, extent], 1).tolist()
        numbers = {"area": extent.prod(1), "iscrowd": np.zeros(len(boxes), dtype=int)}
        numbers |= {name: np.asarray(row[column]) for name, column in columns.items() if row.get(column) is not None}
        for name, length in {"labels": len(row["labels"]), **{columns.get(n, n): len(values) for n, values in numbers.items()}}.items():
            if length != len(boxes):
                raise ValueError(f"{kind}[{image}] has {len(boxes)} boxes and {length} {name}: each box needs one.")
        if "score" in columns and "score" not in numbers:
            raise ValueError(f"{kind}[{image}] has no scores: each box needs one.")
        values = [numbers[name].tolist() for name in numbers]
        for box, label, *rest in zip(bbox, row["labels"], *values, strict=True):
            if label in categories:
                own = {"id": len(annotations) + 1, "image_id": image, "category_id": categories[label], "bbox": box}
                annotations.append({**own, **dict(zip(numbers, rest, strict=True))})
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in range(len(rows))],
        "categories": [{"id": index, "name": name} for name, index in categories.items()],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco
