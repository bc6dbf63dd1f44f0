"""Likelihoods of a language task's records: nats, perplexity and bits per character."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from .fields import at_least
from .records import Record
from .token_blocks import UNSCORED, encoded

UNBOUNDED_WINDOW = 1024  # tokens that a model without a bound of its own reads at once, unless told


@dataclass
class NLL:
    """Negative log-likelihood of raw text, or of completions, under a language model.

    Args:
        nats (`float`): Summed over all tokens.
        tokens (`int`): Tokens scored.
        characters (`int`): Unicode characters of the raw text, or of the completions.
    """

    nats: float
    tokens: int
    characters: int

    @property
    def nats_per_token(self) -> float:
        """Mean negative log-likelihood of a token; NaN of no tokens."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """`exp(nats per token)`, infinite where that is beyond floats; depends on the tokenizer."""
        return torch.tensor(self.nats_per_token, dtype=torch.float64).exp().item()

    @property
    def bits_per_character(self) -> float:
        """`nats / ln 2 / characters`; does not depend on the tokenizer; NaN of no characters."""
        return self.nats / math.log(2) / self.characters if self.characters else math.nan

    def __add__(self, other: NLL) -> NLL:
        return NLL(self.nats + other.nats, self.tokens + other.tokens, self.characters + other.characters)


def context_size(config: Any) -> int | None:
    """Tokens that a model has positions for.

    Args:
        config (`PreTrainedConfig`): Of the model; of one that sees too, that of its language model is read.

    Returns:
        `int` or `None`: None where the config names no bound, as with ALiBi, relative positions and recurrence.
    """
    text = config.get_text_config()
    bounds = (getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len", "context_length"))
    return next((bound for bound in bounds if isinstance(bound, int) and bound > 0), None)


def windows(length: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Cut positions `1 .. length - 1` into windows of `size` tokens: `(start, end, first scored)`.

    Each position is scored exactly once, with at least half a window of context where there is that much. A window is two tokens at least,
    or `ValueError` is raised: one to read and one to score.

    >>> list(windows(10, 4))
    [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 10, 8)]
    """
    at_least(2, window=size)
    stride, scored, start = size // 2, 1, 0
    while scored < length:
        end = min(start + size, length)
        yield start, end, scored
        scored, start = end, start + stride


@torch.no_grad()
def nll(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Record],
    *,
    max_length: int | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> list[NLL]:
    """Score texts under a causal language model, with or without an adapter; of a completion or a conversation what is to be said.

    Every document stands on its own behind one BOS (EOS where there is no BOS), so that its first token is scored too. A
    completion is scored given its prompt, and its end (EOS) with it. What is longer than a window is cut into overlapping windows in which
    every token is scored once.

    Args:
        model (`PreTrainedModel` or `PeftModel`): A causal language model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        texts (`Sequence[Record]`): Non-empty documents, completions or conversations, at least one.
        max_length (`int`, *optional*): Window in tokens, at least two; by default, and at most, the model's number of positions. Models
            without a bound read 1024 tokens by default.
        batch_size (`int`, defaults to 16): Windows in a forward pass.
        progress (`bool`, defaults to `True`): Show a progress bar when there are more than 20 batches.

    Returns:
        `list[NLL]`: One for each text; they add up.

    Raises:
        `ValueError`: If there is no text, one is empty or makes no token, a number is too small, the tokenizer has neither BOS nor EOS or
            is of another model, or the model is no causal language model.
    """
    totals = [0.0] * len(texts)
    sizes = [0] * len(texts)
    for rows, logits, labels in _score(model, tokenizer, texts, max_length, batch_size, progress):
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=UNSCORED)
        losses = losses.view(len(rows), -1).double().sum(1)
        for text, loss, count in zip(rows, losses.tolist(), (labels != UNSCORED).sum(1).tolist(), strict=True):
            totals[text] += loss
            sizes[text] += count
    characters = [len(text if isinstance(text, str) else text.target) for text in texts]
    return [NLL(*each) for each in zip(totals, sizes, characters, strict=True)]


