"""Tasks spread over processes, which end with the one that started them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path

import torch
from peft import LoraConfig
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoProcessor

from ..adapters.base import base_class
from .arguments import CollectingArguments, Task
from .folder import DONE, locked, task_lock
from .lora import train_lora

logger = logging.getLogger(__name__)


def work(
    base_model: str,
    tasks: Sequence[Task],
    lora_config: LoraConfig,
    args: CollectingArguments,
    data: Mapping[str, str],
    threads: int | None = None,
) -> None:
    """Train the LoRAs of tasks one after the other, without those that another process is at or has finished.

    Args:
        base_model (`str`): Hub id or folder of the base.
        tasks (`Sequence[Task]`): Not finished yet.
        lora_config (`LoraConfig`): The LoRA of every task.
        args ([`CollectingArguments`]): The recipe.
        data (`Mapping[str, str]`): Hash of each task's data, by its name.
        threads (`int`, *optional*): In a process of its own, how many threads it may use.
    """
    if not tasks:
        return
    if threads:
        _end_with_parent()
        torch.set_num_threads(threads)
    base: nn.Module = base_class(AutoConfig.from_pretrained(base_model, trust_remote_code=False)).from_pretrained(
        base_model, dtype=args.dtype, use_safetensors=True
    )
    processor = AutoProcessor.from_pretrained(base_model, trust_remote_code=False)
    folder = Path(args.output_dir)
    for task in tqdm(tasks, desc="collecting", unit="task", disable=threads is not None):
        with locked(task_lock(folder, task.name)) as held:
            if not held:
                logger.warning("Task %r is being trained by another process: it is left to it.", task.name)
            elif not (folder / task.name / DONE).is_file():
                base = train_lora(base, processor, task, lora_config, args, data[task.name])


def _end_with_parent() -> None:
    """End in good order, semaphores released, on SIGTERM; which the end of the parent is too, however it ended."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def spread(base_model: str, tasks: Sequence[Task], lora_config: LoraConfig, args: CollectingArguments, data: Mapping[str, str]) -> None:
    """[`work`] in `args.num_workers` processes, each with its share of the threads and one GPU.

    Raises:
        `ChildProcessError`: If a worker failed.
    """
    context = multiprocessing.get_context("spawn")
    count = min(args.num_workers, len(tasks))
    threads = max(1, torch.get_num_threads() // count)
    workers = [
        context.Process(target=work, args=(base_model, tasks[i::count], lora_config, args, data, threads), daemon=True)
        for i in range(count)
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
        raise ChildProcessError(
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
