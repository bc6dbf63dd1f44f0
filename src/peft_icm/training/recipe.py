"""What a training run depends on: a run goes on only where it was begun with the same."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from ..adapters.collection import AdapterCollection
from ..disk import replacing_file
from ..generator.configuration_icm import ICMConfig
from .arguments import ICMTrainingArguments

RECIPE = "recipe.json"
# Where a run writes, what it says, and how long it is, since a run may be made longer; everything else may change what is learnt.
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
)


def training_recipe(collection: AdapterCollection, config: ICMConfig, args: ICMTrainingArguments) -> dict[str, Any]:
    """Everything that the weights depend on, JSON-able.

    Args:
        collection (`AdapterCollection`): Its layout, snapshots and task vectors enter by their hash.
        config ([`ICMConfig`]): Of the new generator.
        args ([`ICMTrainingArguments`]): Without what only says where to write and what to log.

    Returns:
        `dict`
    """
    digest = hashlib.sha256(collection.layout.fingerprint.encode())
    for task in collection.tasks:
        digest.update(task.encode())
        for tensor in (collection.snapshots[task], collection.task_vectors.get(task)):
            if tensor is not None:
                digest.update(f"{tuple(tensor.shape)}".encode() + tensor.float().contiguous().numpy().tobytes())
    settings = {name: value for name, value in args.to_dict().items() if not name.startswith(_WITHOUT_EFFECT)}
    model = {name: value for name, value in config.to_dict().items() if name != "transformers_version"}
    return json.loads(json.dumps({"collection": digest.hexdigest(), "config": model, "arguments": settings}, default=str))


def check_recipe(folder: str | Path, recipe: dict[str, Any], *, resume: bool) -> None:
    """Begin a run in its work folder, without the checkpoints of an earlier one; or, when resumed, refuse one begun otherwise.

    Args:
        folder (`str` or `Path`): Of the checkpoints.
        recipe (`dict`): Of [`training_recipe`].
        resume (`bool`): Whether checkpoints in `folder` are to be used.

    Raises:
        `ValueError`: If the run in `folder` had another recipe, or left none that can be read; names what differs.
    """
    file = Path(folder) / RECIPE
    if resume and file.parent.is_dir() and any(file.parent.glob("checkpoint-*")):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} cannot be read ({error}): it is not known how that run was begun; train without --resume.") from error
        for part, values in recipe.items():
            known = found.get(part) if isinstance(found, dict) else None
            if known == values:
                continue
            what = "another collection"
            if isinstance(values, dict) and isinstance(known, dict):
                name = next(name for name in values if known.get(name) != values[name])
                what = f"{name} was {known.get(name)!r:.60}, now {values[name]!r:.60}"
            raise ValueError(f"{folder} holds checkpoints of another run ({what}): train without --resume, or into another folder.")
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    for checkpoint in file.parent.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)  # of a run that was given up: a later --resume must not find it
    with replacing_file(file) as temporary:
        temporary.write_text(json.dumps(recipe, indent=1), encoding="utf-8")