@torch.no_grad()
def wrong_tokens(
    model: Any, tokenizer: Any, texts: Sequence[Record], *, max_length: int | None = None, batch_size: int = 16, progress: bool = True
) -> Tensor:
    """Which scored tokens of texts are not the model's most likely prediction.

    Args:
        model (`PreTrainedModel` or `PeftModel`): A causal language model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        texts, max_length, batch_size, progress: See [`nll`].

    Returns:
        `Tensor`: `[tokens]` booleans, in an order that is the same for every model of one tokenizer.

    Raises:
        `ValueError`: See [`nll`].
    """
    parts = [
        (logits.argmax(-1) != labels)[labels != UNSCORED].cpu()
        for _, logits, labels in _score(model, tokenizer, texts, max_length, batch_size, progress)
    ]
    return torch.cat(parts)


def _score(
    model: Any, tokenizer: Any, texts: Sequence[Record], max_length: int | None, batch_size: int, progress: bool
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Batches of windows, shortest first: the text of each row, logits `[B, T, V]`, and the next tokens `[B, T]` (-100: not scored)."""
    if isinstance(texts, str) or not texts or not all(isinstance(text, Record) and text for text in texts):
        raise ValueError("texts must be a list of non-empty strings, completions or conversations, at least one.")
    at_least(1, batch_size=batch_size)
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ValueError(f"{type(model).__name__} of {model.config.model_type} is no causal language model: it cannot score text.")
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError("The tokenizer has neither a BOS nor an EOS token to put before the first token of a text.")
    limit = context_size(model.config)
    size = (limit or UNBOUNDED_WINDOW) if max_length is None else max_length
    at_least(2, max_length=size)
    size = min(size, limit or size)
    rows = [_row(tokenizer, text, start) for text in texts]
    known = model.get_input_embeddings().num_embeddings
    for text, (own, _) in zip(texts, rows, strict=True):
        if len(own) == 1:
            raise ValueError(f"texts: the tokenizer makes no token of {text!r:.80}: leave it out.")
        if max(own) >= known:
            raise ValueError(f"The tokenizer makes the token {max(own)}, the model only knows {known}: take the tokenizer of this model.")
    jobs = sorted(
        (
            (index, begin, end, first)
            for index, (own, targets) in enumerate(rows)
            for begin, end, first in windows(len(own), size)
            if any(label != UNSCORED for label in targets[first:end])
        ),
        key=lambda job: job[2] - job[1],
    )
    batches = [jobs[i : i + batch_size] for i in range(0, len(jobs), batch_size)]
    was_training = model.training
    model.eval()
    try:
        for batch in tqdm(batches, desc="scoring", leave=False, disable=not progress or len(batches) <= 20):
            width = max(end - begin for _, begin, end, _ in batch)
            tokens = torch.full((len(batch), width), start)
            mask, labels = torch.zeros_like(tokens), torch.full_like(tokens, UNSCORED)
            for row, (index, begin, end, first) in enumerate(batch):
                own, targets = rows[index]
                tokens[row, : end - begin], mask[row, : end - begin] = torch.tensor(own[begin:end]), 1
                labels[row, first - begin : end - begin] = torch.tensor(targets[first:end])
            tokens, mask, labels = (tensor.to(model.device) for tensor in (tokens, mask, labels))
            logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1].float()
            yield [index for index, *_ in batch], logits, labels[:, 1:]
    finally:
        model.train(was_training)


def _row(tokenizer: Any, text: Record, start: int) -> tuple[list[int], list[int]]:
    """Tokens and labels of what is scored: a raw text has no end that would be scored too."""
    if not isinstance(text, str):
        return encoded(tokenizer, text)
    ids = [start, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    return ids, ids
