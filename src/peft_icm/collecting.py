"""One LoRA per task, all from one seed; the last K epochs of each are the snapshots of an AdapterCollection."""

from __future__ import annotations

import copy
import datetime
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Protocol

import peft
import torch
import transformers
from filelock import FileLock, Timeout
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoProcessor,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from .adapters.base import base_class
from .adapters.collection import AdapterCollection
from .adapters.functional import check_fields
from .adapters.layout import AdapterLayout
from .disk import inside, replacing_file, safe_name
from .tasks.language_modeling import context_size

DONE = "done.json"
RECIPE = "recipe.json"


class Task(Protocol):
    """What collecting needs of a task; [`LanguageModelingTask`] is one."""

    name: str
    descriptions: list[str]

    @property
    def train_dataset(self) -> Callable[..., Any]:
        """`train_dataset(processor, **dataset_kwargs)`: a map-style data set of model inputs with labels."""


@dataclass
class CollectingArguments:
    """How LoRAs are collected.

    Args:
        output_dir (`str`): Where snapshots and progress are kept; a second start goes on there.
        num_train_epochs (`int`, defaults to 150): Epochs for each task (the paper's).
        num_snapshots (`int`, defaults to 50): K: the LoRA of each of the last K epochs is kept (the paper's).
        learning_rate (`float`, defaults to 1e-3): Peak learning rate.
        lr_scheduler_type (`str`, defaults to `"constant_with_warmup"`): Schedule; warm-up takes 5 % of the steps.
        per_device_train_batch_size (`int`, defaults to 8): Batch of one worker.
        dtype (`str`, defaults to `"float32"`): dtype of the frozen base; the LoRA is trained in fp32.
        dataset_kwargs (`dict`): For `task.train_dataset`, e.g. `{"block_size": 256, "blocks_per_epoch": 80}`.
        seed (`int`, defaults to 0): One seed for A, B and the order of the data, the same for all tasks.
        num_workers (`int`, defaults to 1): Processes that the tasks are spread over.
        shard (`str`, *optional*): `"i/n"` with 1 <= i <= n: only the i-th of n parts of the tasks, for array jobs on one file system.

    Raises:
        `ValueError`: If a number is out of range.
    """

    output_dir: str
    num_train_epochs: int = 150
    num_snapshots: int = 50
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "constant_with_warmup"
    per_device_train_batch_size: int = 8
    dtype: str = "float32"
    dataset_kwargs: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    num_workers: int = 1
    shard: str | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 1 <= self.num_snapshots <= self.num_train_epochs:
            raise ValueError(f"num_snapshots={self.num_snapshots} must be between 1 and num_train_epochs={self.num_train_epochs}.")
        if self.num_workers < 1:
            raise ValueError(f"num_workers={self.num_workers} must be at least 1.")
        self.part()

    def part(self) -> tuple[int, int]:
        """The shard as (zero-based index, count)."""
        try:
            index, count = (int(number) for number in (self.shard or "1/1").split("/"))
        except ValueError:
            index, count = 0, 0
        if not 1 <= index <= count:
            raise ValueError(f"shard={self.shard!r} must be 'i/n' with 1 <= i <= n, such as '2/8'.")
        return index - 1, count


class SnapshotCallback(TrainerCallback):
    """Saves the LoRA of each of the last K epochs as `epoch-0101.safetensors`, atomically.

    Args:
        folder (`Path`): Where to.
        num_snapshots (`int`): K.

    Raises:
        `ValueError`: If the LoRA holds a value that is not finite; nothing is written then.
    """

    def __init__(self, folder: Path, num_snapshots: int):
        self.folder, self.num_snapshots = folder, num_snapshots

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save, if this is one of the last K epochs."""
        epoch = round(state.epoch or 0)
        if epoch <= args.num_train_epochs - self.num_snapshots:
            return
        state_dict = get_peft_model_state_dict(kwargs["model"], save_embedding_layers=False)
        tensors = {key: value.detach().cpu().contiguous() for key, value in state_dict.items()}
        for key, value in tensors.items():
            if not torch.isfinite(value).all():
                raise ValueError(f"Task {self.folder.name!r}: {key} is not finite after epoch {epoch}. Lower the learning rate.")
        with replacing_file(self.folder / f"epoch-{epoch:04d}.safetensors") as temporary:
            save_file(tensors, temporary)


def collect(
    base_model: str | os.PathLike[str], tasks: Sequence[Task], lora_config: LoraConfig, args: CollectingArguments
) -> AdapterCollection | None:
    """Train one LoRA for each task and gather their snapshots.

    All tasks start from the same A and B, so that what differs between two snapshots is what the tasks taught. Finished tasks are
    skipped on a second start. Workers train outside any process group: inside one, the Trainer would average the gradients of
    different tasks.

    Args:
        base_model (`str` or `Path`): Hub id or folder of the base.
        tasks (`Sequence[Task]`): With different names.
        lora_config (`LoraConfig`): The LoRA of every task.
        args ([`CollectingArguments`]): The recipe.

    Returns:
        [`AdapterCollection`] or `None`: None while other shards still have tasks to finish.

    Raises:
        `ValueError`: If names repeat, `output_dir` holds another recipe, or the process is part of a torchrun group.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("collect() spreads tasks over processes of its own: use num_workers or shard='i/n' instead of torchrun.")
    folder = Path(args.output_dir)
    names = [safe_name(task.name, "task") for task in tasks]
    if not names or len({name.casefold() for name in names}) != len(names):
        raise ValueError(f"Tasks need different names, found {names}.")
    for name in names:
        inside(folder, name)
    if lora_config.r <= 0:
        raise ValueError(f"The LoRA rank must be a positive integer, found r={lora_config.r}.")
    _check_before_training(str(base_model), lora_config, args)
    _check_recipe(folder, _recipe(base_model, lora_config, args))
    index, count = args.part()
    with _locked(folder, index, count):
        waiting = [task for task in tasks[index::count] if not _finished(folder / task.name, args)]
        if args.num_workers == 1 or len(waiting) <= 1:
            _work(str(base_model), waiting, lora_config, args)
        else:
            _spread(str(base_model), waiting, lora_config, args)
    if not all(_finished(folder / name, args) for name in names):
        return None
    return gather(folder, tasks)


