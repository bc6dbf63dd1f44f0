"""What a generator does with requests in words that it never saw, and with requests for something else, beside retrieval."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..adapters.attach import attach
from ..figures import save_figure
from ..generator.modeling_icm import ICMGenerator
from ..generator.reading import Reading
from ..generator.requests import scaled
from ..hub.cards import requests_measured
from ..launching.arguments import HERE, LaunchArguments
from ..launching.launchers import check_launcher, launch
from ..unknown import ON_UNKNOWN, UnknownTaskWarning
from .report import Report, model_to_score, rounded, sent, share_of

SOURCES = ("generated", "retrieved")
KINDS = {"unseen_phrasings": True, "unknown_requests": False}  # whether a request means a task
KNOWN_READ = 0.95  # share of known requests at which the share of unknown ones is told


@dataclass
class Heard:
    """One request, what was heard in it, and what its adapters gained.

    Args:
        request (`str`): The sentence.
        meant (`str`, *optional*): The task that it means; `None` for a request that no task answers.
        tested_on (`str`): The task whose held-out data the adapters were scored on: the one meant, else the tasks in turn.
        heard (`str`): The most probable task.
        confidence, familiarity, worth (`float`): See [`Reading`].
        known (`bool`): Whether it was taken for known.
        gains (`dict[str, float]`): Above the base, by `SOURCE/warn` and `SOURCE/shrink`.
    """

    request: str
    meant: str | None
    tested_on: str
    heard: str
    confidence: float
    familiarity: float
    worth: float
    known: bool
    gains: dict[str, float]


@dataclass
class RequestsReport:
    """How a generator hears requests, and what its adapters are worth; the own LoRA of the task that was heard stands beside them.

    Args:
        rows (`list[Heard]`): One for each request.
        own (`dict[str, float]`): Gain of each task's own LoRA above the base.
        threshold (`float`, *optional*): Of familiarity.
        unit (`str`): Of a gain.
        seconds (`float`): What the evaluation took.
        weights_sha256 (`str`, *optional*): Of the saved generator that was scored.
    """

    rows: list[Heard]
    own: dict[str, float]
    threshold: float | None
    unit: str
    seconds: float
    weights_sha256: str | None = None

    def gain(self, row: Heard, source: str, on_unknown: str) -> float:
        """What a request gained: `"base"` and `"raise"` leave the base to whoever asks for something unknown."""
        if on_unknown == "shrink":
            return row.gains[f"{source}/shrink"]
        return row.gains[f"{source}/warn"] if on_unknown == "warn" or row.known else 0.0

    def share(self, source: str, on_unknown: str, *, meant: bool) -> float | None:
        """Sum of the gains over that of the own LoRAs, over the requests that mean a task, or over those that mean none."""
        rows = [row for row in self.rows if (row.meant is not None) == meant]
        return share_of(sum(self.gain(row, source, on_unknown) for row in rows), sum(self.own[row.tested_on] for row in rows))

    @property
    def right(self) -> float:
        """Share of the requests that mean a task in which that task was heard."""
        rows = [row for row in self.rows if row.meant is not None]
        return sum(row.heard == row.meant for row in rows) / len(rows)

    def unknown_at(self, known_read: float = KNOWN_READ) -> float | None:
        """Share of the requests for something else that are taken for known when this share of the others is; `None` without any."""
        familiar = torch.tensor([row.familiarity for row in self.rows if row.meant is not None])
        other = torch.tensor([row.familiarity for row in self.rows if row.meant is None])
        return float((other >= familiar.quantile(1 - known_read)).float().mean()) if len(other) else None

    @property
    def auroc(self) -> float | None:
        """Of familiarity, between requests that mean a task and those that mean none."""
        from sklearn.metrics import roc_auc_score

        labels = [row.meant is not None for row in self.rows]
        return float(roc_auc_score(labels, [row.familiarity for row in self.rows])) if len(set(labels)) > 1 else None

    def risk_coverage(self, source: str = "generated") -> tuple[list[float], list[float]]:
        """Coverage and risk, when the requests of least confidence are turned away: risk is one less the share of what is left.

        All requests count, those that mean no task too.
        """
        order = sorted(self.rows, key=lambda row: -row.confidence)
        gains = torch.tensor([row.gains[f"{source}/warn"] for row in order]).cumsum(0)
        owns = torch.tensor([self.own[row.tested_on] for row in order]).cumsum(0).clamp(min=1e-12)
        return [(index + 1) / len(order) for index in range(len(order))], (1 - gains / owns).tolist()

    def aurc(self, source: str = "generated") -> float:
        """Area under the risk-coverage curve (Geifman et al. 2019): the mean risk over all coverages."""
        risk = self.risk_coverage(source)[1]
        return sum(risk) / len(risk)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: shares by source and `on_unknown`, how requests were heard, and every request."""
        shares = {
            kind: {source: rounded({mode: self.share(source, mode, meant=meant) for mode in ON_UNKNOWN}) for source in SOURCES}
            for kind, meant in KINDS.items()
            if any((row.meant is not None) == meant for row in self.rows)
        }
        heard = {
            "right": self.right,
            "known_of_known": self._taken(meant=True),
            "known_of_unknown": self._taken(meant=False),
            "unknown_at_95_of_known": self.unknown_at(),
            "auroc": self.auroc,
            "threshold": self.threshold,
            **{f"aurc_{source}": self.aurc(source) for source in SOURCES},
        }
        rows = [{**asdict(row), "gains": rounded(row.gains)} for row in self.rows]
        known = sum(row.meant is not None for row in self.rows)
        facts = {"share": shares, "heard": rounded(heard), "unit": self.unit, "known": known, "unknown": len(rows) - known}
        return {**facts, "seconds": round(self.seconds, 1), "weights_sha256": self.weights_sha256, "requests": rows}

    def _taken(self, *, meant: bool) -> float | None:
        rows = [row.known for row in self.rows if (row.meant is not None) == meant]
        return sum(rows) / len(rows) if rows else None

    def table(self) -> str:
        """What [`~RequestsReport.to_dict`] says of all requests, in lines."""
        found = self.to_dict()
        modes = [mode for mode in ON_UNKNOWN if mode != "raise"]  # it leaves the base, as "base" does: how often it answers is told
        lines = [f"{'share of the own LoRAs gain':34}" + "".join(f"{mode:>9}" for mode in (*modes, "answered"))]
        for kind, by_source in found["share"].items():
            for source, shares in by_source.items():
                values = [*(shares[mode] for mode in modes), self._taken(meant=KINDS[kind])]
                cells = "".join(f"{'n/a' if value is None else format(value, '.2f'):>9}" for value in values)
                lines.append(f"{f'{kind}, {source}'.replace('_', ' '):34}{cells}")
        lines += [
            f"{name.replace('_', ' '):34}{'n/a' if value is None else format(value, '.3f'):>9}" for name, value in found["heard"].items()
        ]
        return "\n".join(lines)

    def plot(self, file: str | os.PathLike[str]) -> None:
        """Draw risk against coverage as a PNG.

        Args:
            file (`str` or `Path`): Where to.
        """
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(6, 4.5), layout="constrained")
        for source in SOURCES:
            axes.plot(*self.risk_coverage(source), label=f"{source} (area {self.aurc(source):.3f})")
        axes.set(xlabel="coverage: share of the requests answered, the surest first", ylabel="risk: 1 - share of the own LoRAs' gain")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.legend(frameon=False)
        save_figure(figure, file)


