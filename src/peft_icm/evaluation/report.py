"""One report for every kind of task: what base, own LoRA and generated adapters score, and how much of the own LoRA's gain is generated."""

from __future__ import annotations

import itertools
import os
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm

from ..adapters.attach import attach
from ..baselines.base import AdapterSource
from ..figures import plot_bars
from ..generator.modeling_icm import ICMGenerator
from ..launching.arguments import HERE, LaunchArguments
from ..launching.launchers import check_launcher, launch
from ..unknown import UnknownTaskWarning

VARIANTS = ("generated", "pictures", "text_and_pictures", "unseen_phrasing", "wrong_task", "gibberish")
GIBBERISH = ("xqzv blorf wug nimp", "asdkjh qweoiu zmxncb", "lkj lkj lkj")
HANDFUL = 4  # pictures that one adapter is generated from
_DIGITS = 4

Score = TypeVar("Score")
Source = TypeVar("Source", bound=AdapterSource)
_Item = tuple[Any, dict[str, list[tuple[dict[str, Any], int]]], Tensor]  # a task, its `conditions`, and its own LoRA


def share_of(gain: float, own: float) -> float | None:
    """The share of the own LoRA's gain; `None`, n/a, where that gains nothing.

    Args:
        gain (`float`): Of an adapter over the base.
        own (`float`): Of the own LoRA over the base.

    Returns:
        `float` or `None`

    Example:

    ```python
    >>> share_of(0.5, 2.0), share_of(0.0, 0.0)
    (0.25, None)

    ```
    """
    return gain / own if own > 0 else None


