"""`joined`: an encoder for each thing that can be given, their vectors side by side."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from PIL import Image
from torch import Tensor

from ..disk import replacing_folder
from .base import READS, Item, TaskEncoder


class JoinedEncoder(TaskEncoder):
    """One encoder reads sentences, another pictures or examples, and a task vector is both of their vectors side by side.

    What is not given is zero, which a `"direct"` generator takes for nothing said. So one generator hears a noun where it was trained on
    it, and pictures of anything.

    Args:
        parts (`Mapping[str, TaskEncoder]`): The encoder of each of `"text"`, `"examples"` and `"images"`, two of them at least.

    Raises:
        `ValueError`: If an encoder does not read what it is there for, or there are fewer than two.

    Example:

    ```python
    >>> from peft_icm.bundled import bundled_encoder, bundled_generator
    >>> from peft_icm.conditioning import ClipEncoder, StatisticsEncoder
    >>> florence = StatisticsEncoder.from_pretrained(bundled_generator("detection") + "/base_model")
    >>> encoder = JoinedEncoder({"text": ClipEncoder.from_pretrained(bundled_encoder()), "images": florence})
    >>> encoder.accepts, encoder.dim
    (('text', 'images'), 768)

    ```
    """

    kind: ClassVar[str] = "joined"
    options: ClassVar[tuple[str, ...]] = ("parts",)

    def __init__(self, parts: Mapping[str, TaskEncoder]):
        if len(parts) < 2:
            raise ValueError(f"parts={sorted(parts)} must name two of {', '.join(READS)} at least, each with its encoder.")
        for name, part in parts.items():
            if name not in part.accepts:
                raise ValueError(f"parts: a {part.kind} encoder does not read {name}=, it reads {' and '.join(part.accepts)}.")
        self.parts = {name: parts[name] for name in READS if name in parts}
        self.accepts, self.max_tokens = tuple(self.parts), None
        configs = {name: part.config for name, part in self.parts.items()}

        def digest(field: str) -> str:
            return hashlib.sha256(" ".join(str(config[field]) for config in configs.values()).encode()).hexdigest()

        self.config = {
            "kind": self.kind,
            "checkpoint": self.kind,
            "dim": sum(part.dim for part in self.parts.values()),
            "sha256": digest("sha256"),
            "config_sha256": digest("config_sha256"),
            "parts": configs,
        }

    @classmethod
    def from_pretrained(cls, checkpoint: str, *, parts: Mapping[str, Mapping[str, Any]], **options: Any) -> JoinedEncoder:  # type: ignore[override]
        """Load what [`~JoinedEncoder.save_pretrained`] wrote.

        Args:
            checkpoint (`str`): The folder.
            parts (`Mapping`): The config of each part.
            **options: For [`load_task_encoder`].
        """
        from . import load_task_encoder

        return cls({name: load_task_encoder(config, Path(checkpoint) / name, **options) for name, config in parts.items()})

    def save_pretrained(self, folder: str | Path) -> None:
        """Write each part into a folder of its own.

        Args:
            folder (`str` or `Path`): Where to; replaced in one step.
        """
        with replacing_folder(folder) as path:
            for name, part in self.parts.items():
                part.save_pretrained(path / name)

    def to(self, device: str | int | torch.device, dtype: torch.dtype | None = None) -> Self:
        """Move all parts."""
        for part in self.parts.values():
            part.to(device, dtype)
        return self

    def read(self, argument: str, items: Sequence[Item]) -> Tensor:
        """By the part that is there for it: `[len(items), dim]`, zero where the others stand."""
        rows = []
        for name, part in self.parts.items():
            rows.append(part.read(name, items) if name == argument else torch.zeros(len(items), part.dim))
        return torch.cat(rows, dim=1)

    def average(self, rows: Tensor) -> Tensor:
        """`[n, dim]` -> `[dim]`: of each part the average of the rows that say something in it."""
        found = []
        for part, own in zip(self.parts.values(), rows.split([part.dim for part in self.parts.values()], dim=1), strict=True):
            said = own[(own != 0).any(1)]
            found.append(part.average(said) if len(said) else torch.zeros(part.dim))
        return torch.cat(found)

    def _embed(self, items: list[Any]) -> Tensor:
        pictures = isinstance(items[0], Image.Image)
        return self.read(next(name for name in self.parts if (name == "images") == pictures), items)

    def count_tokens(self, texts: list[str]) -> list[int]:
        """Tokens of each text, those that start and end it too."""
        return next(part for name, part in self.parts.items() if name != "images").count_tokens(texts)
