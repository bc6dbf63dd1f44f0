"""Tasks trained one after the other: what a process does, wherever it was started."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping

from peft import LoraConfig
from torch import nn
from transformers import AutoConfig, AutoProcessor

from ..adapters.base import base_class, opening_base
from .arguments import CollectingArguments, Task
from .folder import locked, task_lock
from .lora import train_lora
from .remote import is_finished, send, working_folder

logger = logging.getLogger(__name__)


def work(
    base_model: str,
    tasks: Iterable[Task],
    lora_config: LoraConfig,
    args: CollectingArguments,
    data: Mapping[str, str],
    patience: float = 0,
) -> Iterator[None]:
    """Train the LoRAs of tasks one after the other, without those that another process is at or has finished.

    Args:
        base_model (`str`): Hub id or folder of the base.
        tasks (`Iterable[Task]`): Not finished yet.
        lora_config (`LoraConfig`): The LoRA of every task.
        args ([`CollectingArguments`]): The recipe.
        data (`Mapping[str, str]`): Hash of each task's data, by its name.
        patience (`float`, defaults to 0): Seconds that a task's lock is waited for.

    Yields:
        `None`: After each task; what it learned lies in `args.output_dir`.

    Raises:
        `ValueError`: If a LoRA holds a value that is not finite, or the base's files are corrupted.
        `OSError`: If the base cannot be read, or `args.output_dir` is a URL that cannot be written to.
    """
    with opening_base(base_model):
        kind = base_class(AutoConfig.from_pretrained(base_model, trust_remote_code=False))
        base: nn.Module = kind.from_pretrained(base_model, dtype=args.dtype, use_safetensors=True)
        processor = AutoProcessor.from_pretrained(base_model, trust_remote_code=False)
    with working_folder(args.output_dir) as folder:
        for task in tasks:
            with locked(task_lock(folder, task.name), patience) as held:
                if not held:
                    logger.warning("Task %r is being trained by another process: it is left to it.", task.name)
                elif not is_finished(args.output_dir, task.name):
                    base = train_lora(base, processor, task, lora_config, args, folder, data[task.name])
                    send(args.output_dir, folder, task.name)
            yield
