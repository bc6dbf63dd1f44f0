"""TaskEncoder: what the three kinds share."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class TaskEncoder(ABC):
    """Turns texts or examples into task vectors.

    Attributes:
        kind (`str`): Name of the kind in a generator's config.
        accepts (`str`): `"text"` or `"examples"`: the argument of [`ICMGenerator.generate_adapter`] that it reads.
        config (`dict`): `kind`, `checkpoint`, `dim`, `sha256` and the options of the kind, JSON-able.
    """

    kind: ClassVar[str]
    accepts: ClassVar[str]
    config: dict[str, Any]

    @classmethod
    @abstractmethod
    def from_pretrained(cls, checkpoint: str, **options: Any) -> TaskEncoder:
        """Load the encoder from a folder, a Hub id, or whatever else its library names checkpoints by."""

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> None:
        """Write a copy that `from_pretrained` loads from wherever the folder is moved."""

    @abstractmethod
    def _embed(self, items: list[str]) -> Tensor:
        """`[len(items), dim]` of one batch."""

    @property
    def dim(self) -> int:
        """d, the width of a task vector."""
        return self.config["dim"]

    @torch.inference_mode()
    def encode(self, items: Sequence[str], batch_size: int = 64) -> Tensor:
        """Encode texts.

        Args:
            items (`Sequence[str]`): Non-empty strings.
            batch_size (`int`, defaults to 64): Items in a forward pass.

        Returns:
            `Tensor`: `[len(items), dim]` fp32 on the CPU, one row for each item. Of unit length, except for `hidden_state`.

        Raises:
            `ValueError`: If there is no item, or one is not a non-empty string.
        """
        if isinstance(items, str) or not items:
            raise ValueError(f"Expected a non-empty list of strings, found {items!r}.")
        for item in items:
            if not isinstance(item, str) or not item.strip():
                raise ValueError(f"Expected non-empty strings, found {item!r}.")
        batches = [list(items[start : start + batch_size]) for start in range(0, len(items), batch_size)]
        return torch.cat([self._embed(batch).float().cpu() for batch in batches]).clone()


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that are saved, sorted by name."""
    return iter(sorted(module.state_dict().items()))


def weights_sha256(module: nn.Module) -> str:
    """Hex digest over names, shapes and values of all weights, independent of the dtype they are held in.

    Values are hashed in fp32, to which fp16 and bf16 widen exactly: a model that was saved in bf16 and loaded in fp32 keeps its hash.
    """
    digest = hashlib.sha256()
    for name, tensor in named_tensors(module):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
