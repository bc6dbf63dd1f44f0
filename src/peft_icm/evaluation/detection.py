"""Detection in the report: average precision of one class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..generator.modeling_icm import ICMGenerator
from ..launching.arguments import HERE, LaunchArguments
from ..tasks.annotated_images import AnnotatedImage, crops
from ..tasks.average_precision import mean_average_precision
from ..tasks.detection import DetectionTask, detect
from .report import VARIANTS, Report, rounded, share_of

METRICS = ("map", "map_50", "map_75")

Precision = dict[str, float]


class DetectionEvaluation(Report[Precision]):
    """A [`Report`] of one-class detection: scores are `map`, `map_50` and `map_75` of each task's class, gains are in AP50."""

    unit = "AP50"
    heading = "AP50 / AP75"
    shown = ("{map_50:.2f}", "{map_75:.2f}")

    @staticmethod
    def tested_on(task: DetectionTask) -> tuple[str, Sequence[AnnotatedImage]]:
        """Its test images of the class; those without are scored too."""
        return f"test images of a {task.label!r}", [image for image in task.test_images if task.label in image.labels]

    @staticmethod
    def score(model: Any, processor: Any, task: DetectionTask, **options: Any) -> Precision:
        """Over all test images; `options` are those of [`detect`]."""
        found = detect(model, processor, task.test_images, prompt=task.prompt, progress=False, **options)
        return class_precision(task.named(found), task.test_images, task.label)

    @staticmethod
    def pool(scores: Sequence[Precision]) -> Precision:
        """The means."""
        return {metric: sum(score[metric] for score in scores) / len(scores) for metric in METRICS}

    @staticmethod
    def numbers(score: Precision) -> Precision:
        """`map`, `map_50`, `map_75` and `gain`, which is AP50."""
        return {**score, "gain": score["map_50"]}

    @staticmethod
    def to_json(score: Precision) -> dict[str, float | None]:
        """All three."""
        return rounded(score)

    @staticmethod
    def pictures(task: DetectionTask, count: int) -> list[Any]:
        """Objects of the class, cut out of the test images."""
        return crops(task.test_images, task.label, count)

    def mean(self, variant: str, metric: str = "map_50") -> float:
        """The mean over all tasks."""
        return self.pool([row[variant] for row in self.scores.values()])[metric]

    def ratio(self, variant: str, metric: str = "map_50") -> dict[str, float | None]:
        """`{"mean", "min"}`: the mean of a variant over that of the own LoRAs, and the ratio of the worst task.

        Not above the base, as a share is. Tasks whose own LoRA scores 0 do not enter the minimum; `None` where all do.
        """
        ratios = [share_of(row[variant][metric], row["own"][metric]) for row in self.scores.values()]
        worst = min((ratio for ratio in ratios if ratio is not None), default=None)
        return {"mean": share_of(self.mean(variant, metric), self.mean("own", metric)), "min": worst}

    def to_dict(self) -> dict[str, Any]:
        """Beside what every report has, `mean` of each column and `ratio` of each variant, by metric."""
        mean = {name: rounded(self.pool([row[name] for row in self.scores.values()])) for name in ("base", "own", *self.variants)}
        ratio = {name: {metric: rounded(self.ratio(name, metric)) for metric in METRICS} for name in self.variants}
        return {**super().to_dict(), "mean": mean, "ratio": ratio}


def class_precision(found: Sequence[Mapping[str, Any]], images: Sequence[AnnotatedImage], label: str) -> Precision:
    """`map`, `map_50` and `map_75` of one class.

    Args:
        found (`Sequence[Mapping]`): What [`detect`] returned for `images`.
        images (`Sequence[AnnotatedImage]`): At least one with the class.
        label (`str`): The class.
    """
    references = [{"boxes": image.boxes, "labels": image.labels} for image in images]
    return mean_average_precision(found, references, [label])["per_class"][label]


def evaluate_detection(
    generator: ICMGenerator,
    processor: Any,
    tasks: Sequence[DetectionTask],
    own: Mapping[str, Tensor],
    *,
    variants: Sequence[str] = VARIANTS,
    seeds: Sequence[int] = (0, 1, 2),
    batch_size: int = 32,
    progress: bool = True,
    launching: LaunchArguments = HERE,
) -> DetectionEvaluation:
    """Score a generator on held-out pictures of one-class detection tasks; what is scored: [`~Report.evaluate`].

    Args:
        generator ([`ICMGenerator`]): Reads text, or text and pictures.
        processor (`Florence2Processor`): Of its base model.
        tasks (`Sequence[DetectionTask]`): With test images and descriptions.
        own (`Mapping[str, Tensor]`): `[P]`, the own LoRA of each task.
        variants (`Sequence[str]`): Which variants; those that the encoder or the task has nothing for are left out.
        seeds (`Sequence[int]`, defaults to `(0, 1, 2)`): Of z.
        batch_size (`int`, defaults to 32): Pictures in a forward pass.
        progress (`bool`, defaults to `True`): Show a progress bar.
        launching ([`LaunchArguments`], *optional*): Where tasks are scored; by default one after the other in this process.

    Returns:
        [`DetectionEvaluation`]

    Raises:
        `ValueError`: If there is no task or no seed, or a task has no test image of its class, no description or no own LoRA.
        `OSError`: If there is no Ray cluster at the address, or a task failed in another process.
    """
    options: dict[str, Any] = {"variants": variants, "seeds": seeds, "progress": progress, "launching": launching}
    return DetectionEvaluation.evaluate(generator, processor, tasks, own, batch_size=batch_size, **options)


def cross_detection(
    generator: ICMGenerator,
    processor: Any,
    tasks: Sequence[DetectionTask],
    images: Sequence[AnnotatedImage],
    *,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """AP50 of each task's generated adapter on the objects of every task's class, whatever it calls them.

    Labels are not looked at: a "cat" adapter that boxes dogs scores on dogs.

    Args:
        generator ([`ICMGenerator`]): Reads text.
        processor (`Florence2Processor`): Of its base model.
        tasks (`Sequence[DetectionTask]`): Rows and columns.
        images (`Sequence[AnnotatedImage]`): With objects of every class.
        seed (`int`, defaults to 0): Of z.
        batch_size (`int`, defaults to 32): Pictures in a forward pass.
        progress (`bool`, defaults to `True`): Show a progress bar.

    Returns:
        `dict[str, dict[str, float]]`: AP50 by adapter and class.
    """
    model = generator.generate_adapter(tasks[0].descriptions[0])
    matrix: dict[str, dict[str, float]] = {}
    for task in tqdm(tasks, desc="adapter x class", unit="adapter", disable=not progress):
        generator.generate_adapter(task.descriptions[0], model, generator=torch.Generator().manual_seed(seed))
        found = detect(model, processor, images, prompt=task.prompt, batch_size=batch_size, progress=False)
        matrix[task.name] = {}
        for other in tasks:
            named = [{**one, "labels": [other.label] * len(one["labels"])} for one in found]
            matrix[task.name][other.name] = class_precision(named, images, other.label)["map_50"]
    return matrix
