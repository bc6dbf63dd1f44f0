"""TaskEncoder: what the three kinds share."""

from __future__ import annotations

import logging
import os
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self, TypedDict

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from ..pictures import Picture, open_picture

logger = logging.getLogger(__name__)

MAX_TOKENS = 2**14  # of a forward pass, padding among them: 16 texts of 1,024
Item = str | Image.Image
READS: dict[str, tuple[type, str]] = {  # argument -> what its items are
    "text": (str, "non-empty strings"),
    "examples": (str, "non-empty strings"),
    "images": (Image.Image, "PIL images"),
}


class HubOptions(TypedDict, total=False):
    """How a checkpoint is found: as `from_pretrained` of transformers takes them."""

    token: str | bool | None
    cache_dir: str | os.PathLike[str] | None
    local_files_only: bool


class TaskEncoder(ABC):
    """Turns texts, examples or pictures into task vectors.

    Attributes:
        kind (`str`): Name of the kind in a generator's config.
        accepts (`tuple[str, ...]`): Which of `"text"`, `"examples"` and `"images"` it reads: arguments of
            [`ICMGenerator.generate_adapter`].
        config (`dict`): `kind`, `checkpoint`, `dim`, `sha256` of the weights, `config_sha256` of tokenizer and configs, and the options
            of the kind, JSON-able.
        options (`tuple[str, ...]`): What `from_pretrained` takes out of a config, beside the checkpoint.
        max_tokens (`int`, *optional*): Tokens of a text that are read; `None` where there is no limit.
        picture_tokens (`int`, defaults to 1): Tokens that a picture becomes, where these are what its reading takes memory for.
    """

    kind: ClassVar[str]
    options: ClassVar[tuple[str, ...]]
    accepts: tuple[str, ...]
    config: dict[str, Any]
    max_tokens: int | None
    picture_tokens: int = 1
    model: Any

    @classmethod
    @abstractmethod
    def from_pretrained(cls, checkpoint: str, **options: Any) -> TaskEncoder:
        """Load the encoder from a folder, a Hub id, or whatever else its library names checkpoints by."""

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> None:
        """Write a copy that `from_pretrained` loads from wherever the folder is moved."""

    @abstractmethod
    def _embed(self, items: list[Any]) -> Tensor:
        """`[len(items), dim]` of one batch, either strings or pictures."""

    @abstractmethod
    def count_tokens(self, texts: list[str]) -> list[int]:
        """Tokens of each text, those that start and end it too, however many are read."""

    @property
    def dim(self) -> int:
        """d, the width of a task vector."""
        return self.config["dim"]

    def to(self, device: str | int | torch.device, dtype: torch.dtype | None = None) -> Self:
        """Move the model; task vectors are fp32 on the CPU all the same.

        Args:
            device (`str`, `int` or `torch.device`): Where the model computes from now on.
            dtype (`torch.dtype`, *optional*): In what; by default as it is.

        Returns:
            `TaskEncoder`: Itself.
        """
        self.model.to(device=device, dtype=dtype)
        return self

    def check(self, config: Mapping[str, Any]) -> None:
        """Refuse to stand in for another encoder.

        Args:
            config (`Mapping`): That of a generator or a collection; what was saved by peft_icm 0.1.0 has no `config_sha256`.

        Raises:
            `ValueError`: If weights, tokenizer or configs are not those that `config` names.
        """
        for field, what in {"sha256": "weights", "config_sha256": "tokenizer and configs"}.items():
            wanted, found = config.get(field), self.config[field]
            if wanted and wanted != found:
                raise ValueError(
                    f"The {self.kind} encoder at {self.config['checkpoint']} has {what} of sha256 {found[:12]}, expected {wanted[:12]}:"
                    " it is not the one that the task vectors were made with."
                )

    @torch.inference_mode()
    def encode(self, items: Sequence[Item], batch_size: int = 64) -> Tensor:
        """Encode texts or pictures. One warning says how many texts are longer than what the encoder reads.

        Args:
            items (`Sequence[str]` or `Sequence[PIL.Image.Image]`): All non-empty strings or, where `accepts` has `"images"`, all
                pictures. A path is a string like any other: see [`open_images`].
            batch_size (`int`, defaults to 64): Items in a forward pass at most; fewer where they have more than 16,384 tokens, padding
                among them.

        Returns:
            `Tensor`: `[len(items), dim]` fp32 on the CPU, one row for each item. Of unit length, except for `hidden_state`.

        Raises:
            `ValueError`: If there is no item, or one that this encoder does not read, or both strings and pictures; if a text is not
                Unicode or has no token, or the encoder's answer is not finite.
        """
        readable = dict(READS[name] for name in self.accepts)
        expected = f"Expected a list of {' or of '.join(readable.values())} for the {self.kind} encoder"
        if isinstance(items, Item) or not isinstance(items, Sequence) or not len(items):
            raise ValueError(f"{expected}, found {items!r}.")
        for item in items:
            if not isinstance(item, tuple(readable)) or (isinstance(item, str) and not item.strip()):
                raise ValueError(f"{expected}, found {item!r}.")
            if isinstance(item, str) != isinstance(items[0], str):
                raise ValueError(f"{expected}, found both in one list: encode them apart.")
            if isinstance(item, str) and item.encode(errors="ignore").decode() != item:
                raise ValueError(f"{item[:80]!r} has a surrogate, half of a character: pass text that can be written in UTF-8.")
        texts = [item for item in items if isinstance(item, str)]  # all of them or none
        sizes = self._check_lengths(texts) if texts else [self.picture_tokens] * len(items)
        rows = []
        for part in _batches(sizes, batch_size):
            batch = [item if isinstance(item, str) else open_picture(item) for item in items[part]]
            rows.append(self._embed(batch).float().cpu())
        vectors = torch.cat(rows).clone()
        if not vectors.isfinite().all():
            raise ValueError(
                f"The {self.kind} encoder at {self.config['checkpoint']} computes NaN or infinite task vectors in"
                f" {next(self.model.parameters()).dtype}: move it to torch.float32 with .to(device, dtype)."
            )
        return vectors

    def read(self, argument: str, items: Sequence[Item]) -> Tensor:
        """Encode what an argument of [`ICMGenerator.generate_adapter`] was given.

        Args:
            argument (`str`): One of `accepts`.
            items (`Sequence`): See [`~TaskEncoder.encode`].

        Returns:
            `Tensor`: `[len(items), dim]` fp32.

        Raises:
            `ValueError`: See [`~TaskEncoder.encode`].
        """
        return self.encode(items)

    def _check_lengths(self, texts: list[str]) -> list[int]:
        """Tokens of each text that are read."""
        counts = self.count_tokens(texts)
        if 0 in counts:
            raise ValueError(f"{texts[counts.index(0)][:80]!r} has no token for the {self.kind} encoder: pass a text with words.")
        if self.max_tokens and max(counts) > self.max_tokens:
            logger.warning(
                "%d of %d texts are longer than the %d tokens that the %s encoder reads (the longest: %d): the rest of them is left out.",
                sum(count > self.max_tokens for count in counts),
                len(texts),
                self.max_tokens,
                self.kind,
                max(counts),
            )
        return [min(count, self.max_tokens or count) for count in counts]

    def average(self, rows: Tensor) -> Tensor:
        """The one task vector of several.

        Args:
            rows (`Tensor`): `[n, dim]`, as [`~TaskEncoder.encode`] returns them.

        Returns:
            `Tensor`: `[dim]`: their mean, of unit length as they are.
        """
        return F.normalize(rows.mean(0), dim=0)


