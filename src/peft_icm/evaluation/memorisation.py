"""Does a generator memorise? What its weights alone can tell, beside the collection that it was trained on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..adapters.collection import AdapterCollection
from ..adapters.fidelity import cosine, distances, norms
from ..baselines.base import AdapterSource
from ..figures import plot_bars
from ..launching.arguments import HERE, LaunchArguments
from ..launching.launchers import check_launcher, launch
from .report import sent

_DIGITS = 6  # below lies what a difference of equal norms leaves (see fidelity.distances)
_HELD = 2**28  # numbers of the adapters that are held while those of all tasks pass by: 1 GiB in fp32
_MEASURES = ("nearest_snapshot", "nearest_is_own_task", "between_snapshots", "to_own", "mode_to_own", "spread")
_BARS = {
    "nearest_snapshot": "generated to the nearest snapshot",
    "between_snapshots": "snapshot to the nearest other",
    "spread": "generated to generated",
}


def memorisation_report(
    generator: AdapterSource,
    collection: AdapterCollection,
    *,
    seeds: Sequence[int] = (0, 1, 2, 3, 4, 5, 6, 7),
    launching: LaunchArguments = HERE,
) -> dict[str, Any]:
    """Where generated adapters lie among the snapshots of a collection; from weights alone, no base model runs.

    Each task is asked for by the first of its task vectors, that of its first description. All distances of a task are
    `||dW - dW'||_F / ||dW_own||_F`: Frobenius over all modules ([`distances`]), in units of the norm of the task's own LoRA, its last
    snapshot. Generated adapters are compared in the layout's dtype, as they would be saved.

    - `nearest_snapshot`: from a generated adapter to the nearest snapshot of any task, mean over seeds; `nearest_is_own_task` is the
      share of seeds in which that snapshot is of the task itself.
    - `between_snapshots`: from a snapshot of the task to the nearest other snapshot of any task, mean over the task's snapshots.
    - `ratio`: the first over the second. Below 1, generated adapters are nearer to a snapshot than snapshots are to one another, as
      copies are, and averages of snapshots too. `None` where snapshots coincide.
    - `to_own`: from a generated adapter to the own LoRA, mean over seeds; `mode_to_own`: from that of z = 0.
    - `spread`: between two generated adapters, mean over pairs of seeds; `None` for one seed.
    - `cosines`: between adapters of different tasks, mean of the absolute value and largest one; of the own LoRAs, and of those
      generated with the first seed. `None` for one task.

    Snapshots are read a task at a time: all of them once for each GiB (in fp32) that they and the generated adapters come to, and that GiB
    is what is held beside one task.

    Args:
        generator ([`AdapterSource`]): Has a `layout` and draws with `sample(condition, num_samples, generator, temperature)`.
        collection ([`AdapterCollection`]): With task vectors; the one that the generator was trained on, to ask what it memorised.
        seeds (`Sequence[int]`, defaults to 0 ... 7): Of z, one adapter for each.
        launching ([`LaunchArguments`], *optional*): Where the report is made, a GiB in each Ray task or job, without GPUs; by default all
            in this process.

    Returns:
        `dict`: JSON-able: `tasks` (a list with `name`, `snapshots` and the measures above), `mean` of each over tasks (`ratio`: of
        the means), `cosines` (`own` and `generated`, each with `mean_absolute` and `max_absolute`), `snapshots` (their number) and
        `seeds`.

    Raises:
        `ValueError`: If there is no seed, the layouts differ, a task has no task vector, the task vectors are of another encoder than
            the generator's, there is only one snapshot, or an own LoRA is zero.
        `OSError`: If there is no Ray cluster at the address, or a GiB failed in another process.

    Example:

    ```python
    >>> from peft_icm import AdapterCollection, ICMGenerator, bundled_generator
    >>> from peft_icm.bundled import bundled_folder
    >>> generator = ICMGenerator.from_pretrained(bundled_generator("text"))
    >>> own = AdapterCollection.from_pretrained(bundled_folder("text") / "own")
    >>> own.encode(generator.encoder)
    >>> report = memorisation_report(generator, own, seeds=[0, 1])
    >>> report["mean"]["nearest_is_own_task"]
    1.0

    ```
    """
    check_launcher(launching)
    sizes = _check(generator, collection, seeds)
    blocks = {block[0]: block for block in _blocks({task: (size + len(seeds)) * generator.layout.numel for task, size in sizes.items()})}
    work = partial(_measured, sent(generator, launching), collection, seeds)
    with closing(launch(work, list(blocks), blocks.values(), replace(launching, gpus_per_task=0))) as measured:
        found = dict(measured)
    rows = [row for first in blocks for row in found[first][0]]
    cosines = {name: torch.cat([found[first][1][name] for first in blocks]) for name in ("own", "generated")}
    columns = {name: [value for row in rows if (value := row[name]) is not None] for name in _MEASURES}
    mean = {name: round(sum(values) / len(values), _DIGITS) if values else None for name, values in columns.items()}
    return {
        "tasks": [{"name": task, "snapshots": size, **row} for (task, size), row in zip(sizes.items(), rows, strict=True)],
        "mean": _with_ratio(mean),
        "cosines": {name: _summary(values) for name, values in cosines.items()},
        "snapshots": sum(sizes.values()),
        "seeds": list(seeds),
    }


def _measured(
    generator: AdapterSource, collection: AdapterCollection, seeds: Sequence[int], blocks: Iterable[list[str]]
) -> Iterator[tuple[list[dict[str, float | None]], dict[str, Tensor]]]:
    """Of each block the measures of its tasks, and their cosines `[n, T]` to all tasks."""
    layout = generator.layout
    for names in blocks:
        block = _Block(generator, collection, names, seeds)
        own, generated = [], []
        for task in collection.tasks:
            snapshots = collection.rows(task)
            block.meet(task, snapshots)
            first = block.first(task) if task in names else _sample(generator, collection.task_vectors[task][0], seeds[:1])
            own.append(cosine(layout, block.own, snapshots[-1:]))
            generated.append(cosine(layout, block.drawn[:: len(seeds)], first))
        yield block.rows(), {"own": torch.cat(own, 1), "generated": torch.cat(generated, 1)}


class _Block:
    """Snapshots of some tasks and what is generated for these, held while the snapshots of all tasks pass by."""

    def __init__(self, generator: AdapterSource, collection: AdapterCollection, tasks: Sequence[str], seeds: Sequence[int]):
        conditions = [collection.task_vectors[task][0] for task in tasks]
        parts = [collection.rows(task) for task in tasks]
        self.layout, self.tasks, self.sizes, self.seeds = generator.layout, tasks, [len(part) for part in parts], len(seeds)
        self.snapshots = torch.cat(parts)
        self.drawn = torch.cat([_sample(generator, condition, seeds) for condition in conditions])
        self.modes = torch.cat([_sample(generator, condition, [0], temperature=0.0) for condition in conditions])
        self.own = torch.stack([part[-1] for part in parts])
        self.nearest = torch.full((len(self.drawn),), torch.inf, dtype=torch.float64)
        self.whose = [""] * len(self.drawn)  # the task of the nearest snapshot
        self.others = torch.full((len(self.snapshots),), torch.inf, dtype=torch.float64)

    def first(self, task: str) -> Tensor:
        """`[1, P]`: what the first seed gives for a task of the block."""
        return self.drawn[self.tasks.index(task) * self.seeds][None]

    def meet(self, task: str, snapshots: Tensor) -> None:
        """Keep what is nearer in the snapshots `[K, P]` of a task than in those that passed by before."""
        nearest = distances(self.layout, self.drawn, snapshots).amin(1)
        self.whose = [task if nearer else before for nearer, before in zip(nearest < self.nearest, self.whose, strict=True)]
        self.nearest = nearest.minimum(self.nearest)
        others = distances(self.layout, self.snapshots, snapshots)
        if task in self.tasks:
            others.split(self.sizes)[self.tasks.index(task)].fill_diagonal_(torch.inf)  # each to itself
        self.others = others.amin(1).minimum(self.others)

    def rows(self) -> list[dict[str, float | None]]:
        """The measures of each task."""
        rows = []
        for index, (task, others) in enumerate(zip(self.tasks, self.others.split(self.sizes), strict=True)):
            seeds = slice(index * self.seeds, (index + 1) * self.seeds)
            drawn, own, mode = self.drawn[seeds], self.own[index : index + 1], self.modes[index : index + 1]
            unit = norms(self.layout, own).item()
            pairs = _different(distances(self.layout, drawn, drawn))
            row = {
                "nearest_snapshot": self.nearest[seeds].mean() / unit,
                "nearest_is_own_task": self.whose[seeds].count(task) / self.seeds,
                "between_snapshots": others.mean() / unit,
                "to_own": distances(self.layout, drawn, own).mean() / unit,
                "mode_to_own": distances(self.layout, mode, own).mean() / unit,
                "spread": pairs.mean() / unit if len(pairs) else None,
            }
            rows.append(_with_ratio({name: None if value is None else round(float(value), _DIGITS) for name, value in row.items()}))
        return rows


def _blocks(numbers: Mapping[str, int]) -> Iterator[list[str]]:
    """Tasks, in their order, of so many numbers each, that can be held together; one at least."""
    block: list[str] = []
    held = 0
    for task, count in numbers.items():
        if block and held + count > _HELD:
            yield block
            block, held = [], 0
        block.append(task)
        held += count
    yield block


def check_layout(generator: AdapterSource, collection: AdapterCollection) -> None:
    """Refuse a collection whose LoRAs are no adapters of the generator's kind.

    Args:
        generator ([`ICMGenerator`]): Or a baseline.
        collection ([`AdapterCollection`]): Of the own LoRAs of tasks.

    Raises:
        `ValueError`: Names the first difference.
    """
    if collection.layout.fingerprint != generator.layout.fingerprint:
        difference = generator.layout.difference(collection.layout)
        raise ValueError(f"The collection has another layout than the generator: {difference}. Pass the one that it was trained on.")


def _check(generator: AdapterSource, collection: AdapterCollection, seeds: Sequence[int]) -> dict[str, int]:
    """The number of snapshots of each task."""
    if not seeds:
        raise ValueError("seeds=() must name at least one seed of z, such as (0, 1, 2).")
    check_layout(generator, collection)
    missing = next((task for task in collection.tasks if not len(collection.task_vectors.get(task, ()))), None)
    if missing is not None:
        raise ValueError(f"The collection has no task vectors for {missing!r}: call collection.encode(generator.encoder) first.")
    config = getattr(generator, "config", None)
    if config is not None:  # sources that only store adapters have none, and name no encoder
        wanted, found = ((encoder or {}).get("sha256") for encoder in (config.encoder, collection.encoder))
        if wanted != found:
            raise ValueError(
                f"The collection's task vectors are by the encoder of sha256 {str(found)[:12]}, the generator was trained with"
                f" {str(wanted)[:12]}: call collection.encode(generator.encoder) first."
            )
    sizes = {}
    for task in collection.tasks:
        snapshots = collection.rows(task)
        sizes[task] = len(snapshots)
        if not norms(collection.layout, snapshots[-1:]).item():
            raise ValueError(f"The own LoRA of {task!r}, the unit of its distances, is zero (B was not trained): train it again.")
    if sum(sizes.values()) < 2:
        raise ValueError("The collection has one snapshot, and how far snapshots lie apart takes two: pass the one trained on.")
    return sizes


def _sample(source: AdapterSource, condition: Tensor, seeds: Sequence[int], temperature: float = 1.0) -> Tensor:
    """`[len(seeds), P]`, rounded as a saved adapter is."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return source.sample(condition, len(seeds), generators, temperature).detach().cpu().to(source.layout.torch_dtype)


