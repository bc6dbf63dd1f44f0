"""Language modelling as a task: real text in, nats, perplexity and bits per character out."""

from __future__ import annotations

import hashlib
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

from ..disk import safe_name
from .fields import at_least, make_tasks, path_from_json, read_tasks_json, strings

UNBOUNDED_WINDOW = 1024  # tokens that a model without a bound of its own reads at once, unless told
DOCUMENT_SEPARATOR = "\n\x00\n"


class TokenBlocks(Dataset[dict[str, Tensor]]):
    """Packed tokens as `input_ids` and `labels`.

    Args:
        blocks (`Tensor`): `[N, block_size]`.
        blocks_per_epoch (`int`, *optional*): An epoch is so many blocks, drawn anew from all N with torch's global generator; by default
            it is each block once.

    Raises:
        `ValueError`: If `blocks_per_epoch` is less than 1.
    """

    def __init__(self, blocks: Tensor, blocks_per_epoch: int | None = None):
        if blocks_per_epoch is not None:
            at_least(1, blocks_per_epoch=blocks_per_epoch)
        self.blocks, self.blocks_per_epoch = blocks, blocks_per_epoch

    def __len__(self) -> int:
        return self.blocks_per_epoch or len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.blocks[int(torch.randint(len(self.blocks), ())) if self.blocks_per_epoch else index]
        return {"input_ids": row, "labels": row}

    def fingerprint(self) -> str:
        """Hex digest over all blocks, whichever of them an epoch draws."""
        return hashlib.sha256(f"{tuple(self.blocks.shape)}".encode() + self.blocks.numpy().tobytes()).hexdigest()


@dataclass
class LanguageModelingTask:
    """A text domain.

    Args:
        name (`str`): Short name, a valid file name.
        descriptions (`list[str]`): Sentences that ask for it; the first is the canonical one. Here as below one string is a list of one.
        train_texts (`list[str]`): Documents to train on.
        test_texts (`list[str]`): Held-out documents.
        unseen_descriptions (`list[str]`): Sentences that ask for it and that no generator is trained on; for evaluation.

    Raises:
        `ValueError`: If the name is no file name ([`safe_name`]), or something else is no list of strings, or a description is blank.

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

    def __post_init__(self) -> None:
        safe_name(self.name, "task")
        for name in ("descriptions", "unseen_descriptions", "train_texts", "test_texts"):
            value = strings(getattr(self, name), f"{name} of task {self.name!r}", blank=name.endswith("texts"))
            setattr(self, name, value)

    def train_dataset(self, tokenizer: Any, block_size: int = 256, blocks_per_epoch: int | None = None) -> TokenBlocks:
        """Pack the training documents, each between BOS and EOS where the tokenizer has them, into blocks.

        Args:
            tokenizer (`PreTrainedTokenizerBase`): Of the base model.
            block_size (`int`, defaults to 256): Tokens in a block, at least two; the short tail is dropped.
            blocks_per_epoch (`int`, *optional*): Blocks in an epoch, drawn anew from the whole text in each; by default each block once.

        Returns:
            [`TokenBlocks`]

        Raises:
            `ValueError`: If the texts do not fill one block, or a number is too small.
        """
        at_least(2, block_size=block_size)  # a token is predicted from those before it
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
    files (or null) whose documents are separated by a line with a NUL character; blank documents are left out, and so may
    `unseen_descriptions` be. Names of files are relative to the folder and stay inside it, or absolute.

    Args:
        folder (`str` or `Path`): The folder.

    Returns:
        `list[LanguageModelingTask]`

    Raises:
        `ValueError`: If there is no readable `tasks.json`, it names a file that is not there, is no UTF-8 or lies outside, or a field is of
            another type; the message names file, task and field.
    """
    document = read_tasks_json(folder, '{"tasks": [{"name", "descriptions", "train", "test"}]}')

    def read(entry: dict[str, Any], split: str) -> list[str]:
        name = entry.get(split)
        if name is None:
            return []
        file = path_from_json(folder, name, split)
        if not file.is_file():
            raise ValueError(f"{split} names {name}, which is not there.")
        try:
            texts = file.read_text(encoding="utf-8").split(DOCUMENT_SEPARATOR)
        except UnicodeDecodeError as error:
            raise ValueError(f"{split} names {name}, which is no text in UTF-8 ({error}).") from error
        return [text for text in texts if text.strip()]

    def make(entry: dict[str, Any]) -> LanguageModelingTask:
        unseen = entry.get("unseen_descriptions", [])
        return LanguageModelingTask(entry["name"], entry["descriptions"], read(entry, "train"), read(entry, "test"), unseen)

    return make_tasks(folder, document["tasks"], make)


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
        texts (`Sequence[str]`): Non-empty documents, at least one.
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
    if isinstance(texts, str) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError("texts must be a list of non-empty strings, at least one.")
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
    ids = [[start, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]] for text in texts]
    known = model.get_input_embeddings().num_embeddings
    for text, own in zip(texts, ids, strict=True):
        if len(own) == 1:
            raise ValueError(f"texts: the tokenizer makes no token of {text!r:.80}: leave it out.")
        if max(own) >= known:
            raise ValueError(f"The tokenizer makes the token {max(own)}, the model only knows {known}: take the tokenizer of this model.")
    jobs = sorted(
        ((index, *window) for index, row in enumerate(ids) for window in windows(len(row), size)),
        key=lambda job: job[2] - job[1],
    )
    batches = [jobs[i : i + batch_size] for i in range(0, len(jobs), batch_size)]
    was_training = model.training
    model.eval()
    try:
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
    finally:
        model.train(was_training)
