"""Task encoders: anything a user has of a task -> task vector."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from ..remote import is_url
from .base import HubOptions, Picture, TaskEncoder, open_images
from .clip import ClipEncoder
from .hidden_state import HiddenStateEncoder
from .joined import JoinedEncoder
from .sentence import SentenceEncoder
from .statistics import StatisticsEncoder

__all__ = [
    "ClipEncoder",
    "HiddenStateEncoder",
    "JoinedEncoder",
    "Picture",
    "SentenceEncoder",
    "StatisticsEncoder",
    "TaskEncoder",
    "load_task_encoder",
    "open_images",
]

ENCODERS: dict[str, type[TaskEncoder]] = {
    encoder.kind: encoder for encoder in (ClipEncoder, HiddenStateEncoder, JoinedEncoder, SentenceEncoder, StatisticsEncoder)
}


def load_task_encoder(
    config: Mapping[str, Any], folder: str | Path | None = None, *, from_hub: bool = False, **hub: Unpack[HubOptions]
) -> TaskEncoder:
    """Load the encoder that a generator or a collection names.

    Args:
        config (`Mapping`): `kind`, `checkpoint`, `dim`, `sha256`, `config_sha256`, and the options of the kind.
        folder (`str` or `Path`, *optional*): A copy that travels with the generator; takes the place of `checkpoint`.
        from_hub (`bool`, defaults to `False`): Whether `config` comes from a repo, which may name other repos but no folder of this
            machine.
        **hub: `token`, `cache_dir` and `local_files_only`, as `from_pretrained` takes them.

    Returns:
        `TaskEncoder`

    Raises:
        `ValueError`: If the kind is unknown or a field of `config` is of another type; if a repo names a folder of this machine; if the
            weights are not those that `sha256` names, or tokenizer and configs not those of `config_sha256`.
        `OSError`: If the checkpoint cannot be found or read.

    Example:

    ```python
    >>> from peft_icm.bundled import bundled_encoder
    >>> encoder = ClipEncoder.from_pretrained(bundled_encoder())
    >>> load_task_encoder(encoder.config).encode(["detect sofas"]).shape
    torch.Size([1, 384])

    ```
    """
    if config.get("kind") not in ENCODERS:
        raise ValueError(f"Unknown task encoder {config.get('kind')!r}: choose one of {', '.join(sorted(ENCODERS))}.")
    for field in ("checkpoint", "sha256"):
        if not isinstance(config.get(field), str):
            raise ValueError(f"The encoder's {field} is {config.get(field)!r} in this config, it must be a string.")
    kind = ENCODERS[config["kind"]]
    checkpoint = str(folder or config["checkpoint"])
    named = [checkpoint.removeprefix("hf-hub:")] * (folder is None) + [str(config.get("pretrained") or "")]
    for name in named if from_hub else ():
        if os.path.exists(name) or name.startswith(("/", "\\", ".", "~")) or is_url(name):
            raise ValueError(f"The encoder of this repo is {name!r}, a place on this machine or a URL: a repo may only name other repos.")
    options = {name: config[name] for name in kind.options if name in config}
    if kind is JoinedEncoder:
        options["from_hub"] = from_hub
    if config["kind"] == "sentence":
        options.setdefault("pooling", "mean")  # what peft_icm 0.1.0 did with every checkpoint
    encoder = kind.from_pretrained(checkpoint, **options, **hub)
    encoder.check(config)
    return encoder