def gather(folder: str | Path, tasks: Sequence[Task]) -> AdapterCollection:
    """Read the finished tasks of a collecting folder.

    Args:
        folder (`str` or `Path`): `output_dir` of [`collect`].
        tasks (`Sequence[Task]`): Which, and in what order.

    Returns:
        [`AdapterCollection`]

    Raises:
        `ValueError`: If a task is not finished, or two have different layouts.
    """
    root = Path(folder)
    recipe = _read_json(root / RECIPE)
    layout: AdapterLayout | None = None
    snapshots, losses = {}, {}
    for task in tasks:
        if not (root / safe_name(task.name, "task") / DONE).is_file():
            raise ValueError(f"Task {task.name!r} is not finished in {root}: run collect again.")
        done = _read_json(root / task.name / DONE)
        own = AdapterLayout.from_dict(done["layout"])
        layout = layout or own
        if own.fingerprint != layout.fingerprint:
            raise ValueError(f"Task {task.name!r} has another layout: {layout.difference(own)}.")
        snapshots[task.name] = torch.stack([layout.flatten(_read_snapshot(file)) for file in _snapshots(inside(root, task.name))])
        if len(snapshots[task.name]) != recipe["num_snapshots"]:
            found, wanted = len(snapshots[task.name]), recipe["num_snapshots"]
            raise ValueError(f"Task {task.name!r} has {found} snapshots in {root}, its recipe {wanted}: run collect again.")
        losses[task.name] = done["train_loss"]
    assert layout is not None
    metadata = {
        **recipe,
        "train_loss": losses,
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
    }
    return AdapterCollection(layout, snapshots, {task.name: list(task.descriptions) for task in tasks}, metadata=metadata)


def _recipe(base_model: str | os.PathLike[str], lora_config: LoraConfig, args: CollectingArguments) -> dict[str, Any]:
    """What a snapshot depends on, JSON-able."""
    lora = {name: getattr(lora_config, name) for name in ("r", "lora_alpha", "use_rslora", "lora_dropout", "init_lora_weights")}
    targets = lora_config.target_modules
    lora["target_modules"] = targets if isinstance(targets, str) else sorted(targets or [])
    spread = ("output_dir", "num_workers", "shard")
    own = {name: value for name, value in asdict(args).items() if name not in spread}
    return json.loads(json.dumps({"base_model": str(base_model), "lora": lora, **own}))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}): it is of an interrupted run; delete its folder and collect again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no JSON object: it is of another program; delete its folder and collect again.")
    return found


def _snapshots(folder: Path) -> list[Path]:
    """The snapshots of a task, by epoch."""
    return sorted(folder.glob("epoch-*.safetensors"), key=lambda file: int(file.stem.split("-")[1]))


def _read_snapshot(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is no whole safetensors file ({error}): delete its folder and run collect again.") from error


def _finished(folder: Path, args: CollectingArguments) -> bool:
    """Whether a task was trained to its end; one that has lost snapshots since is nobody's to guess at."""
    if not (folder / DONE).is_file():
        return False
    found = len(_snapshots(folder))
    if found != args.num_snapshots:
        raise ValueError(f"{folder} is of a finished task and has {found} of {args.num_snapshots} snapshots: delete it to train anew.")
    return True


@contextmanager
def _locked(folder: Path, index: int, count: int) -> Iterator[None]:
    """Keep a second process out of the same part of a work folder."""
    lock = FileLock(folder / f".lock-{index + 1}-of-{count}")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"Another process is collecting into {folder}: wait for it, or choose another folder or shard.") from error
    with lock:
        lock.release()
        yield


