"""What a training run depends on: a run goes on only where it was begun with the same."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..adapters.collection import AdapterCollection
from ..collecting.folder import make_folder
from ..collecting.recipe import difference
from ..disk import inside, replacing_file
from ..generator.configuration_icm import ICMConfig
from .arguments import ICMTrainingArguments

RECIPE = "recipe.json"
LOCK = ".lock"
# Where a run writes, what it says, what it may use, and how long it is, since a run may be made longer; everything else may change what is
# learnt.
_WITHOUT_EFFECT = (
    "output_dir",
    "logging",
    "log_",
    "report_to",
    "disable_tqdm",
    "run_name",
    "save_",
    "push_to_hub",
    "hub_",
    "project",
    "trackio",
    "num_train_epochs",
    "max_steps",
    "max_memory_bytes",
)


def training_recipe(data: str, config: ICMConfig, args: ICMTrainingArguments) -> dict[str, Any]:
    """Everything that the weights depend on, JSON-able.

    Args:
        data (`str`): Digest of what is trained on: [`collection_sha256`], or [`TaskEpisodes.fingerprint`].
        config ([`ICMConfig`]): Of the new generator.
        args ([`ICMTrainingArguments`]): Without what only says where to write and what to log.

    Returns:
        `dict`
    """
    settings = {name: value for name, value in args.to_dict().items() if not name.startswith(_WITHOUT_EFFECT)}
    model = {name: value for name, value in config.to_dict().items() if name != "transformers_version"}
    return json.loads(json.dumps({"collection": data, "config": model, "arguments": settings}, default=str))


def collection_sha256(collection: AdapterCollection) -> str:
    """Hex digest over a collection's layout, snapshots and task vectors.

    Args:
        collection (`AdapterCollection`): The collection.
    """
    digest = hashlib.sha256(collection.layout.fingerprint.encode())
    for task in collection.tasks:
        digest.update(task.encode())
        for tensor in (collection.snapshots[task], collection.task_vectors.get(task)):
            if tensor is not None:
                digest.update(f"{tuple(tensor.shape)}".encode())
                for row in tensor:
                    digest.update(row.float().contiguous().numpy())
    return digest.hexdigest()


_held: dict[Path, FileLock] = {}


def keep_others_out(folder: str | Path) -> None:
    """Lock a work folder for this process, until [`let_others_in`] or its end.

    Args:
        folder (`str` or `Path`): There already.

    Raises:
        `ValueError`: If another process has locked it.
    """
    place = Path(folder).resolve()
    if place in _held:
        return
    lock = FileLock(place / LOCK, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"Another process is training into {folder}: wait for it, or choose another output folder.") from error
    _held[place] = lock


def let_others_in(folder: str | Path) -> None:
    """The end of [`keep_others_out`]; nothing where that was not called."""
    if lock := _held.pop(Path(folder).resolve(), None):
        lock.release()


def check_recipe(folder: str | Path, recipe: dict[str, Any], *, resume: bool) -> None:
    """Begin a run in its work folder, without the checkpoints of an earlier one; or, when resumed, refuse one begun otherwise.

    From here to the end of [`ICMTrainer.train`] no other process may work in the folder. Of a torchrun group the first process begins
    for all.

    Args:
        folder (`str` or `Path`): Of the checkpoints.
        recipe (`dict`): Of [`training_recipe`].
        resume (`bool`): Whether checkpoints in `folder` are to be used.

    Raises:
        `ValueError`: If the run in `folder` had another recipe, or left none that can be read; names what differs. If another process
            works there, or a checkpoint is a link that leads out of the folder.
        `OSError`: If `folder` is a file.
    """
    if int(os.environ.get("RANK", 0)):
        return
    root = make_folder(folder, "output_dir")
    keep_others_out(root)
    file = root / RECIPE
    checkpoints = [inside(root, found.name) for found in root.iterdir() if re.fullmatch(r"checkpoint-\d+", found.name)]
    if resume and checkpoints:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} cannot be read ({error}): it is not known how that run was begun; train without --resume.") from error
        known = {part: found.get(part) for part in recipe} if isinstance(found, dict) else {}
        if known.get("collection") != recipe["collection"]:
            differs: str | None = "another collection, or other tasks"
        else:
            differs = difference(known, recipe)
        if differs:
            raise ValueError(f"{folder} holds checkpoints of another run ({differs}): train without --resume, or into another folder.")
        return
    for checkpoint in checkpoints:  # of a run that was given up: a later --resume must not find it
        shutil.rmtree(checkpoint) if checkpoint.is_dir() and not checkpoint.is_symlink() else checkpoint.unlink()
    with replacing_file(file) as temporary:
        temporary.write_text(json.dumps(recipe, indent=1), encoding="utf-8")
