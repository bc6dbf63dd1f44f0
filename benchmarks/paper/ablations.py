"""What each addition of this project is worth: the default generator against one with that addition taken away."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peft_icm.adapters.attach import attach
from peft_icm.adapters.base import load_base, untie
from peft_icm.adapters.collection import AdapterCollection
from peft_icm.adapters.fidelity import relative_error
from peft_icm.adapters.gauge import canonicalize
from peft_icm.baselines import stored_bytes
from peft_icm.conditioning import HiddenStateEncoder

from .methods import BASE, OWN, Method, compare, gain_share
from .results import Cell, Table
from .scales import PRINCIPAL, TABLE_RANK, Scale
from .tables import SHARE
from .workshop import Workshop

STATES = 24  # examples of each task whose states make its task vectors; a generator reads as many others


def ablations(workshop: Workshop, scale: Scale) -> Table:
    """The table of ablations of one family, r = 2."""
    shared = workshop.collection(TABLE_RANK)
    apart = workshop.collection(TABLE_RANK, seeds=range(len(workshop.tasks)))
    single = dataclasses.replace(shared, task_vectors={task: rows[:1] for task, rows in shared.task_vectors.items()})
    ours = workshop.family.generator.get("architecture", "principal") == "principal"
    other = {"architecture": "paper", "latent_size": 64, "kl_weight": 0.005} if ours else {"architecture": "principal", **PRINCIPAL}
    other |= {"epochs": scale.conv_epochs, "batch_size": 8}
    variants: dict[str, tuple[AdapterCollection, dict[str, Any]]] = {
        "default": (shared, {}),
        "without context of other tasks": (shared, {"context": False}),
        "without phrasing augmentation": (single, {"max_handful": 1, "condition_noise": 0.0}),
        "architecture of the paper" if ours else "our architecture": (shared, other),
        "LoRAs in the balanced gauge": (in_one_gauge(shared), {}),
        "LoRAs with seeds of their own": (apart, {}),
        "LoRAs with seeds of their own, balanced gauge": (in_one_gauge(apart), {}),
    }
    rows = {}
    for name, (collection, changes) in variants.items():
        rows[name] = _row(workshop, scale, name, collection, changes, workshop.condition)
    for name, tuned in (("task vectors from the unadapted base", False), ("task vectors from the tasks' own LoRAs", True)):
        seen, unseen = states(workshop, shared, tuned)
        collection = dataclasses.replace(shared, task_vectors=seen, encoder=None)
        rows[name] = _row(workshop, scale, name, collection, {}, lambda task, phrasing=None: unseen[task].mean(0))  # noqa: B023
    columns = [SHARE, "error on dW", "error on dW, unseen phrasing", "kB"]
    notes = [
        f"Family {workshop.family.name}, r = {TABLE_RANK}, seeds {list(scale.seeds)}. Errors: relative, to the own LoRA, mean over tasks.",
        "Without phrasing augmentation: each task's first description alone, no other sentences, pictures or noise.",
        f"Task vectors of hidden states: {STATES} examples of each task, generated from the mean of {STATES} others, no phrasings.",
        "Those from the tasks' own LoRAs, the paper's, need at generation the LoRA that is to be generated.",
        f"Architecture {other['architecture']}: {scale.conv_epochs} epochs in batches of 8 and one seed, the others"
        f" {workshop.family.epochs} epochs; what each costs in time: benchmarks/train.py.",
    ]
    return Table("ablations", "Ablations", columns, rows, notes=notes)


def _row(
    workshop: Workshop, scale: Scale, name: str, collection: AdapterCollection, changes: dict[str, Any], condition: Callable[..., Tensor]
) -> dict[str, Cell]:
    """Score and measure the generators of one variant, one for each seed."""
    seeds = scale.seeds[:1] if "architecture" in changes else scale.seeds
    folder = f"icm-r{TABLE_RANK}" if name == "default" else f"ablation-{name.replace(' ', '-')}"
    generators = {seed: workshop.generator(folder, collection, seed, **changes) for seed in seeds}
    layout, tasks = collection.layout, workshop.family.tasks

    def made(task: str, seed: int, phrasing: int | None = None) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        return generators[seed].sample(condition(task, phrasing), 1, draw)

    def errors(phrasing: bool) -> list[float]:
        return [
            sum(
                float(relative_error(layout, made(task, seed, seed if phrasing else None), collection.final(task)[None]).squeeze())
                for task in tasks
            )
            / len(tasks)
            for seed in seeds
        ]

    scorer = workshop.scorer(collection)
    scores = compare(workshop, collection, [Method(BASE, None)])
    scores[OWN] = {task: [scorer(task, collection.final(task))] for task in tasks}
    scores[name] = {task: [scorer(task, made(task, seed)[0]) for seed in seeds] for task in tasks}
    row: dict[str, Cell] = {
        SHARE: gain_share(scores, name),
        "error on dW": errors(False),
        "kB": f"{stored_bytes(generators[seeds[0]]) / 1000:,.0f}",
    }
    if condition == workshop.condition:
        row["error on dW, unseen phrasing"] = errors(True)
    return row


def in_one_gauge(collection: AdapterCollection) -> AdapterCollection:
    """The same LoRAs, every pair of factors balanced; the products BA do not change.

    Args:
        collection (`AdapterCollection`): Of any gauge.

    Returns:
        `AdapterCollection`
    """
    layout = collection.layout
    snapshots = {
        task: torch.stack([layout.flatten(canonicalize(layout.unflatten(vector))) for vector in rows])
        for task, rows in collection.snapshots.items()
    }
    return dataclasses.replace(collection, snapshots=snapshots)


def states(workshop: Workshop, collection: AdapterCollection, tuned: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Task vectors of Eq. 1: last states on examples of each task.

    Args:
        workshop ([`Workshop`]): Of the family.
        collection (`AdapterCollection`): With the own LoRAs.
        tuned (`bool`): From the model with the task's own LoRA merged, as in the paper, instead of the unadapted base.

    Returns:
        `tuple[dict[str, Tensor], dict[str, Tensor]]`: `[M, d]` for each task, of training examples and of test examples.
    """
    processor = workshop.scorer(collection).processor
    seen, unseen = {}, {}
    for task in workshop.tasks:
        model: Any = load_base(collection.layout, workshop.base, None)
        if tuned:
            own = collection.layout.unflatten(collection.final(task.name))
            model = untie(attach(model, collection.layout, own)).merge_and_unload()
        encoder = HiddenStateEncoder(copy.copy(model), processor, workshop.base)
        read = workshop.pictures.get(task.name) or _passages(task.train_texts)
        seen[task.name] = encoder.encode(read[:STATES])
        unseen[task.name] = encoder.encode(
            (workshop.unseen_pictures(task.name) if task.name in workshop.pictures else _passages(task.test_texts))[:STATES]
        )
    return seen, unseen


def _passages(texts: list[str], characters: int = 400) -> list[str]:
    """Passages of one length, from all over the texts."""
    pieces = [text[start : start + characters] for text in texts for start in range(0, len(text) - characters, characters)]
    return pieces[:: max(1, len(pieces) // STATES)]