def _batches(sizes: Sequence[int], batch_size: int) -> Iterator[slice]:
    """Parts of a list whose items have these many tokens, in its order: `batch_size` items and `MAX_TOKENS` tokens each, or one item."""
    start, longest = 0, 0
    for stop, size in enumerate(sizes):
        longest = max(longest, size)
        if stop > start and (stop - start == batch_size or (stop - start + 1) * longest > MAX_TOKENS):
            yield slice(start, stop)
            start, longest = stop, size
    yield slice(start, len(sizes))


def open_images(images: Sequence[Picture]) -> list[Image.Image]:
    """Open pictures as viewers show them: see [`open_picture`].

    Args:
        images (`Sequence[PIL.Image.Image, str or Path]`): Pictures or paths of picture files.

    Returns:
        `list[PIL.Image.Image]`: In RGB.

    Raises:
        `ValueError`: If it is no list, or a file holds no picture.
    """
    if isinstance(images, str | os.PathLike | Image.Image) or not images:
        raise ValueError(f"images={images!r} must be a non-empty list of PIL images or paths.")
    return [open_picture(image) if isinstance(image, str | os.PathLike | Image.Image) else image for image in images]


@contextmanager
def loading(checkpoint: str) -> Iterator[None]:
    """One line for whatever ends the loading of an encoder.

    Args:
        checkpoint (`str`): Its name, for the message.

    Raises:
        `OSError`: If files are missing or the Hub does not answer.
        `ValueError`: If what is there is no encoder.
    """
    try:
        yield
    except Exception as error:  # configs and weights of a repo end their loaders with exceptions of any kind
        reason = textwrap.shorten(" ".join(str(error).splitlines()[-3:]) or type(error).__name__, 400)
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(
            f"{checkpoint} cannot be loaded: {reason} Only weights in safetensors are, and no code of a checkpoint's own."
        ) from error


def load_config(checkpoint: str, **hub: Any) -> PreTrainedConfig:
    """Read a config of transformers; no code of the checkpoint runs, and no size in it takes hours or all memory to build.

    Args:
        checkpoint (`str`): Hub id or folder.
        **hub: Revision and [`HubOptions`].

    Returns:
        `PreTrainedConfig`

    Raises:
        `OSError`: If there is none.
        `ValueError`: If it needs code of its own, or a layer count or a size is beyond that of any model.
    """
    with loading(checkpoint):
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False, **hub)
    parts: list[Any] = [config.to_dict()]
    for part in parts:
        for name, value in part.items():
            if isinstance(value, dict):
                parts.append(value)
            most = 1000 if str(name).endswith(("layers", "layer", "depth")) else 10_000_000
            if type(value) is int and value > most and name.endswith(("layers", "layer", "depth", "size")):
                raise ValueError(f"{checkpoint}: {name} is {value} in its config.json, more than any model has ({most}).")
    return config


def context_length(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Tokens that a model reads at most.

    Args:
        config (`PreTrainedConfig`): Of the model; those of Bloom, Mamba or T5 name no length.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer; many name 10^30.

    Returns:
        `int`, *optional*: The smaller of the two lengths, `None` where neither is known.
    """
    lengths = (getattr(config.get_text_config(), "max_position_embeddings", None), tokenizer.model_max_length)
    return min((length for length in lengths if isinstance(length, int) and 0 < length < 10**9), default=None)
