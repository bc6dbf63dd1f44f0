"""collect and gather: tasks -> snapshots -> AdapterCollection."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoProcessor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, has_file

from ..adapters.base import add_lora, base_class, opening_base
from ..adapters.collection import AdapterCollection
from ..adapters.functional import check_fields
from ..adapters.layout import AdapterLayout
from ..disk import inside, safe_name
from ..launching.launchers import check_launcher, launch
from ..remote import is_url
from ..tasks.fields import strings
from ..tasks.language_modeling import context_size
from .arguments import CollectingArguments, Task
from .folder import DONE, JOBS, LOCKS, check_finished, check_snapshot, locked, read_json, read_snapshot, snapshot_files, task_lock
from .recipe import RECIPE, check_recipe, collecting_recipe, data_sha256, write_recipe
from .remote import bring, send_file, working_folder
from .work import work

PATIENCE = 120.0  # seconds in which a file system notices that a node died that held a lock


def collect(
    base_model: str | os.PathLike[str], tasks: Sequence[Task], lora_config: LoraConfig, args: CollectingArguments
) -> AdapterCollection | None:
    """Train one LoRA for each task and gather their snapshots.

    All tasks start from the same A and B, so that what differs between two snapshots is what the tasks taught. Finished tasks are
    skipped on a second start; those that another process is training are left to it. Tasks are trained outside any process group:
    inside one, the Trainer would average the gradients of different tasks.

    Args:
        base_model (`str` or `Path`): Hub id or folder of the base.
        tasks (`Sequence[Task]`): With different names.
        lora_config (`LoraConfig`): The LoRA of every task.
        args ([`CollectingArguments`]): The recipe.

    Returns:
        [`AdapterCollection`] or `None`: None while other processes still have tasks to finish.

    Raises:
        `ValueError`: If names repeat, a description is no sentence, `output_dir` holds another recipe, or a finished task of other data
            or with a snapshot lost or cut short, other processes train all that is left, or this one is part of a torchrun group.
        `OSError`: If `output_dir` is a file or cannot be written to, the base has no weights in safetensors, there is no Ray cluster at
            the address, or tasks failed in other processes; those are named when the others are finished.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("collect() spreads tasks by itself: use launcher='ray' or 'submitit' instead of torchrun.")
    name, names = str(base_model), [task.name for task in tasks]
    _check_tasks(Path(args.output_dir), tasks)
    if lora_config.r <= 0:
        raise ValueError(f"The LoRA rank must be a positive integer, found r={lora_config.r}.")
    check_launcher(args)
    with working_folder(args.output_dir) as folder:
        _check_before_training(name, lora_config, args)
        bring(args.output_dir, folder, names)
        recipe = collecting_recipe(base_model, lora_config, args)
        check_recipe(folder, recipe)

        def finished(task: Task) -> bool:
            return (folder / task.name / DONE).is_file()

        with opening_base(name):
            processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        data = {task.name: data_sha256(task, processor, args) for task in tqdm(tasks, desc="reading tasks", leave=False)}
        for task in filter(finished, tasks):
            check_finished(folder / task.name, args.num_snapshots, data[task.name])
        write_recipe(folder, recipe)
        send_file(args.output_dir, folder / RECIPE)
        waiting = [task for task in tasks if not finished(task)]
        if waiting and not any(_is_free(folder, task) for task in waiting):
            raise ValueError(
                f"Another process is collecting into {folder}, task {waiting[0].name!r}: wait for it, or choose another folder."
            )
        if waiting:
            _train(name, waiting, lora_config, args, data)
        bring(args.output_dir, folder, names)
        lost = [task.name for task in waiting if not finished(task) and _is_free(folder, task)]
        if lost and args.launcher != "local":
            raise OSError(f"Task {lost[0]!r} was trained, but not into {args.output_dir} here: all machines must share it, or take a URL.")
        if not all(map(finished, tasks)):
            return None
        for task in tasks:  # those of other processes too
            check_finished(folder / task.name, args.num_snapshots, data[task.name])
        collection = gather(folder, tasks)
        return replace(collection, snapshots=dict(collection.snapshots)) if is_url(args.output_dir) else collection


def _train(base_model: str, tasks: Sequence[Task], lora_config: LoraConfig, args: CollectingArguments, data: Mapping[str, str]) -> None:
    """Train tasks where `args.launcher` says."""
    patience = 0 if args.launcher == "local" else PATIENCE
    own_work = partial(work, base_model, lora_config=lora_config, args=args, data=data, patience=patience)
    folder = None if is_url(args.output_dir) else Path(args.output_dir) / JOBS
    with closing(launch(own_work, [task.name for task in tasks], tasks, args, folder=folder, kept=args.output_dir)) as trained:
        for _ in tqdm(trained, desc="collecting", total=len(tasks), unit="task"):
            pass