class Report(ABC, Generic[Score]):
    """Scores of held-out data under the base, each task's own LoRA and generated adapters; a kind of task brings its metric.

    The columns of a task are `base`, `own` and the variants of [`~Report.evaluate`]. A *gain* is what a column is worth above the base,
    the *share* of a variant is its gain over the own LoRA's.

    Args:
        scores (`dict[str, dict[str, Score]]`): By task and column, over all seeds and sentences.
        seeds (`list[int]`): Of z.
        seconds (`float`): What the evaluation took.

    Attributes:
        unit (`str`): Of a gain.
        heading (`str`): Above the cells of the table.
        shown (`tuple[str, ...]`): Formats of what a cell shows of [`~Report.numbers`]; the first is what the demo shows.
    """

    unit: ClassVar[str]
    heading: ClassVar[str]
    shown: ClassVar[tuple[str, ...]]

    def __init__(self, scores: dict[str, dict[str, Score]], seeds: list[int], seconds: float):
        self.scores, self.seeds, self.seconds = scores, seeds, seconds

    # ------------------------------------------------------------------ the metric
    @staticmethod
    @abstractmethod
    def tested_on(task: Any) -> tuple[str, Sequence[Any]]:
        """What a task is tested on, in words, and its held-out items of that kind."""

    @staticmethod
    @abstractmethod
    def score(model: Any, processor: Any, task: Any, **options: Any) -> Score:
        """The score of a model on a task's held-out data."""

    @staticmethod
    @abstractmethod
    def pool(scores: Sequence[Score]) -> Score:
        """One score of many: over seeds and sentences, or over tasks."""

    @staticmethod
    @abstractmethod
    def numbers(score: Score) -> dict[str, float]:
        """What a score says, by name; `gain` is what is better the larger it is."""

    @staticmethod
    @abstractmethod
    def to_json(score: Score) -> Any:
        """A score in `to_dict`."""

    @staticmethod
    def pictures(task: Any, count: int) -> list[Any]:
        """Held-out pictures that ask for the task, at most `count`; none where it has none."""
        return []

    # ------------------------------------------------------------------ the report
    @property
    def variants(self) -> list[str]:
        """Those that every task has."""
        rows = list(self.scores.values())
        return [name for name in rows[0] if name not in ("base", "own") and all(name in row for row in rows)]

    def gain(self, task: str, column: str) -> float:
        """What a column is worth above the base of the task."""
        worth, base = (self.numbers(self.scores[task][name])["gain"] for name in (column, "base"))
        return worth - base

    def task_share(self, task: str, variant: str) -> float | None:
        """The share of one task; see [`share_of`]."""
        return share_of(self.gain(task, variant), self.gain(task, "own"))

    def share(self, variant: str) -> dict[str, float | None]:
        """`{"mean", "min"}`: the sum of all tasks' gains over that of the own LoRAs, and the share of the worst task that has one."""
        gain, own = (sum(self.gain(task, column) for task in self.scores) for column in (variant, "own"))
        shares = [share for task in self.scores if (share := self.task_share(task, variant)) is not None]
        return {"mean": share_of(gain, own), "min": min(shares, default=None)}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: of each task the scores, gains and shares, the shares of all tasks, seeds and seconds; `None` is n/a."""
        rows = []
        for task, row in self.scores.items():
            variants = [name for name in row if name not in ("base", "own")]
            gains = {name: self.gain(task, name) for name in ("own", *variants)}
            shares = {name: self.task_share(task, name) for name in variants}
            scores = {name: self.to_json(score) for name, score in row.items()}
            rows.append({"name": task, **scores, "gain": rounded(gains), "share": rounded(shares)})
        shares_of_all = {name: rounded(self.share(name)) for name in self.variants}
        return {"tasks": rows, "share": shares_of_all, "seeds": self.seeds, "seconds": round(self.seconds, 1)}

    def table(self) -> str:
        """The scores of every column, then the own LoRAs' gains and every variant's share of them."""
        columns = ["base", "own", *self.variants]
        cell = " / ".join(self.shown)

        def line(title: str, cells: Sequence[str]) -> str:
            return f"{title:16}" + "".join(f"{cell:>18}" for cell in cells)

        lines = [line(self.heading, [name.replace("text_and_", "text+") for name in columns])]
        pooled = {name: self.pool([row[name] for row in self.scores.values()]) for name in columns}
        for task, row in [*self.scores.items(), ("all tasks", pooled)]:
            lines.append(line(task, [cell.format(**self.numbers(row[name])) for name in columns]))
        lines += ["", f"The own LoRA's gain over the base, in {self.unit}, and the share of it:"]
        for task in self.scores:
            lines.append(
                line(task, ["", f"{self.gain(task, 'own'):.3f}", *(_share(self.task_share(task, name)) for name in self.variants)])
            )
        mean = sum(self.gain(task, "own") for task in self.scores) / len(self.scores)
        for title, own, key in (("all tasks", f"{mean:.3f}", "mean"), ("worst task", "", "min")):
            lines.append(line(title, ["", own, *(_share(self.share(name)[key]) for name in self.variants)]))
        return "\n".join(lines)

    def plot(self, file: str | os.PathLike[str]) -> None:
        """Draw the gain of each task over the base as a PNG.

        Args:
            file (`str` or `Path`): Where to.
        """
        bars = {name.replace("_", " "): [self.gain(task, name) for task in self.scores] for name in ("own", *self.variants)}
        plot_bars(list(self.scores), bars, f"gain over the base ({self.unit})", file)

    # ------------------------------------------------------------------ the evaluator
    @classmethod
    def evaluate(
        cls,
        generator: ICMGenerator,
        processor: Any,
        tasks: Sequence[Any],
        own: Mapping[str, Tensor],
        *,
        variants: Sequence[str] = VARIANTS,
        seeds: Sequence[int] = (0, 1, 2),
        progress: bool = True,
        launching: LaunchArguments = HERE,
        each: Callable[[Any, dict[str, Score]], None] | None = None,
        **options: Any,
    ) -> Self:
        """Score a generator on the held-out data of tasks.

        - `generated`: from the task's first description, once for each seed.
        - `pictures`: from four held-out pictures, the next four for each seed.
        - `text_and_pictures`: from both.
        - `unseen_phrasing`: from each of the task's `unseen_descriptions`, the seeds taken in turn.
        - `wrong_task`: from the first description of another task, half-way round the list, once for each seed.
        - `gibberish`: from letters without meaning, one line for each seed.

        Args:
            generator ([`ICMGenerator`]): Reads text, or text and pictures.
            processor (`PreTrainedTokenizerBase` or `ProcessorMixin`): Of its base model.
            tasks (`Sequence`): Of one kind, with held-out data and descriptions.
            own (`Mapping[str, Tensor]`): `[P]`, the own LoRA of each task.
            variants (`Sequence[str]`): Which of the above; those that the encoder or the task has nothing for are left out.
            seeds (`Sequence[int]`, defaults to `(0, 1, 2)`): Of z.
            progress (`bool`, defaults to `True`): Show a progress bar.
            launching ([`LaunchArguments`], *optional*): Where tasks are scored; by default one after the other in this process.
            each (`Callable`, *optional*): Called with each task and its scores as they are ready.
            **options: For [`~Report.score`].

        Returns:
            [`Report`]: Of the kind that is asked.

        Raises:
            `ValueError`: If there is no task or no seed, or a task has no held-out data or no own LoRA.
            `OSError`: If there is no Ray cluster at the address, or a task failed in another process.
        """
        check_launcher(launching)
        if not tasks or not seeds:
            raise ValueError(f"tasks={tasks!r:.80} and seeds={seeds!r:.80} must each have one entry at least.")
        for task in tasks:
            needed, items = cls.tested_on(task)
            if not items or task.name not in own:
                raise ValueError(f"Task {task.name!r} needs {needed} and an own LoRA to be evaluated.")
        start = time.perf_counter()
        seen = HANDFUL * len(seeds) if "images" in generator.encoder.accepts else 0
        half = max(1, len(tasks) // 2)

        def item(task: Any, other: Any) -> _Item:
            asked = conditions(task, other, cls.pictures(task, seen), seeds)
            # Its own LoRA alone: what is pickled of a row is all that it is a row of.
            return task, {name: asked[name] for name in asked if name in variants and asked[name]}, own[task.name].clone()

        work = partial(cls._rows, sent(generator, launching), processor, tasks[0].descriptions[0], launching, options)
        names, by_name = [task.name for task in tasks], {task.name: task for task in tasks}
        scores: dict[str, dict[str, Score]] = {}
        with closing(launch(work, names, map(item, tasks, [*tasks[half:], *tasks[:half]]), launching)) as scored:
            for name, row in tqdm(scored, desc="evaluating", total=len(tasks), unit="task", disable=not progress):
                scores[name] = row
                if each:
                    each(by_name[name], row)
        return cls({name: scores[name] for name in names}, list(seeds), time.perf_counter() - start)

    @classmethod
    def _rows(
        cls,
        generator: ICMGenerator,
        processor: Any,
        text: str,
        launching: LaunchArguments,
        options: Mapping[str, Any],
        items: Iterable[_Item],
    ) -> Iterator[dict[str, Score]]:
        """The scores of each task, by column."""
        layout, model = generator.layout, model_to_score(generator, text, launching)
        for task, asked, own in items:
            with model.disable_adapter():
                row = {"base": cls.score(model, processor, task, **options)}
            attach(model, layout, layout.unflatten(own.to(layout.torch_dtype)))
            row["own"] = cls.score(model, processor, task, **options)
            for name, requests in asked.items():
                parts = []
                for condition, seed in requests:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", UnknownTaskWarning)  # gibberish is asked for on purpose
                        generator.generate_adapter(**condition, base_model=model, generator=torch.Generator().manual_seed(seed))
                    parts.append(cls.score(model, processor, task, **options))
                row[name] = cls.pool(parts)
            yield row


def sent(source: Source, launching: LaunchArguments) -> Source:
    """What goes to where tasks are scored: here the source itself, elsewhere of a generator what needs no GPU and has no base.

    Args:
        source ([`AdapterSource`]): A generator, or what is compared with one.
        launching ([`LaunchArguments`]): Where to.

    Returns:
        [`AdapterSource`]
    """
    return source.portable() if isinstance(source, ICMGenerator) and launching.launcher != "local" else source


def model_to_score(generator: ICMGenerator, text: str, launching: LaunchArguments) -> PeftModel:
    """A model for adapters to be scored on: where the base is, or on the GPU that a launcher gave this process.

    Args:
        generator ([`ICMGenerator`]): With a base of its own.
        text (`str`): What its first adapter is for.
        launching ([`LaunchArguments`]): What started this process.

    Returns:
        `PeftModel`
    """
    if launching.launcher != "local" and launching.gpus_per_task != 0 and torch.accelerator.is_available():
        generator.load_base().to(torch.accelerator.current_accelerator())  # type: ignore[arg-type]
    return generator.generate_adapter(text)


def conditions(task: Any, other: Any, pictures: Sequence[Any], seeds: Sequence[int]) -> dict[str, list[tuple[dict[str, Any], int]]]:
    """What each variant's adapters are generated from, and with which seed.

    Args:
        task (`LanguageModelingTask` or `DetectionTask`): That is asked for.
        other (`LanguageModelingTask` or `DetectionTask`): The wrong one; the task itself where there is no other.
        pictures (`Sequence`): That ask for the task.
        seeds (`Sequence[int]`): Of z.

    Returns:
        `dict[str, list[tuple[dict, int]]]`: By variant, arguments of [`~ICMGenerator.generate_adapter`] and seeds.
    """
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


def rounded(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """The same with four digits; `None` stays."""
    return {name: None if value is None else round(value, _DIGITS) for name, value in values.items()}


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"
