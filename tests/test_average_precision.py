"""Average precision: COCO's own numbers, and a case by hand."""

import contextlib
import io

import evaluate
import numpy as np
import pytest
import torch
import torchvision
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from peft_icm.evaluation.metrics import metric_path
from peft_icm.tasks.average_precision import SUMMARY, mean_average_precision

LABELS = ["cat", "dog", "sofa"]
CAT = {"boxes": [[10.0, 10.0, 50.0, 50.0]], "labels": ["cat"]}
NOTHING = {"boxes": torch.zeros(0, 4), "labels": [], "scores": torch.zeros(0)}


def random_case(images=40, seed=0):
    """Shifted copies of the references and boxes at random, with ties of scores; a tenth of the references are crowds."""
    numbers = np.random.default_rng(seed)
    references, predictions = [], []
    for _ in range(images):
        count = numbers.integers(0, 6)
        corner, extent = numbers.uniform(0, 200, (count, 2)), numbers.uniform(4, 150, (count, 2))
        boxes = np.concatenate([corner, corner + extent], 1)
        labels = numbers.choice(LABELS, count).tolist()
        area = (extent.prod(1) * 0.7).tolist()  # of a mask: less than the box
        references.append({"boxes": boxes, "labels": labels, "iscrowd": numbers.integers(0, 10, count) // 9, "area": area})
        moved = boxes + numbers.normal(0, 4, boxes.shape)
        stray = numbers.uniform(0, 100, (3, 4)) + np.array([0, 0, 100, 100])
        found = torch.tensor(np.concatenate([moved, moved, stray]))
        scores = torch.tensor(numbers.integers(1, 5, len(found)) / 5)
        names = [*labels, *labels, "cat", "sofa", "unicorn"]
        predictions.append({"boxes": found, "labels": names, "scores": scores})
    return predictions, references


def by_coco(predictions, references):
    """COCOeval through its own loadRes, as its documentation has it."""
    truth, found = [], []
    for image, (prediction, reference) in enumerate(zip(predictions, references, strict=True), 1):
        for box, label, crowd, area in zip(*(reference[k] for k in ("boxes", "labels", "iscrowd", "area")), strict=True):
            x, y, right, bottom = box.tolist()
            own = {"category_id": LABELS.index(label) + 1, "bbox": [x, y, right - x, bottom - y], "iscrowd": int(crowd), "area": area}
            truth.append({"id": len(truth) + 1, "image_id": image, **own})
        for box, label, score in zip(prediction["boxes"].tolist(), prediction["labels"], prediction["scores"].tolist(), strict=True):
            if label in LABELS:
                x, y, right, bottom = box
                bbox = [x, y, right - x, bottom - y]
                found.append({"image_id": image, "category_id": LABELS.index(label) + 1, "bbox": bbox, "score": score})
    coco = COCO()
    categories = [{"id": index, "name": label} for index, label in enumerate(LABELS, 1)]
    coco.dataset = {"images": [{"id": i + 1} for i in range(len(references))], "categories": categories, "annotations": truth}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def test_all_twelve_numbers_and_each_class_are_cocos_own():
    predictions, references = random_case()
    result, expected = mean_average_precision(predictions, references), by_coco(predictions, references)
    assert [result[name] for name in SUMMARY] == pytest.approx(expected.stats.tolist(), abs=1e-12)
    assert 0.05 < result["map"] < 0.95 and result["map_50"] > result["map"]
    for index, label in enumerate(LABELS):
        precision = expected.eval["precision"][:, :, index, 0, 2]
        assert result["per_class"][label] == pytest.approx(
            {"map": precision.mean(), "map_50": precision[0].mean(), "map_75": precision[5].mean()}
        )
    assert list(result["per_class"]) == LABELS


def test_by_hand():
    """Two references; found with precision 1 at recall 1/2, then a miss, then 2/3 at recall 1; the second box has an IoU of 0.6."""
    reference = {"boxes": [[0, 0, 100, 100], [200, 0, 300, 100]], "labels": ["cat", "cat"]}
    boxes = [[0, 0, 100, 100], [400, 0, 500, 100], [200, 0, 300, 60]]
    result = mean_average_precision([{"boxes": boxes, "labels": ["cat"] * 3, "scores": [0.9, 0.8, 0.7]}], [reference])
    half, full = 51 / 101, 51 / 101 + 50 / 101 * 2 / 3  # of 101 recall points, 51 are at most 1/2
    assert result["map_50"] == pytest.approx(full)
    assert result["map_75"] == pytest.approx(half)
    assert result["map"] == pytest.approx((3 * full + 7 * half) / 10)  # thresholds 0.50, 0.55 and 0.60 count the second


def by_definition(predictions, references, label, threshold):
    """Average precision of one class without pycocotools: greedy matches by score, precision at 101 recalls from the right-hand maximum."""
    hits, total = [], sum(reference["labels"].count(label) for reference in references)
    for prediction, reference in zip(predictions, references, strict=True):
        truth = torch.tensor([box for box, name in zip(reference["boxes"], reference["labels"], strict=True) if name == label])
        free = torch.ones(len(truth), dtype=torch.bool)
        rows = zip(prediction["scores"], prediction["boxes"], prediction["labels"], strict=True)
        for score, box, name in sorted(rows, key=lambda row: -row[0]):
            if name == label:
                overlaps = torchvision.ops.box_iou(torch.tensor([box]), truth.view(-1, 4))[0] * free
                hit = bool(len(overlaps)) and bool(overlaps.max() >= threshold)
                if hit:
                    free[overlaps.argmax()] = False
                hits.append((score, hit))
    found = torch.tensor([hit for _, hit in sorted(hits, key=lambda pair: -pair[0])]).cumsum(0)
    recall, precision = found / total, found / torch.arange(1, len(found) + 1)
    return (
        sum(float(precision[recall >= point / 100 - 1e-6].max()) if recall[-1] >= point / 100 - 1e-6 else 0 for point in range(101)) / 101
    )


def test_average_precision_by_its_definition():
    numbers = np.random.default_rng(3)
    predictions, references = [], []
    for _ in range(6):
        corner = numbers.uniform(0, 300, (4, 2))
        boxes = np.concatenate([corner, corner + numbers.uniform(40, 90, (4, 2))], 1)
        labels = ["cat", "cat", "dog", "dog"]
        references.append({"boxes": boxes.tolist(), "labels": labels})
        moved = np.concatenate([boxes + numbers.normal(0, 4, boxes.shape), boxes + numbers.normal(0, 12, boxes.shape)])
        scores = numbers.permutation(8) / 10 + numbers.uniform(0, 0.1, 8)
        predictions.append({"boxes": moved.tolist(), "labels": labels * 2, "scores": scores.tolist()})
    per_class = mean_average_precision(predictions, references)["per_class"]
    for label in ("cat", "dog"):
        steps = [by_definition(predictions, references, label, 0.5 + 0.05 * step) for step in range(10)]
        assert per_class[label] == pytest.approx({"map": sum(steps) / 10, "map_50": steps[0], "map_75": steps[5]}, abs=1e-5)
        assert 0.1 < per_class[label]["map"] < per_class[label]["map_50"] < 1


def test_the_score_decides_which_of_two_comes_first():
    boxes, labels = [*CAT["boxes"], [100.0, 100.0, 150.0, 150.0]], ["cat", "cat"]
    good = mean_average_precision([{"boxes": boxes, "labels": labels, "scores": [0.9, 0.1]}], [CAT])
    bad = mean_average_precision([{"boxes": boxes, "labels": labels, "scores": [0.1, 0.9]}], [CAT])
    assert good["map"] == pytest.approx(1.0) and bad["map"] == pytest.approx(0.5)


def test_no_predictions_is_zero_and_no_references_is_not_measured():
    assert mean_average_precision([NOTHING, NOTHING], [CAT, CAT])["map"] == 0.0
    assert mean_average_precision([{**NOTHING, "boxes": []}], [CAT])["per_class"]["cat"] == {"map": 0.0, "map_50": 0.0, "map_75": 0.0}
    assert mean_average_precision([{**CAT, "scores": [1.0]}], [NOTHING])["map"] == -1.0


def test_a_class_without_references_is_ignored():
    extra = {"boxes": [*CAT["boxes"], [0.0, 0.0, 9.0, 9.0]], "labels": ["cat", "dog"], "scores": [0.5, 0.9]}
    assert mean_average_precision([extra], [CAT])["map"] == pytest.approx(1.0)


def test_labels_choose_the_classes_that_count():
    reference = {"boxes": [*CAT["boxes"], [100.0, 100.0, 150.0, 150.0]], "labels": ["cat", "dog"]}
    prediction = {**CAT, "scores": [0.5]}
    assert mean_average_precision([prediction], [reference])["map"] == pytest.approx(0.5)
    only = mean_average_precision([prediction], [reference], labels=["cat"])
    assert only["map"] == pytest.approx(1.0) and list(only["per_class"]) == ["cat"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": [[1, 2, 3]]}, r"predictions\[0\]: boxes must be \[N, 4\], xyxy in pixels; found the shape \[1, 3\]"),
        ({"boxes": [1, 2, 3, 4]}, r"found the shape \[4\]"),
        ({"scores": None}, r"predictions\[0\] has no scores"),
        ({"scores": [0.5, 0.5]}, r"predictions\[0\] has 1 boxes and 2 scores"),
        ({"labels": []}, r"predictions\[0\] has 1 boxes and 0 labels"),
        ({"scores": [float("nan")]}, r"predictions\[0\]: scores must be finite numbers"),
        ({"scores": [float("inf")]}, r"predictions\[0\]: scores must be finite numbers"),
        ({"scores": ["0.5"]}, r"predictions\[0\]: scores must be finite numbers"),
        ({"scores": 0.5}, r"predictions\[0\] has 1 boxes and 1 scores of shape \[\]"),
        ({"scores": [[0.5]]}, r"predictions\[0\] has 1 boxes and 1 scores of shape \[1, 1\]"),
        ({"boxes": [[1, 2, 3, float("nan")]]}, r"predictions\[0\]: boxes must be finite numbers"),
        ({"boxes": [[1, 2, 3, 4], [1]]}, r"predictions\[0\]: boxes must be an array of numbers"),
        ({"boxes": None}, r"predictions\[0\]: boxes must be finite numbers"),
        ({"labels": [3]}, r"predictions\[0\]: labels must be a list of strings; found 3"),
        ({"labels": None}, r"predictions\[0\]: labels must be a list of strings; found None"),
    ],
)
def test_what_is_no_prediction_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        mean_average_precision([{**CAT, "scores": [0.5], **change}], [CAT])


@pytest.mark.parametrize(
    "change",
    [{"boxes": [[50, 10, 10, 50]]}, {"iscrowd": [2]}, {"area": [-1]}, {"area": [float("nan")]}, {"iscrowd": ["0"]}, {"labels": [None]}],
)
def test_what_is_no_reference_is_refused(change):
    with pytest.raises(ValueError, match=r"references\[0\]"):
        mean_average_precision([{**CAT, "scores": [0.5]}], [{**CAT, **change}])


@pytest.mark.parametrize("rows", [None, {**CAT, "scores": [0.5]}, [None], "ab", [{"boxes": [[0, 0, 1, 1]]}]])
def test_what_is_no_list_of_images_is_refused(rows):
    for predictions, references in ((rows, [CAT, CAT][: len(rows or [])]), ([NOTHING] * len(rows or []), rows)):
        with pytest.raises(ValueError, match=r"must be a (list of dicts|dict of boxes)"):
            mean_average_precision(predictions, references)


def test_one_label_is_a_list_of_one():
    boxes, scores = [[0, 0, 10, 10], [20, 20, 40, 40], [50, 50, 90, 90]], [0.9, 0.8, 0.7]
    cats = {"boxes": boxes, "labels": ["cat"] * 3, "scores": scores}
    assert list(mean_average_precision([cats], [cats], labels="cat")["per_class"]) == ["cat"]
    with pytest.raises(ValueError, match="3 boxes and 1 labels"):
        mean_average_precision([{**cats, "labels": "cat"}], [cats])
    metric = evaluate.load(metric_path("mean_average_precision"))
    assert list(metric.compute(predictions=[cats], references=[cats], labels="cat")["per_class"]) == ["cat"]
    with pytest.raises(ValueError, match="3 boxes and 1 labels"):
        metric.compute(predictions=[{**cats, "labels": "cat"}], references=[cats])
    with pytest.raises(ValueError, match="must be lists of dicts"):
        evaluate.load(metric_path("mean_average_precision")).compute(predictions=["a"], references=["b"])


def test_predictions_and_references_must_be_of_the_same_images():
    with pytest.raises(ValueError, match="There are 1 predictions for 2 references"):
        mean_average_precision([NOTHING], [CAT, CAT])
    with pytest.raises(ValueError, match=r"references\[0\] has 1 boxes and 2 iscrowd"):
        mean_average_precision([NOTHING], [{**CAT, "iscrowd": [0, 0]}])


def test_nothing_is_printed(capsys):
    mean_average_precision([NOTHING], [CAT])
    assert capsys.readouterr().out == ""


def test_through_evaluate_with_and_without_crowds_and_areas():
    predictions, references = random_case(6)
    metric = evaluate.load(metric_path("mean_average_precision"))
    assert metric.compute(predictions=predictions, references=references) == mean_average_precision(predictions, references)
    plain = [{"boxes": reference["boxes"], "labels": reference["labels"]} for reference in references]
    only = metric.compute(predictions=predictions, references=plain, labels=["dog"])
    assert only == mean_average_precision(predictions, plain, labels=["dog"])
    for prediction, reference in zip(predictions, plain, strict=True):
        metric.add(prediction=prediction, reference=reference)
    assert metric.compute()["map"] == mean_average_precision(predictions, plain)["map"]


def test_what_a_model_finds_and_does_not_name_is_no_class():
    box = {"boxes": [[0, 0, 10, 10]], "labels": ["cat"]}
    found = {"boxes": [[0, 0, 10, 10], [1, 1, 5, 5]], "labels": ["cat", ""], "scores": [0.9, 0.95]}
    assert mean_average_precision([found], [box])["map_50"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="non-empty strings"):
        mean_average_precision([found], [{**box, "labels": [""]}])
