"""Language modelling as a task: real text in, nats, perplexity and bits per character out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

DOCUMENT_SEPARATOR = "\n\x00\n"


class TokenBlocks(Dataset[dict[str, Tensor]]):
    """Packed tokens as `input_ids` and `labels`.

    Args:
        blocks (`Tensor`): `[N, block_size]`.
        blocks_per_epoch (`int`, *optional*): An epoch is so many blocks, drawn anew from all N with torch's global generator; by default
            it is each block once.
    """

    def __init__(self, blocks: Tensor, blocks_per_epoch: int | None = None):
        self.blocks, self.blocks_per_epoch = blocks, blocks_per_epoch

    def __len__(self) -> int:
        return self.blocks_per_epoch or len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.blocks[int(torch.randint(len(self.blocks), ())) if self.blocks_per_epoch else index]
        return {"input_ids": row, "labels": row}


@dataclass
class LanguageModelingTask:
    """A text domain.

    Args:
        name (`str`): Short name, a valid file name.
        descriptions (`list[str]`): Sentences that ask for it; the first is the canonical one.
        train_texts (`list[str]`): Documents to train on.
        test_texts (`list[str]`): Held-out documents.
        unseen_descriptions (`list[str]`): Sentences that ask for it and that no generator is trained on; for evaluation.

    Example:

    ```python
    >>> task = LanguageModelingTask("poems", ["write poems"], ["Roses are red."], ["Violets are blue."])
    >>> task.descriptions[0]
    'write poems'

    ```
    """

    name: str
    descriptions: list[str]
    train_texts: list[str]
    test_texts: list[str]
    unseen_descriptions: list[str] = field(default_factory=list)

    def train_dataset(self, tokenizer: Any, block_size: int = 256, blocks_per_epoch: int | None = None) -> TokenBlocks:
        """Pack the training documents, each between BOS and EOS where the tokenizer has them, into blocks.

        Args:
            tokenizer (`PreTrainedTokenizerBase`): Of the base model.
            block_size (`int`, defaults to 256): Tokens in a block; the short tail is dropped.
            blocks_per_epoch (`int`, *optional*): Blocks in an epoch, drawn anew from the whole text in each; by default each block once.

        Returns:
            [`TokenBlocks`]

        Raises:
            `ValueError`: If the texts do not fill one block.
        """
        start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        ids: list[int] = []
        for text in self.train_texts:
            ids += start + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end
        count = len(ids) // block_size
        if count == 0:
            raise ValueError(f"Task {self.name!r} has {len(ids)} training tokens, less than one block of {block_size}.")
        return TokenBlocks(torch.tensor(ids[: count * block_size]).view(count, block_size), blocks_per_epoch)


def load_tasks(folder: str | Path) -> list[LanguageModelingTask]:
    r"""Read the tasks of a folder.

    `tasks.json` holds `{"tasks": [{"name", "descriptions", "unseen_descriptions", "train", "test"}]}`, where train and test name text
    files (or null) whose documents are separated by a line with a NUL character; `unseen_descriptions` may be left out.

    Args:
        folder (`str` or `Path`): The folder.

    Returns:
        `list[LanguageModelingTask]`

    Raises:
        `ValueError`: If there is no readable `tasks.json`, or it names a file that is not there.
    """
    root = Path(folder)
    try:
        entries = [
            (entry["name"], entry["descriptions"], entry.get("train"), entry.get("test"), entry.get("unseen_descriptions", []))
            for entry in json.loads((root / "tasks.json").read_text(encoding="utf-8"))["tasks"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{root} needs a tasks.json of the form {{"tasks": [{{"name", "descriptions", ...}}]}} ({error!r}).') from error

    def read(name: str | None) -> list[str]:
        if name is None:
            return []
        if not (root / name).is_file():
            raise ValueError(f"{root / 'tasks.json'} names {name}, which is not there.")
        return (root / name).read_text(encoding="utf-8").split(DOCUMENT_SEPARATOR)

    return [
        LanguageModelingTask(name, descriptions, read(train), read(test), unseen) for name, descriptions, train, test, unseen in entries
    ]


@dataclass
class NLL:
    """Negative log-likelihood of raw text under a language model.

    Args:
        nats (`float`): Summed over all tokens.
        tokens (`int`): Tokens scored.
        characters (`int`): Unicode characters of the raw text.
    """

    nats: float
    tokens: int
    characters: int

    @property
    def nats_per_token(self) -> float:
        """Mean negative log-likelihood of a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """`exp(nats per token)`; depends on the tokenizer."""
        return math.exp(self.nats_per_token)

    @property
    def bits_per_character(self) -> float:
        """`nats / ln 2 / characters`; does not depend on the tokenizer."""
        return self.nats / math.log(2) / self.characters

    def __add__(self, other: NLL) -> NLL:
        return NLL(self.nats + other.nats, self.tokens + other.tokens, self.characters + other.characters)