def load_requests(file: str | os.PathLike[str], tasks: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Read `{"known": {task: [sentences]}, "unknown": [sentences]}`.

    Args:
        file (`str` or `Path`): JSON.
        tasks (`Sequence[str]`): Names that may stand under `known`.

    Returns:
        `tuple[dict[str, list[str]], list[str]]`: Of both.

    Raises:
        `OSError`: If the file cannot be read.
        `ValueError`: If it is no such JSON, or names a task that is none.
    """
    shape = '{"known": {"task": ["a sentence"]}, "unknown": ["a sentence"]}'
    try:
        document = json.loads(Path(file).read_text(encoding="utf-8"))
        known, unknown = {**document["known"]}, document.get("unknown", [])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON of the form {shape} ({error}).") from error
    if foreign := [task for task in known if task not in tasks]:
        raise ValueError(f"{file}: known names {foreign[0]!r}, which is no task here: {', '.join(tasks)}.")
    for task, lines in [*known.items(), ("unknown", unknown)]:
        if not isinstance(lines, list) or not all(isinstance(line, str) and line.strip() for line in lines):
            raise ValueError(f"{file}: {task!r} must have a list of sentences.")
    if not any(known.values()):
        raise ValueError(f"{file} has no sentence under known: it must be of the form {shape}.")
    return known, unknown


def card_facts(file: str | os.PathLike[str], generator: ICMGenerator) -> dict[str, Any]:
    """What a generator's card tells of a report: kept in `config.training["requests"]`.

    Args:
        file (`str` or `Path`): What `peft-icm evaluate --requests ... -o FILE` wrote, [`~RequestsReport.to_dict`] as JSON.
        generator ([`ICMGenerator`]): As it was loaded.

    Returns:
        `dict[str, Any]`

    Raises:
        `OSError`: If the file cannot be read.
        `ValueError`: If it is no such report, has no figures that a card tells, or is one of other weights.
    """
    try:
        report = json.loads(Path(file).read_text(encoding="utf-8"), parse_constant=int)  # NaN and Infinity are no int: refused
        facts = {name: report[name] for name in ("share", "heard", "known", "unknown", "weights_sha256")}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is no report that peft-icm evaluate --requests wrote ({error!r}).") from error
    if not requests_measured(facts):
        raise ValueError(f"{file} has no figures that a card can tell: evaluate --requests again.")
    if facts["weights_sha256"] != generator.saved_sha256:
        raise ValueError(f"{file} was measured on other weights than those of {generator.name_or_path}: evaluate --requests again.")
    return facts


def evaluate_requests(
    kind: type[Report[Any]],
    generator: ICMGenerator,
    processor: Any,
    tasks: Sequence[Any],
    own: Mapping[str, Tensor],
    known: Mapping[str, Sequence[str]],
    unknown: Sequence[str] = (),
    *,
    seed: int = 0,
    progress: bool = True,
    launching: LaunchArguments = HERE,
    **options: Any,
) -> RequestsReport:
    """Score what a generator makes of requests.

    Args:
        kind (`type`): [`Evaluation`] or [`DetectionEvaluation`], which bring the metric.
        generator ([`ICMGenerator`]): Reads text.
        processor (`PreTrainedTokenizerBase` or `ProcessorMixin`): Of its base model.
        tasks (`Sequence`): Of one kind, with held-out data.
        own (`Mapping[str, Tensor]`): `[P]`, the own LoRA of each task.
        known (`Mapping[str, Sequence[str]]`): Unseen sentences that mean each task.
        unknown (`Sequence[str]`): Sentences that mean none of them; each is scored on one task, in turn.
        seed (`int`, defaults to 0): Of z.
        progress (`bool`, defaults to `True`): Show a progress bar.
        launching ([`LaunchArguments`], *optional*): Where tasks are scored; by default one after the other in this process.
        **options: For [`~Report.score`].

    Returns:
        [`RequestsReport`]

    Raises:
        `ValueError`: If a task of the generator has no own LoRA, or there is no task or no request.
        `OSError`: If there is no Ray cluster at the address, or a task failed in another process.
    """
    check_launcher(launching)
    missing = next((task["name"] for task in generator.config.tasks or [] if task["name"] not in own), None)
    if missing is not None:
        raise ValueError(f"The generator may hear {missing!r}, and the collection has no LoRA of it: pass the one that it was trained on.")
    if not tasks or not (unknown or any(known.values())):
        raise ValueError(f"There must be a task and a request, found {len(tasks)} tasks, known={known!r:.80} and unknown={unknown!r:.80}.")
    start = time.perf_counter()
    asked: list[tuple[str, str | None, str]] = [(line, name, name) for name, lines in known.items() for line in lines]
    asked += [(line, None, tasks[index % len(tasks)].name) for index, line in enumerate(unknown)]
    of_task: dict[str, list[int]] = {task.name: [] for task in tasks}
    for number, (_, _, name) in enumerate(asked):
        of_task[name].append(number)
    readings = [generator.read(line) for line, _, _ in asked]

    def item(task: Any) -> _Item:
        heard = {task.name, *(readings[number].task for number in of_task[task.name])}
        alone = {name: own[name].clone() for name in heard}  # what is pickled of a row is all that it is a row of
        return task, [(asked[number][0], readings[number]) for number in of_task[task.name]], alone

    work = partial(_gains, sent(generator, launching), processor, kind, tasks[0].descriptions[0], seed, launching, options)
    gains: dict[int, dict[str, float]] = {}
    of_own: dict[str, float] = {}
    with closing(launch(work, list(of_task), map(item, tasks), launching)) as scored:
        for name, (gain, found) in tqdm(scored, desc="requests", total=len(tasks), unit="task", disable=not progress):
            of_own[name] = gain
            gains |= zip(of_task[name], found, strict=True)
    rows = []
    for number, ((line, meant, name), reading) in enumerate(zip(asked, readings, strict=True)):
        figures = (round(reading.confidence, 4), round(reading.familiarity, 4), round(reading.worth, 4))
        rows.append(Heard(line, meant, name, reading.task, *figures, reading.known, gains[number]))
    threshold = readings[-1].threshold
    seconds = time.perf_counter() - start
    return RequestsReport(rows, {name: of_own[name] for name in of_task}, threshold, kind.unit, seconds, generator.saved_sha256)


_Item = tuple[Any, list[tuple[str, Reading]], dict[str, Tensor]]  # a task, what is asked and how it was heard, and own LoRAs


def _gains(
    generator: ICMGenerator,
    processor: Any,
    kind: type[Report[Any]],
    text: str,
    seed: int,
    launching: LaunchArguments,
    options: Mapping[str, Any],
    items: Iterable[_Item],
) -> Iterator[tuple[float, list[dict[str, float]]]]:
    """Of each task the gain of its own LoRA, and those of each request's adapters."""
    layout, model = generator.layout, model_to_score(generator, text, launching)
    for task, requests, own in items:
        with model.disable_adapter():
            base = kind.numbers(kind.score(model, processor, task, **options))["gain"]

        def gain(tensors: dict[str, Tensor], task: Any = task, base: float = base) -> float:
            attach(model, layout, {name: tensor.to(layout.torch_dtype) for name, tensor in tensors.items()})
            return kind.numbers(kind.score(model, processor, task, **options))["gain"] - base

        of_own = {name: gain(layout.unflatten(one)) for name, one in own.items()}
        found = []
        for line, reading in requests:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UnknownTaskWarning)
                tensors = generator.generate_state_dict(line, generator=torch.Generator().manual_seed(seed))
            found.append(
                {
                    "generated/warn": gain(tensors),
                    "generated/shrink": gain(scaled(tensors, reading.worth)),
                    "retrieved/warn": of_own[reading.task],
                    "retrieved/shrink": gain(scaled(layout.unflatten(own[reading.task]), reading.worth)),
                }
            )
        yield of_own[task.name], found
