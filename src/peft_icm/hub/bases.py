"""The base model that travels with a generator or an adapter."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from pathlib import Path
from typing import Any

from ..disk import safe_name
from .files import BASE_FOLDER, CARD, published

# What a base model is made of beside its weights, which are those that transformers would load.
_BASE_FILES = (
    "config.json", "generation_config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "preprocessor_config.json", "processor_config.json", "image_processor_config.json", "video_preprocessor_config.json",
    "chat_template*", "README.md", "LICENSE*",
)  # fmt: skip


def copy_base(base: str | os.PathLike[str], folder: Path, subfolder: str = BASE_FOLDER) -> None:
    """Copy what makes a base model, and nothing else of its folder: config, tokenizer, processor, licence, and safetensors weights.

    Args:
        base (`str` or `Path`): The folder of the base model.
        folder (`Path`): Where to.
        subfolder (`str`, defaults to `"base_model"`): Inside of it; `""` for `folder` itself, which has a card of its own.

    Raises:
        `ValueError`: If `base` is no folder of a model in safetensors, or a file of it is a link to another place; nothing has been copied
            then.
    """
    source, target = Path(base), folder / subfolder
    files = _weights(source)
    for name in sorted(os.listdir(source)):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in _BASE_FILES) and (source / name).is_file():
            files.append(name)
    files = [name for name in dict.fromkeys(files) if subfolder or name != CARD]
    # The files of huggingface_hub's cache are links to its blobs; no other link is followed.
    root = next((parent.parent / "blobs" for parent in source.resolve().parents if parent.name == "snapshots"), source.resolve())
    for name in files:
        file = source / name
        if file.is_symlink() and file.resolve().parent != root:
            raise ValueError(f"{file} is a link to {file.resolve()}: a base model is pushed only with files of its own. Copy it there.")
    target.mkdir(parents=True, exist_ok=True)
    for name in files:
        shutil.copyfile(source / name, target / name)
    for file in target.glob("*.json"):
        if file.name in files and not file.name.startswith(("tokenizer.", "vocab")):
            text = file.read_text(encoding="utf-8")
            config = json.loads(text, object_hook=_without_paths)
            if config != json.loads(text):
                file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _weights(base: Path) -> list[str]:
    """Names of the weight files that transformers loads from a folder, and of their index."""
    try:
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"{base} is no base model: it has no config.json with a model_type. Nothing of it is pushed.")
    if (base / "adapter_config.json").exists():
        raise ValueError(f"{base} holds an adapter beside its model: merge it and save the model first.")
    if (base / "model.safetensors").is_file():
        return ["model.safetensors"]
    index = base / "model.safetensors.index.json"
    if not index.is_file():
        raise ValueError(f"{base} has no model.safetensors: load it and save_pretrained it again, only safetensors are pushed.")
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        shards = sorted({safe_name(name, "weight file") for name in names})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of weights ({error}): save the base model again.") from error
    missing = [name for name in shards if not name.endswith(".safetensors") or not (base / name).is_file()]
    if missing:
        raise ValueError(f"{base} lacks {missing[0]}, which its {index.name} names: save the base model again.")
    return [index.name, *shards]


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config in which transformers notes where a file came from; no other string is taken for a path."""
    return {key: published(item) if key.endswith(("name_or_path", "_file")) else item for key, item in config.items()}
