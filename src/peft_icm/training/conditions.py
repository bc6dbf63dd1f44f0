"""The task vectors that a generator is trained on, and those that tell it what it does not know."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapters.collection import AdapterCollection
from ..conditioning import TaskEncoder
from ..conditioning.phrasings import foreign, phrasings
from ..conditioning.spelling import respell, words_of
from ..tasks.annotated_images import crops
from ..tasks.detection import DetectionTask
from ..tasks.language_modeling import LanguageModelingTask
from ..tasks.records import Record

HELD_OUT_PHRASINGS, HELD_OUT_SENTENCES = 48, 4096  # of each task, and of all: of many tasks a few phrasings each are enough
EVERY = 5  # of the collection's own vectors, each fifth is kept for the threshold, where a task has as many
EXCERPTS, EXCERPT = 24, 400  # of a task's texts, and their characters
CROPS = 64  # pictures of a task's objects
ALIKE = 0.7  # cosine to a task's sentence above which a foreign request may well mean that task


@dataclass
class Conditions:
    """Task vectors by their use.

    Args:
        rows (`list[Tensor]`): `[m, d]` of each task: what is trained on.
        held_out (`list[Tensor]`): `[h, d]` of each task: what the threshold is fitted on.
        foreign (`Tensor`): `[f, d]` of requests for something else; f is 0 where the encoder reads no text.
    """

    rows: list[Tensor]
    held_out: list[Tensor]
    foreign: Tensor


def training_conditions(
    collection: AdapterCollection, encoder: TaskEncoder | None, count: int, seed: int = 0, *, threshold: bool = True
) -> Conditions:
    """The task vectors of a collection; with an encoder that reads text, those of phrasings of its tasks' sentences too.

    For a threshold each fifth of a task's own vectors is set aside, and nothing is trained on it.

    Args:
        collection (`AdapterCollection`): With task vectors.
        encoder (`TaskEncoder`, *optional*): That made them.
        count (`int`): Sentences that a task should have; a task with fewer gets phrasings of those it has. 0 for none.
        seed (`int`, defaults to 0): Of the phrasings.
        threshold (`bool`, defaults to `True`): Whether a threshold is to be fitted: without, nothing is held out, and nothing is foreign.

    Returns:
        [`Conditions`]

    Raises:
        `ValueError`: If all tasks have the same sentences: nothing tells them apart.
    """
    own = [collection.task_vectors[task].float() for task in collection.tasks]
    if len(own) > 1 and all(part.shape == own[0].shape and torch.equal(part, own[0]) for part in own[1:]):
        raise ValueError(
            f"The task vectors of all {len(own)} tasks are the same, {collection.tasks[0]!r} and the others: describe each task in its own"
            " words, then collection.encode(encoder)."
        )
    aside = [torch.arange(len(part)) % EVERY == EVERY - 1 for part in own] if threshold else [torch.zeros(len(part)).bool() for part in own]
    rows = [part[~mask] for part, mask in zip(own, aside, strict=True)]
    held_out = [part[mask] for part, mask in zip(own, aside, strict=True)]
    sentences = [collection.descriptions.get(task) or [] for task in collection.tasks]
    if encoder is None or "text" not in encoder.accepts or not count or not any(sentences):
        return Conditions(rows, held_out, own[0][:0])
    said = [_say(some, count - len(some), seed) if 0 < len(some) < count else [] for some in sentences]
    rows = [torch.cat(both) for both in zip(rows, _read(encoder, "text", said), strict=True)]
    if not threshold:
        return Conditions(rows, held_out, own[0][:0])
    said_otherwise, others = unheard(sentences, encoder, seed)
    return Conditions(rows, [torch.cat(both) for both in zip(held_out, said_otherwise, strict=True)], others)


def unheard(sentences: list[list[str]], encoder: TaskEncoder, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """What nothing is trained on: the tasks in other frames, and requests for something else.

    Args:
        sentences (`list[list[str]]`): Of each task.
        encoder (`TaskEncoder`): That reads text.
        seed (`int`, defaults to 0): Of the phrasings.

    Returns:
        `tuple[list[Tensor], Tensor]`: `[h, d]` of each task, where h is some 48, fewer among more than 85 tasks, and 0 for a task without a
        sentence; `[f, d]` of foreign requests, without those that are nearly a task's own sentence.
    """
    each = max(4, min(HELD_OUT_PHRASINGS, HELD_OUT_SENTENCES // len(sentences)))
    own = encoder.read("text", [sentence for task in sentences for sentence in task])
    words = words_of(sentence for task in sentences for sentence in task)

    def heard(lines: list[str]) -> list[str]:
        return [respell(line, words, encoder) for line in lines]

    held_out = _read(encoder, "text", [heard(_say(task, each, seed, held_out=True)) if task else [] for task in sentences])
    others = encoder.read("text", heard([*foreign(seed), *foreign(seed, held_out=True)]))
    far = (F.normalize(others, dim=1) @ F.normalize(own, dim=1).T).amax(1) < ALIKE
    return held_out, others[far]


def sentences_of(descriptions: list[str], count: int, seed: int = 0) -> list[str]:
    """A task's own sentences, and phrasings of them where they are fewer than `count`.

    Args:
        descriptions (`list[str]`): Its own.
        count (`int`): Sentences that it should have.
        seed (`int`, defaults to 0): Of the phrasings.

    Returns:
        `list[str]`
    """
    missing = count - len(descriptions)
    return [*descriptions, *(_say(descriptions, missing, seed) if missing > 0 else [])]


def _say(sentences: list[str], count: int, seed: int, held_out: bool = False) -> list[str]:
    each = math.ceil(count / len(sentences))
    return [line for sentence in sentences for line in phrasings(sentence, each, seed=seed, held_out=held_out)]


def task_conditions(tasks: Sequence[Any], encoder: TaskEncoder, count: int, seed: int = 0) -> list[list[Tensor]]:
    """The task vectors of tasks without a LoRA, from everything of them that an encoder reads.

    Args:
        tasks (`Sequence[LanguageModelingTask or DetectionTask]`): Their sentences, excerpts of their texts, pictures of their objects.
        encoder (`TaskEncoder`): That reads at least one of them.
        count (`int`): Sentences that a task should have: one with fewer gets phrasings of those it has. 0 for none.
        seed (`int`, defaults to 0): Of the phrasings.

    Returns:
        `list[list[Tensor]]`: Of each task `[m, d]` for each of `encoder.accepts` that it has.

    Raises:
        `ValueError`: If a task has nothing that the encoder reads.
    """
    found: list[list[Tensor]] = [[] for _ in tasks]
    for argument in encoder.accepts:
        if argument == "images":  # one task at a time: texts are small, pictures are not
            rows = [_read(encoder, argument, [_shown(task, argument, count, seed)])[0] for task in tasks]
        else:
            rows = _read(encoder, argument, [_shown(task, argument, count, seed) for task in tasks])
        for groups, group in zip(found, rows, strict=True):
            groups += [group] if len(group) else []
    nothing = next((task.name for task, groups in zip(tasks, found, strict=True) if not groups), None)
    if nothing is not None:
        raise ValueError(f"Task {nothing!r} has nothing that the {encoder.kind} encoder reads, {' or '.join(encoder.accepts)}.")
    return found


def _shown(task: Any, argument: str, count: int, seed: int) -> list[Any]:
    if argument == "text":
        return sentences_of(task.descriptions, count, seed)
    if argument == "examples" and isinstance(task, LanguageModelingTask):
        return excerpts(task.train_texts, EXCERPTS)
    if argument == "images" and isinstance(task, DetectionTask):
        return crops(task.train_images, task.label, CROPS)
    return []


def _read(encoder: TaskEncoder, argument: str, parts: list[list[Any]]) -> list[Tensor]:
    """`[len(part), d]` of each part, read together: what the encoder warns of is told once, and of all."""
    if not any(parts):
        return [torch.zeros(0, encoder.dim) for _ in parts]
    return list(encoder.read(argument, [item for part in parts for item in part]).split([len(part) for part in parts]))


def excerpts(texts: Sequence[Record], count: int) -> list[str]:
    """Pieces of 400 characters from all over the texts, at most so many; of a prompt its completion is part."""
    pieces = [text[start : start + EXCERPT] for text in map(str, texts) for start in range(0, len(text), EXCERPT)]
    pieces = [piece for piece in pieces if piece.strip()]
    return pieces[:: -(-len(pieces) // count)] if pieces else []
