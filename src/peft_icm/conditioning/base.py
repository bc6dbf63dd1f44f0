"""TaskEncoder: what the three kinds share."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..pictures import Picture, open_picture

Item = str | Image.Image
READS: dict[str, tuple[type, str]] = {  # argument -> what its items are
    "text": (str, "non-empty strings"),
    "examples": (str, "non-empty strings"),
    "images": (Image.Image, "PIL images"),
}


class TaskEncoder(ABC):
    """Turns texts, examples or pictures into task vectors.

    Attributes:
        kind (`str`): Name of the kind in a generator's config.
        accepts (`tuple[str, ...]`): Which of `"text"`, `"examples"` and `"images"` it reads: arguments of
            [`ICMGenerator.generate_adapter`].
        config (`dict`): `kind`, `checkpoint`, `dim`, `sha256` and the options of the kind, JSON-able.
    """

    kind: ClassVar[str]
    accepts: tuple[str, ...]
    config: dict[str, Any]

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

    @property
    def dim(self) -> int:
        """d, the width of a task vector."""
        return self.config["dim"]

    @torch.inference_mode()
    def encode(self, items: Sequence[Item], batch_size: int = 64) -> Tensor:
        """Encode texts or pictures.

        Args:
            items (`Sequence[str]` or `Sequence[PIL.Image.Image]`): All non-empty strings or, where `accepts` has `"images"`, all
                pictures. A path is a string like any other: see [`open_images`].
            batch_size (`int`, defaults to 64): Items in a forward pass.

        Returns:
            `Tensor`: `[len(items), dim]` fp32 on the CPU, one row for each item. Of unit length, except for `hidden_state`.

        Raises:
            `ValueError`: If there is no item, or one that this encoder does not read, or both strings and pictures.
        """
        readable = dict(READS[name] for name in self.accepts)
        expected = f"Expected a list of {' or of '.join(readable.values())} for the {self.kind} encoder"
        if isinstance(items, Item) or not items:
            raise ValueError(f"{expected}, found {items!r}.")
        for item in items:
            if not isinstance(item, tuple(readable)) or (isinstance(item, str) and not item.strip()):
                raise ValueError(f"{expected}, found {item!r}.")
            if isinstance(item, str) != isinstance(items[0], str):
                raise ValueError(f"{expected}, found both in one list: encode them apart.")
        items = [item if isinstance(item, str) else open_picture(item) for item in items]
        batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
        return torch.cat([self._embed(batch).float().cpu() for batch in batches]).clone()

    def average(self, rows: Tensor) -> Tensor:
        """The one task vector of several.

        Args:
            rows (`Tensor`): `[n, dim]`, as [`~TaskEncoder.encode`] returns them.

        Returns:
            `Tensor`: `[dim]`: their mean, of unit length as they are.
        """
        return F.normalize(rows.mean(0), dim=0)


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