def _check_before_training(base_model: str, lora_config: LoraConfig, args: CollectingArguments) -> None:
    """Refuse what would fail after hours: a LoRA on the base, on the meta device, must have a layout; a block must fit its context."""
    check_fields(lora_config.to_dict())
    config = AutoConfig.from_pretrained(base_model, trust_remote_code=False)
    bound, block_size = context_size(config), args.dataset_kwargs.get("block_size")
    if bound and isinstance(block_size, int) and block_size > bound:
        raise ValueError(f"block_size={block_size} is more than the {bound} tokens that {base_model} reads at once.")
    with torch.device("meta"):
        model = get_peft_model(base_class(config)._from_config(config), copy.deepcopy(lora_config))
    AdapterLayout.from_peft_model(model)


def _check_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / RECIPE
    if not file.is_file():
        with replacing_file(file) as temporary:
            temporary.write_text(json.dumps(recipe, indent=1))
        return
    found = _read_json(file)
    for name, value in recipe.items():
        if found.get(name) != value:
            raise ValueError(
                f"{folder} holds LoRAs of another recipe: {name} was {found.get(name)!r}, now {value!r}. Choose another folder."
            )


def _spread(base_model: str, tasks: Sequence[Task], lora_config: LoraConfig, args: CollectingArguments) -> None:
    """Train in processes of their own, each with its share of the threads."""
    context = multiprocessing.get_context("spawn")
    count = min(args.num_workers, len(tasks))
    threads = max(1, torch.get_num_threads() // count)
    workers = [
        context.Process(target=_work, args=(base_model, tasks[i::count], lora_config, args, threads), daemon=True) for i in range(count)
    ]
    try:
        # Workers inherit the blocked Ctrl-C: it is for this process, which ends them. Starting the tracker would unblock it.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        for number, worker in enumerate(workers):
            with _one_gpu(number):
                worker.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        with tqdm(total=len(tasks), desc="collecting", unit="task") as bar:
            while alive := [worker for worker in workers if worker.is_alive()]:
                alive[0].join(0.5)
                bar.update(sum((Path(args.output_dir) / task.name / DONE).is_file() for task in tasks) - bar.n)
    finally:
        for worker in filter(lambda worker: worker.is_alive(), workers):
            worker.terminate()
            worker.join()
    if failed := [worker.exitcode for worker in workers if worker.exitcode]:
        raise RuntimeError(
            f"{len(failed)} of {count} workers failed (exit code {failed[0]}); finished tasks are kept in {args.output_dir}."
        )


@contextmanager
def _one_gpu(number: int) -> Iterator[None]:
    """What a process started here sees of the GPUs: one, in turn."""
    name, before = "CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = before.split(",") if before else [str(index) for index in range(torch.cuda.device_count())]
    if not visible:
        yield
        return
    os.environ[name] = visible[number % len(visible)]
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


def _work(base_model: str, tasks: Sequence[Task], lora_config: LoraConfig, args: CollectingArguments, threads: int | None = None) -> None:
    if not tasks:
        return
    if threads:
        torch.set_num_threads(threads)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an orderly end: semaphores are released
    base: nn.Module = base_class(AutoConfig.from_pretrained(base_model, trust_remote_code=False)).from_pretrained(
        base_model, dtype=args.dtype, use_safetensors=True
    )
    processor = AutoProcessor.from_pretrained(base_model, trust_remote_code=False)
    for task in tqdm(tasks, desc="collecting", unit="task", disable=threads is not None):
        base = _train(base, processor, task, lora_config, args)


def _train(base: nn.Module, processor: Any, task: Task, lora_config: LoraConfig, args: CollectingArguments) -> nn.Module:
    """Train the LoRA of one task; returns the base as it was."""
    folder = inside(args.output_dir, safe_name(task.name, "task"))
    shutil.rmtree(folder, ignore_errors=True)  # an unfinished run of this task
    folder.mkdir(parents=True)
    set_seed(args.seed)
    model = get_peft_model(base, copy.deepcopy(lora_config))  # peft resolves target_modules in place
    assert isinstance(model, PeftModel)
    with tempfile.TemporaryDirectory() as scratch:
        training_args = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=args.num_train_epochs,
            per_device_train_batch_size=args.per_device_train_batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type=args.lr_scheduler_type,
            warmup_steps=0.05,
            weight_decay=0.0,
            seed=args.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        training_args._n_gpu = min(1, training_args.n_gpu)  # the Trainer would split batches over all that it sees
        trainer = Trainer(
            model=model,
            args=training_args,
            train_dataset=task.train_dataset(processor, **args.dataset_kwargs),
            callbacks=[SnapshotCallback(folder, args.num_snapshots)],
        )
        trainer.remove_callback(PrinterCallback)  # it prints on stdout, which is the caller's
        loss = trainer.train().training_loss
    done = {"layout": AdapterLayout.from_peft_model(model).to_dict(), "train_loss": round(loss, 4)}
    with replacing_file(folder / DONE) as temporary:
        temporary.write_text(json.dumps(done))
    return model.unload()
