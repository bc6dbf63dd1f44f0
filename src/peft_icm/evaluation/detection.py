"""A generator on detection tasks: how much of each own LoRA's average precision do the generated ones bring, from text and pictures?"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..adapters.attach import attach
from ..generator.modeling_icm import ICMGenerator
from ..tasks.annotated_images import AnnotatedImage, crops
from ..tasks.average_precision import mean_average_precision
from ..tasks.detection import DetectionTask, detect
from .figures import save_figure
from .text import GIBBERISH

METRICS = ("map", "map_50", "map_75")
VARIANTS = ("generated", "pictures", "text_and_pictures", "unseen_phrasing", "wrong_task", "gibberish")
HANDFUL = 4  # pictures that one adapter is generated from

Precision = dict[str, float]


class DetectionEvaluation:
    """Average precision of one-class detection under the base, each task's own LoRA and generated ones.

    Args:
        scores (`dict[str, dict[str, dict[str, float]]]`): `map`, `map_50` and `map_75` of each task (its class alone) under `base`, `own`
            and the variants, means over seeds.
        seeds (`list[int]`): Of z.
        seconds (`float`): What the evaluation took.
    """

    def __init__(self, scores: dict[str, dict[str, Precision]], seeds: list[int], seconds: float):
        self.scores, self.seeds, self.seconds = scores, seeds, seconds

    @property
    def variants(self) -> list[str]:
        """Those that every task has."""
        return [name for name in VARIANTS if all(name in row for row in self.scores.values())]

    def mean(self, variant: str, metric: str = "map_50") -> float:
        """The mean over all tasks."""
        return sum(row[variant][metric] for row in self.scores.values()) / len(self.scores)

    def ratio(self, variant: str, metric: str = "map_50") -> Precision:
        """`{"mean", "min"}`: the mean of a variant over that of the own LoRAs, and the ratio of the worst task.

        Tasks whose own LoRA scores 0 do not enter the minimum.
        """
        ratios = [row[variant][metric] / row["own"][metric] for row in self.scores.values() if row["own"][metric] > 0]
        return {"mean": self.mean(variant, metric) / max(self.mean("own", metric), 1e-9), "min": min(ratios, default=0.0)}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: average precision of each task, means, and ratios to the own LoRAs."""

        def rounded(values: Mapping[str, float]) -> Precision:
            return {name: round(value, 4) for name, value in values.items()}

        rows = [{"name": task, **{name: rounded(row[name]) for name in row}} for task, row in self.scores.items()]
        columns = ["base", "own", *self.variants]
        means = {name: rounded({metric: self.mean(name, metric) for metric in METRICS}) for name in columns}
        ratios = {name: {metric: rounded(self.ratio(name, metric)) for metric in METRICS} for name in self.variants}
        return {"tasks": rows, "mean": means, "ratio": ratios, "seeds": self.seeds, "seconds": round(self.seconds, 1)}

    def table(self) -> str:
        """AP50 and AP75 of base, own LoRA and every variant."""
        columns = ["base", "own", *self.variants]
        lines = [f"{'AP50 / AP75':14}" + "".join(f"{name.replace('text_and_', 'text+'):>17}" for name in columns)]
        for task, row in [*self.scores.items(), ("all tasks", None)]:
            pairs = [
                (row[name]["map_50"], row[name]["map_75"]) if row else (self.mean(name), self.mean(name, "map_75")) for name in columns
            ]
            lines.append(f"{task:14}" + "".join(f"{f'{ap50:.2f} / {ap75:.2f}':>17}" for ap50, ap75 in pairs))
        return "\n".join(lines)

    def plot(self, file: str | os.PathLike[str]) -> None:
        """Draw AP50 of each task as a PNG.

        Args:
            file (`str` or `Path`): Where to.
        """
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(10, 4.5), layout="constrained")
        columns = ["base", "own", *self.variants]
        width = 1 / (len(columns) + 1)
        for index, name in enumerate(columns):
            places = [task + (index - len(columns) / 2) * width for task in range(len(self.scores))]
            axes.bar(places, [row[name]["map_50"] for row in self.scores.values()], width, label=name.replace("_", " "))
        axes.set_xticks(range(len(self.scores)), list(self.scores), rotation=40, ha="right")
        axes.set(ylabel="AP50", ylim=(0, 1))
        figure.legend(loc="outside upper center", ncols=len(columns), frameon=False)
        save_figure(figure, file)


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
) -> DetectionEvaluation:
    """Score a generator on held-out pictures of one-class detection tasks.

    - `generated`: from the task's first description, once for each seed.
    - `pictures`: from four objects of its class, cut out of the test images, the next four for each seed.
    - `text_and_pictures`: from both.
    - `unseen_phrasing`: from each of the task's `unseen_descriptions`, the seeds taken in turn.
    - `wrong_task`: from the first description of another task, half-way round the list, once for each seed.
    - `gibberish`: from letters without meaning, one line for each seed.

    Args:
        generator ([`ICMGenerator`]): Reads text, or text and pictures.
        processor (`Florence2Processor`): Of its base model.
        tasks (`Sequence[DetectionTask]`): With test images and descriptions.
        own (`Mapping[str, Tensor]`): `[P]`, the own LoRA of each task.
        variants (`Sequence[str]`): Which of the above; those that the encoder or the task has nothing for are left out.
        seeds (`Sequence[int]`, defaults to `(0, 1, 2)`): Of z.
        batch_size (`int`, defaults to 32): Pictures in a forward pass.
        progress (`bool`, defaults to `True`): Show a progress bar.

    Returns:
        [`DetectionEvaluation`]

    Raises:
        `ValueError`: If a task has no test image of its class, no description or no own LoRA.
    """
    for task in tasks:
        if not any(task.label in image.labels for image in task.test_images) or not task.descriptions or task.name not in own:
            raise ValueError(f"Task {task.name!r} needs test images of a {task.label!r}, a description and an own LoRA to be evaluated.")
    start = time.perf_counter()
    layout = generator.layout
    pictures = HANDFUL * len(seeds) if "images" in generator.encoder.accepts else 0
    model = generator.generate_adapter(tasks[0].descriptions[0])
    scores: dict[str, dict[str, Precision]] = {}
    for index, task in enumerate(tqdm(tasks, desc="evaluating", unit="task", disable=not progress)):

        def score() -> Precision:
            found = detect(model, processor, task.test_images, prompt=task.prompt, batch_size=batch_size, progress=False)  # noqa: B023
            return class_precision(found, task.test_images, task.label)  # noqa: B023

        def mean(conditions: Iterable[tuple[Mapping[str, Any], int]]) -> Precision:
            rows = []
            for condition, seed in conditions:
                generator.generate_adapter(**condition, base_model=model, generator=torch.Generator().manual_seed(seed))
                rows.append(score())
            return {metric: sum(row[metric] for row in rows) / len(rows) for metric in METRICS}

        with model.disable_adapter():
            row = {"base": score()}
        attach(model, layout, layout.unflatten(own[task.name].to(layout.torch_dtype)))
        row["own"] = score()
        other = tasks[(index + max(1, len(tasks) // 2)) % len(tasks)]
        conditions = _conditions(task, other, crops(task.test_images, task.label, pictures), seeds)
        row |= {name: mean(found) for name, found in conditions.items() if name in variants and found}
        scores[task.name] = row
    return DetectionEvaluation(scores, list(seeds), time.perf_counter() - start)


def _conditions(
    task: DetectionTask, other: DetectionTask, pictures: Sequence[Any], seeds: Sequence[int]
) -> dict[str, list[tuple[dict[str, Any], int]]]:
    """What each variant's adapters are generated from, and with which seed."""
    text = task.descriptions[0]
    handfuls = [pictures[start : start + HANDFUL] for start in range(0, len(pictures), HANDFUL)]
    return {
        "generated": [({"text": text}, seed) for seed in seeds],
        "pictures": [({"images": handful}, seed) for handful, seed in zip(handfuls, seeds, strict=False)],
        "text_and_pictures": [({"text": text, "images": handful}, seed) for handful, seed in zip(handfuls, seeds, strict=False)],
        "unseen_phrasing": [({"text": line}, seed) for line, seed in zip(task.unseen_descriptions, itertools.cycle(seeds), strict=False)],
        "wrong_task": [({"text": other.descriptions[0]}, seed) for seed in seeds] if other is not task else [],
        "gibberish": [({"text": line}, seed) for line, seed in zip(itertools.cycle(GIBBERISH), seeds, strict=False)],
    }


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
        named: Callable[[str], list[dict[str, Any]]] = lambda label: [{**one, "labels": [label] * len(one["labels"])} for one in found]  # noqa: B023, E731
        matrix[task.name] = {other.name: class_precision(named(other.label), images, other.label)["map_50"] for other in tasks}
    return matrix
