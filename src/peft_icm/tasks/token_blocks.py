"""What a causal language model is trained on: rows of tokens, and which of them are to be predicted."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .fields import at_least
from .records import Conversation, Record

Rows: TypeAlias = Tensor | list[Tensor]
UNSCORED = -100  # the label of a token that is read alone


class TokenBlocks(Dataset[dict[str, Tensor]]):
    """Rows of tokens as `input_ids` and `labels`.

    Rows of different lengths are padded at the end by whoever puts them into one batch ([`adapters.examples.collate`]). That needs no
    attention mask: in a causal model no token sees what comes after it.

    Args:
        blocks (`Tensor` or `list[Tensor]`): N rows of tokens; packed ones are one tensor `[N, block_size]`.
        blocks_per_epoch (`int`, *optional*): An epoch is so many rows, drawn anew from all N with torch's global generator; by default
            it is each row once.
        labels (`Tensor` or `list[Tensor]`, *optional*): As `blocks`, -100 where nothing is to be predicted; by default all of it is.

    Raises:
        `ValueError`: If `blocks_per_epoch` is less than 1.
    """

    def __init__(self, blocks: Rows, blocks_per_epoch: int | None = None, labels: Rows | None = None):
        if blocks_per_epoch is not None:
            at_least(1, blocks_per_epoch=blocks_per_epoch)
        self.blocks, self.blocks_per_epoch, self.labels = blocks, blocks_per_epoch, labels

    def __len__(self) -> int:
        return self.blocks_per_epoch or len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = int(torch.randint(len(self.blocks), ())) if self.blocks_per_epoch else index
        return {"input_ids": self.blocks[row], "labels": (self.blocks if self.labels is None else self.labels)[row]}

    def fingerprint(self) -> str:
        """Hex digest over all rows, whichever of them an epoch draws."""
        digest = hashlib.sha256()
        for rows in (self.blocks, [] if self.labels is None else self.labels):
            for part in [rows] if isinstance(rows, Tensor) else rows:
                digest.update(f"{tuple(part.shape)}".encode() + part.numpy().tobytes())
        return digest.hexdigest()


def encoded(tokenizer: Any, record: Record) -> tuple[list[int], list[int]]:
    """The tokens of a record and their labels; its pieces are tokenised each on its own, as a prompt is when it is answered.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Of the base model.
        record (`Record`): A text, or prompt and completion, is put between BOS and EOS where the tokenizer has them; a chat template writes
            its own.

    Returns:
        `tuple[list[int], list[int]]`: Tokens, and labels: -100 for what is no target.

    Raises:
        `ValueError`: Of a conversation: see [`Conversation.pieces`].
    """
    pieces = [(record, True)] if isinstance(record, str) else record.pieces(tokenizer)
    parts = [(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], target) for text, target in pieces]
    if not isinstance(record, Conversation):
        start, end = ([] if token is None else [token] for token in (tokenizer.bos_token_id, tokenizer.eos_token_id))
        parts = [(start, isinstance(record, str)), *parts, (end, True)]
    ids = [token for part, _ in parts for token in part]
    return ids, [token if target else UNSCORED for part, target in parts for token in part]


def packed(rows: Sequence[tuple[list[int], list[int]]], block_size: int, blocks_per_epoch: int | None) -> TokenBlocks:
    """Rows one after the other, cut into blocks.

    Args:
        rows (`Sequence[tuple[list[int], list[int]]]`): Tokens and labels, at least a block of them.
        block_size (`int`): Tokens in a block; the short tail is dropped, and so is a block without a target.
        blocks_per_epoch (`int`, *optional*): See [`TokenBlocks`].

    Returns:
        [`TokenBlocks`]
    """
    ids, labels = (torch.tensor([token for row in rows for token in row[part]]) for part in (0, 1))
    count = len(ids) // block_size
    blocks, targets = (part[: count * block_size].view(count, block_size) for part in (ids, labels))
    if torch.equal(ids, labels):
        return TokenBlocks(blocks, blocks_per_epoch)
    some = (targets[:, 1:] != UNSCORED).any(1)
    return TokenBlocks(blocks[some], blocks_per_epoch, targets[some])


def padded(rows: Sequence[tuple[list[int], list[int]]], block_size: int, blocks_per_epoch: int | None) -> TokenBlocks:
    """Each row on its own. A longer one loses the beginning of its prompt and, where that is not enough, its end.

    Args:
        rows (`Sequence[tuple[list[int], list[int]]]`): Tokens and labels.
        block_size (`int`): Tokens in a row, at most.
        blocks_per_epoch (`int`, *optional*): See [`TokenBlocks`].

    Returns:
        [`TokenBlocks`]
    """
    blocks, targets = [], []
    for ids, labels in rows:
        first = next(place for place, label in enumerate(labels) if label != UNSCORED)
        start = max(0, min(len(ids) - block_size, first - 1))  # one token is left to predict the first target from
        blocks.append(torch.tensor(ids[start : start + block_size]))
        targets.append(torch.tensor(labels[start : start + block_size]))
    return TokenBlocks(blocks, blocks_per_epoch, targets)
