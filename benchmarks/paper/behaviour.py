"""The memorisation report's side that needs a base model: which predictions are wrong, and tasks that were left out."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou

from peft_icm.baselines import AdapterSource, NearestAdapter
from peft_icm.evaluation.memorisation import memorisation_report
from peft_icm.tasks.language_modeling import wrong_tokens

from .methods import DIFFUSION, ICM, icm
from .scales import TABLE_RANK, Scale
from .scoring import Scorer
from .workshop import Workshop

MATCH = 0.5  # IoU from which an object counts as found


def memorisation(workshop: Workshop, scale: Scale) -> dict[str, Any]:
    """Everything that tells whether the generators of one family memorise, r = 2.

    Returns:
        `dict`: JSON-able: `weights` (see [`memorisation_report`], for ICM-LoRA and COND P-DIFF, seed 0), `overlap` of wrong predictions
        with the task's own LoRA, and `left_out`: the gain of a generator that never saw the task, beside the LoRA that retrieval takes.
    """
    collection = workshop.collection(TABLE_RANK)
    seed = scale.seeds[0]
    weights = {
        ICM: memorisation_report(icm(workshop, TABLE_RANK)(seed), collection),
        DIFFUSION: memorisation_report(workshop.diffusion(TABLE_RANK, seed), collection),
    }
    return {"weights": weights, "overlap": overlap(workshop, scale), "left_out": left_out(workshop, scale)}


def overlap(workshop: Workshop, scale: Scale) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracy of adapters, and how far their wrong predictions are those of the task's own LoRA.

    After Zeng et al. (arXiv 2506.07998): the intersection over union of two models' wrong predictions. Tokens whose most likely
    prediction is wrong; objects that are not found. The own LoRA's last snapshot is compared with an earlier one of its own run, with
    generated adapters, with another task's LoRA and with the base.

    Returns:
        `dict`: By task and adapter, `{"accuracy", "overlap"}`; for detection the accuracy is the recall.
    """
    collection = workshop.collection(TABLE_RANK)
    scorer = workshop.scorer(collection)
    names = list(workshop.family.tasks)
    result: dict[str, dict[str, dict[str, float]]] = {}
    for index, task in enumerate(names):
        condition, seed = workshop.condition(task), scale.seeds[0]

        def made(source: AdapterSource) -> Tensor:
            return source.sample(condition, 1, torch.Generator().manual_seed(seed))[0]  # noqa: B023

        vectors: dict[str, Tensor | None] = {
            "own LoRA": collection.final(task),
            "own LoRA, first snapshot": collection.snapshots[task][0],
            ICM: made(icm(workshop, TABLE_RANK)(seed)),
            DIFFUSION: made(workshop.diffusion(TABLE_RANK, seed)),
            "another task's LoRA": collection.final(names[index - 1]),
            "original model": None,
        }
        wrong = {name: wrong_predictions(scorer, task, vector) for name, vector in vectors.items()}
        own = wrong["own LoRA"]
        result[task] = {
            name: {"accuracy": 1 - float(mask.float().mean()), "overlap": float((mask & own).sum() / (mask | own).sum().clamp(min=1))}
            for name, mask in wrong.items()
        }
    return result


def wrong_predictions(scorer: Scorer, task: str, vector: Tensor | None) -> Tensor:
    """`[N]` booleans: the tokens or the objects of the test set that an adapter gets wrong.

    Args:
        scorer ([`Scorer`]): Of the layout.
        task (`str`): Name of the task.
        vector (`Tensor`, *optional*): `[P]`; `None` is the base.
    """
    items, label = scorer.splits[task]["test"], getattr(scorer.tasks[task], "label", None)
    if label is None:
        return wrong_tokens(scorer.model(vector), scorer.processor, items)
    found = scorer.find(task, vector, items)
    missed = []
    for image, one in zip(items, found, strict=True):
        boxes = one["boxes"][[name == label for name in one["labels"]]].double()
        own = torch.tensor([box for box, name in zip(image.boxes, image.labels, strict=True) if name == label]).double().view(-1, 4)
        missed.append((box_iou(own, boxes) < MATCH).all(1))
    return torch.cat(missed)


def left_out(workshop: Workshop, scale: Scale) -> dict[str, dict[str, float]]:
    """For each task: the gain of a generator trained without it, asked for it, and that of retrieval from the same LoRAs.

    Returns:
        `dict`: By task, `{"own", ICM, "retrieval", "retrieved"}`: gains over the base (AP50, or nats per token), first seed; and the
        name of the task that retrieval takes.
    """
    collection = workshop.collection(TABLE_RANK)
    scorer = workshop.scorer(collection)
    result: dict[str, dict[str, Any]] = {}
    for task in workshop.family.tasks:
        rest = dataclasses.replace(
            collection,
            snapshots={name: rows for name, rows in collection.snapshots.items() if name != task},
            task_vectors={name: rows for name, rows in collection.task_vectors.items() if name != task},
            descriptions={name: texts for name, texts in collection.descriptions.items() if name != task},
        )
        condition, retrieval = workshop.condition(task), NearestAdapter(rest)
        base = scorer(task, None)["gain"]
        generator = workshop.generator(f"without-{task}", rest, scale.seeds[0])
        vector = generator.sample(condition, 1, torch.Generator().manual_seed(scale.seeds[0]))[0]
        result[task] = {
            "own": scorer(task, collection.final(task))["gain"] - base,
            ICM: scorer(task, vector)["gain"] - base,
            "retrieval": scorer(task, retrieval.sample(condition)[0])["gain"] - base,
            "retrieved": retrieval.lookup(condition)[0],
        }
    return result
