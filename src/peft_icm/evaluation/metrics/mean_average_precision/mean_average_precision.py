"""COCO's mean average precision of detections."""

from collections.abc import Mapping

import datasets
import evaluate

from peft_icm.tasks.average_precision import mean_average_precision
from peft_icm.tasks.fields import strings

_DESCRIPTION = """
Mean average precision over the IoU thresholds 0.50 to 0.95, for all classes and for each, computed by pycocotools' COCOeval.
"""
_KWARGS = """
Args:
    predictions (list of dict): for each image `boxes` ([N, 4], xyxy in pixels), `labels` (N strings) and `scores` (N numbers).
    references (list of dict): for each image `boxes` and `labels`, and optionally `iscrowd` and `area` (N numbers).
    labels (list of str, optional): the classes that count; by default those of the references.
Returns:
    map, map_50, map_75, map_small, map_medium, map_large (float): average precision; -1 where there is nothing to measure.
    mar_1, mar_10, mar_100, mar_small, mar_medium, mar_large (float): average recall.
    per_class (dict): map, map_50 and map_75 of each label.
"""

_PREDICTION, _REFERENCE = {"boxes", "labels", "scores"}, {"boxes", "labels"}
_OPTIONAL = {"iscrowd", "area"}  # features know no optional keys, only keys without a value


def _image(row, needed, optional=frozenset()):
    """What the features name of an image's dict; a label alone is a list of one, not of its letters."""
    if not isinstance(row, Mapping) or not needed <= row.keys():
        raise ValueError(f"predictions and references must be lists of dicts with {', '.join(sorted(needed))}; found {row!r:.80}.")
    return {**{name: row.get(name) for name in needed | optional}, "labels": strings(row["labels"], "labels")}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS)
class MeanAveragePrecision(evaluate.Metric):
    """See `_DESCRIPTION`."""

    def _info(self):
        number = datasets.Value("float64")
        found = {"boxes": datasets.Sequence(datasets.Sequence(number)), "labels": datasets.Sequence(datasets.Value("string"))}
        prediction = {**found, "scores": datasets.Sequence(number)}
        optional = {"iscrowd": datasets.Sequence(datasets.Value("int64")), "area": datasets.Sequence(number)}
        features = datasets.Features({"predictions": prediction, "references": {**found, **optional}})
        return evaluate.MetricInfo(description=_DESCRIPTION, citation="", inputs_description=_KWARGS, features=features)

    def add(self, *, prediction=None, reference=None, **kwargs):
        """Add one image."""
        super().add(prediction=_image(prediction, _PREDICTION), reference=_image(reference, _REFERENCE, _OPTIONAL), **kwargs)

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Add several images."""
        found = [_image(row, _PREDICTION) for row in predictions]
        super().add_batch(predictions=found, references=[_image(row, _REFERENCE, _OPTIONAL) for row in references], **kwargs)

    def _compute(self, predictions, references, labels=None):
        return mean_average_precision(predictions, references, labels)
