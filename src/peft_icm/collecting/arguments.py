"""What is collected, and how."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from ..launching.arguments import LaunchArguments

# Changes no snapshot.
SPREADING = {"output_dir", "num_workers", "shard", *(field.name for field in fields(LaunchArguments))}


class Task(Protocol):
    """What collecting needs of a task; [`LanguageModelingTask`] is one.

    Args:
        name (`str`): A plain file name.
        descriptions (`list[str]`): Sentences that ask for it; one string is a list of one.
    """

    name: str
    descriptions: list[str]

    @property
    def train_dataset(self) -> Callable[..., Any]:
        """`train_dataset(processor, **dataset_kwargs)`: a map-style data set of model inputs with labels.

        Its content is hashed, so that finished LoRAs are only taken for the data that they were trained on: by its own `fingerprint()`
        where it has one, as those of `peft_icm.tasks` do, else item by item.
        """


@dataclass
class CollectingArguments(LaunchArguments):
    """How LoRAs are collected.

    Args:
        output_dir (`str`): Where snapshots and progress are kept; a second start goes on there. A folder, which all machines must share, or
            a URL that fsspec opens, such as `"s3://bucket/loras"`; a URL has no locks, so that one `collect` at a time may use it.
        num_train_epochs (`int`, defaults to 150): Epochs for each task (the paper's).
        num_snapshots (`int`, defaults to 50): K: the LoRA of each of the last K epochs is kept (the paper's).
        learning_rate (`float`, defaults to 1e-3): Peak learning rate.
        lr_scheduler_type (`str`, defaults to `"constant_with_warmup"`): Schedule; warm-up takes 5 % of the steps.
        per_device_train_batch_size (`int`, defaults to 8): Batch of one worker.
        dtype (`str`, defaults to `"float32"`): dtype of the frozen base; the LoRA is trained in fp32.
        dataset_kwargs (`dict`): For `task.train_dataset`, e.g. `{"block_size": 256, "blocks_per_epoch": 80}`.
        seed (`int`, defaults to 0): One seed for A, B and the order of the data, the same for all tasks.
        num_workers (`int`, *optional*): Deprecated, goes in 0.3.0: `launcher="ray"` with so many cores for each task that this many run at
            once.
        shard (`str`, *optional*): Deprecated, goes in 0.3.0, has no effect: processes that are started on one folder share its tasks.
        **kwargs: Where tasks are trained, of [`LaunchArguments`]: `launcher`, `ray_address`, `cpus_per_task`, `gpus_per_task`,
            `slurm_partition`, `slurm_time`.

    Raises:
        `ValueError`: If a number is out of range, the launcher is none of these, or an option is of another launcher.
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
    num_workers: int | None = None
    shard: str | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 1 <= self.num_snapshots <= self.num_train_epochs:
            raise ValueError(f"num_snapshots={self.num_snapshots} must be between 1 and num_train_epochs={self.num_train_epochs}.")
        self._read_deprecated()
        super().__post_init__()

    def _read_deprecated(self) -> None:
        """0.1.0 had a pool of processes of its own; a dataclass's `__init__` and `__post_init__` stand between here and who wrote it."""
        if self.shard is not None:
            line = "shard is deprecated and goes in 0.3.0: processes that are started on one folder share its tasks without it."
            warnings.warn(line, FutureWarning, stacklevel=4)
        if self.num_workers is not None:
            line = "num_workers is deprecated and goes in 0.3.0: write launcher='ray', and how many cores a task gets in cpus_per_task."
            warnings.warn(line, FutureWarning, stacklevel=4)
            if self.num_workers > 1 and self.launcher == "local":
                from joblib import cpu_count  # what this process may use: less than the machine has in a container or a job

                self.launcher, self.cpus_per_task = "ray", -(-cpu_count() // self.num_workers)
        self.num_workers = self.shard = None  # read