def _different(square: Tensor) -> Tensor:
    """`[n, n]` -> what lies off its diagonal."""
    return square[~torch.eye(len(square), dtype=torch.bool)]


def _with_ratio(row: dict[str, float | None]) -> dict[str, float | None]:
    nearest, between = row["nearest_snapshot"], row["between_snapshots"]
    return {**row, "ratio": round(nearest / between, _DIGITS) if nearest is not None and between else None}


def _summary(cosines: Tensor) -> dict[str, float] | None:
    """`[T, T]` cosines -> those between different tasks."""
    values = _different(cosines).abs()
    return (
        {"mean_absolute": round(values.mean().item(), _DIGITS), "max_absolute": round(values.max().item(), _DIGITS)}
        if len(values)
        else None
    )


def plot_memorisation(report: Mapping[str, Any], file: str | os.PathLike[str]) -> None:
    """Draw a report: for each task, how far generated adapters lie from a snapshot, snapshots from one another, and samples.

    Args:
        report (`Mapping`): What [`memorisation_report`] returned.
        file (`str` or `Path`): The PNG.

    Example:

    ```python
    >>> import tempfile
    >>> row = {"name": "sofa", "nearest_snapshot": 0.2, "between_snapshots": 0.3, "spread": 0.1}
    >>> plot_memorisation({"tasks": [row]}, f"{tempfile.mkdtemp()}/memorisation.png")

    ```
    """
    bars = {label: [row[key] for row in report["tasks"]] for key, label in _BARS.items()}
    whole = {label: values for label, values in bars.items() if None not in values}
    plot_bars([row["name"] for row in report["tasks"]], whole, "distance of dW (own LoRA's norm = 1)", file)
