"""Task encoders: anything a user has of a task -> task vector."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .base import Picture, TaskEncoder, open_images
from .clip import ClipEncoder
from .hidden_state import HiddenStateEncoder
from .sentence import SentenceEncoder

__all__ = ["ClipEncoder", "HiddenStateEncoder", "Picture", "SentenceEncoder", "TaskEncoder", "load_task_encoder", "open_images"]

ENCODERS: dict[str, type[TaskEncoder]] = {encoder.kind: encoder for encoder in (ClipEncoder, HiddenStateEncoder, SentenceEncoder)}


def load_task_encoder(config: Mapping[str, Any], folder: str | Path | None = None) -> TaskEncoder:
    """Load the encoder that a generator or a collection names.

    Args:
        config (`Mapping`): `kind`, `checkpoint`, `dim`, `sha256`, and the options of the kind.
        folder (`str` or `Path`, *optional*): A copy that travels with the generator; takes the place of `checkpoint`.

    Returns:
        `TaskEncoder`

    Raises:
        `ValueError`: If the kind is unknown, or the weights are not those that `sha256` names.
    """
    kind = ENCODERS.get(config["kind"])
    if kind is None:
        raise ValueError(f"Unknown task encoder {config['kind']!r}: choose one of {', '.join(sorted(ENCODERS))}.")
    checkpoint = str(folder or config["checkpoint"])
    options = {name: value for name, value in config.items() if name not in ("kind", "checkpoint", "dim", "sha256", "folder")}
    encoder = kind.from_pretrained(checkpoint, **options)
    if encoder.config["sha256"] != config["sha256"]:
        raise ValueError(
            f"The {config['kind']} encoder at {checkpoint} has weights of sha256 {encoder.config['sha256'][:12]}, expected"
            f" {config['sha256'][:12]}: it is not the one that the task vectors were made with."
        )
    return encoder