class EpochFiles(Mapping[str, Tensor]):
    """The snapshots of finished tasks, `[K, P]` of each, read from the files of their epochs when they are asked for.

    Args:
        folders (`Mapping[str, Path]`): Of each task.
        layout ([`AdapterLayout`]): Of all of them.
    """

    def __init__(self, folders: Mapping[str, Path], layout: AdapterLayout):
        self.folders, self.layout = dict(folders), layout

    def __getitem__(self, task: str) -> Tensor:
        return torch.stack([self.layout.flatten(read_snapshot(file)) for file in snapshot_files(self.folders[task])])

    def __iter__(self) -> Iterator[str]:
        return iter(self.folders)

    def __len__(self) -> int:
        return len(self.folders)


def gather(folder: str | Path, tasks: Sequence[Task]) -> AdapterCollection:
    """A collection of the finished tasks of a collecting folder, whose snapshots stay there and are read task by task.

    Args:
        folder (`str` or `Path`): `output_dir` of [`collect`].
        tasks (`Sequence[Task]`): Which, and in what order.

    Returns:
        [`AdapterCollection`]: Save it, before the folder is deleted: what is saved is read in fewer pieces.

    Raises:
        `ValueError`: If a task is not finished or has a snapshot lost or cut short, or two have different layouts.
    """
    root = Path(folder)
    recipe = read_json(root / RECIPE)
    layout: AdapterLayout | None = None
    folders, losses = {}, {}
    for task in tasks:
        if not (root / safe_name(task.name, "task") / DONE).is_file():
            raise ValueError(f"Task {task.name!r} is not finished in {root}: run collect again.")
        done = read_json(root / task.name / DONE)
        own = AdapterLayout.from_dict(done["layout"])
        layout = layout or own
        if own.fingerprint != layout.fingerprint:
            raise ValueError(f"Task {task.name!r} has another layout: {layout.difference(own)}.")
        folders[task.name] = inside(root, task.name)
        files, wanted = snapshot_files(folders[task.name]), recipe["num_snapshots"]
        if len(files) != wanted:
            raise ValueError(f"Task {task.name!r} has {len(files)} snapshots in {root}, its recipe {wanted}: run collect again.")
        for file in files:
            check_snapshot(file)
        losses[task.name] = done["train_loss"]
    assert layout is not None
    metadata = {
        **recipe,
        "train_loss": losses,
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
    }
    return AdapterCollection(layout, EpochFiles(folders, layout), {task.name: _sentences(task) for task in tasks}, metadata=metadata)


def _sentences(task: Task) -> list[str]:
    return strings(task.descriptions, f"descriptions of task {task.name!r}")


def _check_tasks(folder: Path, tasks: Sequence[Task]) -> None:
    """Refuse names and sentences that would fail after hours."""
    names = [safe_name(task.name, "task") for task in tasks]
    if not names or len({name.casefold() for name in names}) != len(names):
        raise ValueError(f"Tasks need different names, found {names}.")
    for task in tasks:
        if task.name.casefold() in (RECIPE, LOCKS, JOBS):
            raise ValueError(f"The task name {task.name!r} is that of a file of the work folder: give the task another.")
        inside(folder, task.name)
        _sentences(task)


def _is_free(folder: Path, task: Task) -> bool:
    with locked(task_lock(folder, task.name)) as held:
        return held


def _check_before_training(base_model: str, lora_config: LoraConfig, args: CollectingArguments) -> None:
    """Refuse what would fail after hours: the base must be in safetensors, a LoRA on it, on the meta device, must have a layout; a block
    must fit its context.
    """
    check_fields(lora_config.to_dict())
    with opening_base(base_model):
        config = AutoConfig.from_pretrained(base_model, trust_remote_code=False)
        kind = base_class(config)
    if not any(has_file(base_model, name) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        raise OSError(
            f"The base model {base_model} has no weights in safetensors, the only ones that are opened:"
            " convert it with save_pretrained(safe_serialization=True)."
        )
    bound, block_size = context_size(config), args.dataset_kwargs.get("block_size")
    if bound and isinstance(block_size, int) and block_size > bound:
        raise ValueError(f"block_size={block_size} is more than the {bound} tokens that {base_model} reads at once.")
    with torch.device("meta"):
        model = add_lora(kind._from_config(config), lora_config)
    AdapterLayout.from_peft_model(model)