def windows(length: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Cut positions `1 .. length - 1` into windows of `size` tokens: `(start, end, first scored)`.

    Each position is scored exactly once, with at least half a window of context where there is that much.

    >>> list(windows(10, 4))
    [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 10, 8)]
    """
    stride, scored, start = size // 2, 1, 0
    while scored < length:
        end = min(start + size, length)
        yield start, end, scored
        scored, start = end, start + stride


@torch.no_grad()
def nll(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_length: int | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> list[NLL]:
    """Score raw texts under a causal language model, with or without an adapter.

    Every document stands on its own behind one BOS (EOS where there is no BOS), so that its first token is scored too. Longer ones are
    cut into overlapping windows in which every token is scored once.

    Args:
        model (`PreTrainedModel` or `PeftModel`): A causal language model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        texts (`Sequence[str]`): Non-empty documents.
        max_length (`int`, *optional*): Window in tokens; by default, and at most, the model's number of positions.
        batch_size (`int`, defaults to 16): Windows in a forward pass.
        progress (`bool`, defaults to `True`): Show a progress bar when there are more than 20 batches.

    Returns:
        `list[NLL]`: One for each text; they add up.

    Raises:
        `ValueError`: If a text is empty, or the tokenizer has neither BOS nor EOS.
    """
    totals = [0.0] * len(texts)
    sizes = [0] * len(texts)
    for rows, logits, labels in _score(model, tokenizer, texts, max_length, batch_size, progress):
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
        losses = losses.view(len(rows), -1).double().sum(1)
        for text, loss, count in zip(rows, losses.tolist(), (labels != -100).sum(1).tolist(), strict=True):
            totals[text] += loss
            sizes[text] += count
    return [NLL(total, size, len(text)) for total, size, text in zip(totals, sizes, texts, strict=True)]


@torch.no_grad()
def wrong_tokens(
    model: Any, tokenizer: Any, texts: Sequence[str], *, max_length: int | None = None, batch_size: int = 16, progress: bool = True
) -> Tensor:
    """Which tokens of raw texts are not the model's most likely prediction.

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
        (logits.argmax(-1) != labels)[labels != -100].cpu()
        for _, logits, labels in _score(model, tokenizer, texts, max_length, batch_size, progress)
    ]
    return torch.cat(parts)


def _score(
    model: Any, tokenizer: Any, texts: Sequence[str], max_length: int | None, batch_size: int, progress: bool
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Batches of windows, shortest first: the text of each row, logits `[B, T, V]`, and the next tokens `[B, T]` (-100: not scored)."""
    if isinstance(texts, str) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError("texts must be a list of non-empty strings.")
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError("The tokenizer has neither a BOS nor an EOS token to put before the first token of a text.")
    limit = model.config.max_position_embeddings
    size = min(max_length or limit, limit)
    ids = [[start, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]] for text in texts]
    jobs = sorted(
        ((index, *window) for index, row in enumerate(ids) for window in windows(len(row), size)),
        key=lambda job: job[2] - job[1],
    )
    was_training = model.training
    model.eval()
    batches = [jobs[i : i + batch_size] for i in range(0, len(jobs), batch_size)]
    for batch in tqdm(batches, desc="scoring", leave=False, disable=not progress or len(batches) <= 20):
        width = max(end - begin for _, begin, end, _ in batch)
        tokens = torch.full((len(batch), width), start)
        mask, labels = torch.zeros_like(tokens), torch.full_like(tokens, -100)
        for row, (index, begin, end, first) in enumerate(batch):
            piece = torch.tensor(ids[index][begin:end])
            tokens[row, : len(piece)], mask[row, : len(piece)] = piece, 1
            labels[row, first - begin : len(piece)] = piece[first - begin :]
        tokens, mask, labels = (tensor.to(model.device) for tensor in (tokens, mask, labels))
        logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1].float()
        yield [index for index, *_ in batch], logits, labels[:, 1:]
    model.train(was_training)
