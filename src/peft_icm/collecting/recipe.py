"""What a snapshot depends on: LoRAs of another recipe, or of other data, are never taken for those that are asked for."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock
from peft import LoraConfig
from transformers import set_seed

from ..adapters.functional import ABOUT
from ..disk import replacing_file
from ..tasks.fields import numbered_examples
from .arguments import SPREADING, CollectingArguments, Task
from .folder import LOCKS, read_json

RECIPE = "recipe.json"
_ALWAYS_TOLD = ("r", "lora_alpha", "use_rslora", "lora_dropout", "init_lora_weights", "target_modules")
_OF_A_BASE = (".safetensors", ".json", ".txt", ".model", ".jinja")  # weights, configs, tokenizer


def collecting_recipe(base_model: str | os.PathLike[str], lora_config: LoraConfig, args: CollectingArguments) -> dict[str, Any]:
    """What the snapshots of every task depend on, JSON-able.

    Args:
        base_model (`str` or `Path`): Of a folder the content enters too, by its hash.
        lora_config (`LoraConfig`): What of it is not peft's default; nothing that only names the base.
        args ([`CollectingArguments`]): Without what only spreads the work.

    Returns:
        `dict`
    """
    default = LoraConfig().to_dict()
    lora = {
        name: value
        for name, value in lora_config.to_dict().items()
        if name in _ALWAYS_TOLD or (value != default[name] and name not in ABOUT - {"task_type"})
    }
    own = {name: value for name, value in asdict(args).items() if name not in SPREADING}
    recipe = {"base_model": str(base_model), "base_sha256": _base_sha256(Path(base_model)), "lora": _plain(lora), **own}
    return json.loads(json.dumps(recipe))


def _plain(value: Any) -> Any:
    """Sets have no order; of patterns the first that matches counts, but dicts that differ in their order alone are equal."""
    if isinstance(value, set):
        return sorted(value)
    if not isinstance(value, dict):
        return value
    return {name: list(item.items()) if name.endswith("_pattern") else _plain(item) for name, item in value.items()}


def _base_sha256(folder: Path) -> str | None:
    """Hex digest over what a local base is made of; None of one of the Hub, which its name tells."""
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in _OF_A_BASE:
            with file.open("rb") as stream:
                digest.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def data_sha256(task: Task, processor: Any, args: CollectingArguments) -> str:
    """Hex digest over everything that a task's LoRA learns from.

    Args:
        task ([`Task`]): Its data set is made, and hashed by its own `fingerprint()` or, where it has none, item by item as `args.seed`
            draws them.
        processor: Of the base model.
        args ([`CollectingArguments`]): What the data set is made with.

    Returns:
        `str`

    Raises:
        `ValueError`: What `task.train_dataset` raises, of data that nothing can be trained on; or if that returns a stream.
    """
    dataset = numbered_examples(task, processor, **args.dataset_kwargs)
    if hasattr(dataset, "fingerprint"):
        return dataset.fingerprint()
    from datasets.fingerprint import Hasher

    set_seed(args.seed)
    hasher = Hasher()
    for index in range(len(dataset)):
        hasher.update(dataset[index])
    return hasher.hexdigest()


def check_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    """Refuse a work folder that was begun with another recipe.

    Args:
        folder (`Path`): The work folder.
        recipe (`dict`): Of [`collecting_recipe`].

    Raises:
        `ValueError`: If it holds another, or one that cannot be read; names the first field that differs.
    """
    if (folder / RECIPE).is_file():
        found = read_json(folder / RECIPE)
        if differs := difference({name: found.get(name) for name in recipe}, recipe):
            raise ValueError(f"{folder} holds LoRAs of another recipe: {differs}. Choose another folder.")


def write_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    """Begin a work folder, or find it begun with the same recipe; see [`check_recipe`]."""
    (folder / LOCKS).mkdir(exist_ok=True)
    with FileLock(folder / LOCKS / RECIPE):  # of two processes that begin at once the second finds the recipe of the first
        check_recipe(folder, recipe)
        if not (folder / RECIPE).is_file():
            with replacing_file(folder / RECIPE) as temporary:
                temporary.write_text(json.dumps(recipe, indent=1), encoding="utf-8")


def difference(known: Any, wanted: Any, name: str = "") -> str | None:
    """The first field in which two recipes differ, in words.

    Args:
        known: What JSON holds: the older one.
        wanted: The newer one.
        name (`str`, defaults to `""`): Of the field that they are of.

    Returns:
        `str` or `None`: None where they are equal.

    Example:

    ```python
    >>> difference({"lora": {"r": 2}}, {"lora": {"r": 4}})
    'lora.r was 2, now 4'

    ```
    """
    if known == wanted:
        return None
    if isinstance(known, dict) and isinstance(wanted, dict):
        first = next(key for key in [*wanted, *known] if known.get(key) != wanted.get(key))
        return difference(known.get(first), wanted.get(first), f"{name}.{first}" if name else first)
    return f"{name} was {known!r:.200}, now {wanted!r:.200}"
