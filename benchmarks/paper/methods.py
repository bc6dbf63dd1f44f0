"""The methods that are compared, and the one loop that scores them: condition -> adapter -> score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from peft_icm.adapters.collection import AdapterCollection
from peft_icm.baselines import (
    AdapterSource,
    CompressedAdapters,
    CoordinateGaussian,
    GreedySoup,
    MeanOverTasks,
    NearestAdapter,
    NoisySnapshot,
    SingleAdapter,
    SnapshotMean,
)
from peft_icm.evaluation.report import HANDFUL, share_of

from .results import Cell
from .scales import Scale
from .scoring import Score
from .workshop import Workshop

BASE, OWN, ICM = "original model", "original LoRA", "ICM-LoRA"
SOUP, DIFFUSION = "Model Soup over tasks (uniform)", "COND P-DIFF"
NEAREST = "LoRA of the nearest description"


@dataclass(frozen=True)
class Method:
    """A way to an adapter.

    Args:
        name (`str`): As the tables call it.
        source (`Callable[[int], AdapterSource]`, *optional*): By seed; `None` is the base model itself.
        seeds (`tuple[int, ...]`, defaults to `(0,)`): More than one where the method draws or is trained.
        condition (`str`, defaults to `"description"`): `"description"`, `"unseen"` (a phrasing that nothing was trained on, the next one
            for each seed), `"wrong"` (another task's description), `"random"` (Gaussian, with mean and spread of the collection's task
            vectors), `"zero"`, `"pictures"` (four objects of the class from test images, the next four for each seed) or `"both"`.
    """

    name: str
    source: Callable[[int], AdapterSource] | None
    seeds: tuple[int, ...] = (0,)
    condition: str = "description"

    def adapter(self, workshop: Workshop, collection: AdapterCollection, task: str, seed: int) -> Tensor | None:
        """`[P]`, or `None` for the base."""
        if self.source is None:
            return None
        condition = _condition(self.condition, workshop, collection, task, seed)
        return self.source(seed).sample(condition, 1, torch.Generator().manual_seed(seed))[0]


def _condition(kind: str, workshop: Workshop, collection: AdapterCollection, task: str, seed: int) -> Tensor:
    names = list(workshop.family.tasks)
    if kind == "description":
        return workshop.condition(task)
    if kind == "unseen":
        return workshop.condition(task, phrasing=seed)
    if kind in ("pictures", "both"):
        seen = workshop.encoder.average(workshop.encoder.encode(workshop.unseen_pictures(task)[HANDFUL * seed :][:HANDFUL]))
        return seen if kind == "pictures" else workshop.encoder.average(torch.stack([seen, workshop.condition(task)]))
    if kind == "wrong":
        return workshop.condition(names[(names.index(task) + len(names) // 2) % len(names)])
    rows = torch.cat([collection.task_vectors[name] for name in names])
    if kind == "zero":
        return torch.zeros(rows.shape[1])
    noise = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(1000 + seed))
    return rows.mean(0) + (rows - rows.mean(0)).std() * noise


def compare(
    workshop: Workshop, collection: AdapterCollection, methods: Sequence[Method], tasks: Sequence[str] | None = None
) -> dict[str, dict[str, list[Score]]]:
    """Score every method on every task.

    Args:
        workshop ([`Workshop`]): Of the family.
        collection (`AdapterCollection`): Whose layout the adapters have.
        methods (`Sequence[Method]`): What is compared.
        tasks (`Sequence[str]`, *optional*): By default all of the family.

    Returns:
        `dict[str, dict[str, list[dict]]]`: A score for each seed, by method and task.
    """
    names = list(tasks or workshop.family.tasks)
    scorer = workshop.scorer(collection)
    jobs = [(method, task, seed) for method in methods for task in names for seed in method.seeds]
    result: dict[str, dict[str, list[Score]]] = {method.name: {task: [] for task in names} for method in methods}
    rank = collection.layout.lora_config().r
    for method, task, seed in tqdm(jobs, desc=f"scoring {workshop.family.name} r = {rank}", unit="adapter"):
        result[method.name][task].append(scorer(task, method.adapter(workshop, collection, task, seed)))
    return result


def gain_share(scores: dict[str, dict[str, list[Score]]], method: str) -> Cell:
    """For each seed, the method's gain over the base as a share of the own LoRA's, summed over tasks; a word where that gains nothing."""

    def gain(name: str, seed: int) -> float:
        return sum(scores[name][task][seed]["gain"] - base[0]["gain"] for task, base in scores[BASE].items())

    seeds = len(next(iter(scores[method].values())))
    shares = [share_of(gain(method, seed), gain(OWN, 0)) for seed in range(seeds)]
    return "no gain" if None in shares else [share for share in shares if share is not None]


# ---------------------------------------------------------------------- which methods
def papers_methods(workshop: Workshop, rank: int, seeds: tuple[int, ...]) -> list[Method]:
    """The five rows of the paper's Tables 1 and 2."""
    collection = workshop.collection(rank)
    return [
        Method(OWN, _fixed(NearestAdapter(collection))),
        Method(BASE, None),
        Method(SOUP, _fixed(MeanOverTasks(collection))),
        Method(DIFFUSION, cache(lambda seed: workshop.diffusion(rank, seed)), seeds),
        Method(ICM, icm(workshop, rank), seeds),
    ]


def all_methods(workshop: Workshop, rank: int, scale: Scale) -> list[Method]:
    """Those of the paper and those that the literature asks for."""
    seeds = scale.seeds
    collection = workshop.collection(rank)
    scorer = workshop.scorer(collection)
    nearest, generator = _fixed(NearestAdapter(collection)), icm(workshop, rank)
    stored: list[tuple[str, Any]] = [
        ("Model Soup over snapshots (uniform)", SnapshotMean(collection)),
        ("own LoRA in int8", CompressedAdapters(collection, "int8")),
        ("own LoRA in int4", CompressedAdapters(collection, "int4")),
    ]
    if scale.searches:
        greedy = GreedySoup(collection, lambda task, vector: scorer(task, vector, "train")["gain"])
        stored.append(("Model Soup over snapshots (greedy)", greedy))
        stored.append(("one LoRA for all tasks", SingleAdapter(collection.layout, workshop.joint(rank))))
    if rank > 1:
        stored.append((f"own LoRA cut to rank {rank // 2}", CompressedAdapters(collection, "svd")))
    return [
        *papers_methods(workshop, rank, seeds),
        *[Method(name, _fixed(source)) for name, source in stored],
        Method("own LoRA + noise", _fixed(NoisySnapshot(collection)), seeds),
        Method("Gaussian of the snapshots", _fixed(CoordinateGaussian(collection)), seeds),
        Method(f"{NEAREST}, unseen phrasing", nearest, seeds, "unseen"),
        Method(f"{ICM}, unseen phrasing", generator, seeds, "unseen"),
        Method(f"{ICM}, another task's description", generator, seeds, "wrong"),
        Method(f"{ICM}, random condition", generator, seeds, "random"),
        Method(f"{ICM}, zero condition", generator, seeds, "zero"),
    ]


def icm(workshop: Workshop, rank: int) -> Callable[[int], AdapterSource]:
    """The family's generators of one rank, by seed."""
    return cache(lambda seed: workshop.generator(f"icm-r{rank}", workshop.collection(rank), seed))


def _fixed(source: AdapterSource) -> Callable[[int], AdapterSource]:
    return lambda seed: source
