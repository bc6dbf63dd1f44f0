"""What a new generator knows is fitted before it is trained: the threshold of its reader, and what the card says of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..conditioning import TaskEncoder
from ..generator.reading import Familiarity
from ..generator.text_reading import TextReader
from .conditions import unheard


def fit_text_reader(
    reader: TextReader, encoder: TaskEncoder, sentences: list[list[str]], vectors: list[Tensor], seed: int = 0
) -> dict[str, Any]:
    """Fit the reader of a `"direct"` generator on sentences of its tasks, on held-out phrasings and on foreign requests.

    Args:
        reader ([`TextReader`]): With fresh buffers.
        encoder (`TaskEncoder`): That reads text, alone or beside other things.
        sentences (`list[list[str]]`): Of each task its own.
        vectors (`list[Tensor]`): `[m, D]` of each task: its sentences, as the generator is trained on them.
        seed (`int`, defaults to 0): Of the held-out phrasings.

    Returns:
        `dict[str, Any]`: Of the threshold, for the card.
    """
    held_out, foreign = unheard(sentences, encoder, seed)
    said = slice(len(reader.center))
    held, foreign = torch.cat(held_out)[:, said], foreign[:, said]
    reader.fit(torch.cat(vectors)[:, said], indices(vectors), held, indices(held_out), foreign)
    return threshold_facts(reader, reader(held)[1], reader(foreign)[1])


def threshold_facts(reader: Familiarity, held_out: Tensor, foreign: Tensor) -> dict[str, Any]:
    """What a generator's card says of its threshold.

    Args:
        reader ([`Familiarity`]): Fitted.
        held_out (`Tensor`): `[H]` familiarity of held-out phrasings of its tasks.
        foreign (`Tensor`): `[F]` familiarity of requests for something else.

    Returns:
        `dict[str, Any]`
    """
    return {
        "familiarity_threshold": round(float(reader.threshold), 4),
        "held_out_phrasings": len(held_out),
        "held_out_phrasings_read": round(float((held_out >= reader.threshold).float().mean()), 4),
        "foreign_requests": len(foreign),
        "foreign_requests_read": round(float((foreign >= reader.threshold).float().mean()), 4) if len(foreign) else None,
    }


def indices(parts: list[Tensor]) -> Tensor:
    """The task of each row of all parts together.

    Args:
        parts (`list[Tensor]`): `[m, d]` of each task.

    Returns:
        `Tensor`: `[M]`.
    """
    return torch.cat([torch.full((len(part),), index) for index, part in enumerate(parts)])
