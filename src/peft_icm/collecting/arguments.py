"""What is collected, and how."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

LAUNCHERS = ("local", "ray", "submitit")
SPREADING = (  # changes no snapshot
    "output_dir", "launcher", "ray_address", "cpus_per_task", "gpus_per_task", "slurm_partition", "slurm_time", "num_workers", "shard",
)  # fmt: skip


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
class CollectingArguments:
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
        launcher (`str`, defaults to `"local"`): Where tasks are trained: `"local"`, one after the other in this process; `"ray"`, each as a
            task of Ray, on a cluster or in processes of this machine; `"submitit"`, each as a job of one SLURM array.
        ray_address (`str`, *optional*): `"host:port"` of the cluster's head, or `"auto"`; by default `RAY_ADDRESS`, else Ray is started
            on this machine.
        cpus_per_task (`int`, defaults to 1): Cores of each task, and its threads.
        gpus_per_task (`float`, *optional*): GPUs of each task; with Ray a share too, such as 0.5. By default one with Ray, where the
            cluster has any, and none with SLURM.
        slurm_partition (`str`, *optional*): Partition of the jobs.
        slurm_time (`int`, defaults to 1440): Minutes after which SLURM may end a job.
        num_workers (`int`, *optional*): Deprecated, goes in 0.3.0: `launcher="ray"` with so many cores for each task that this many run at
            once.
        shard (`str`, *optional*): Deprecated, goes in 0.3.0, has no effect: processes that are started on one folder share its tasks.

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
    launcher: str = "local"
    ray_address: str | None = None
    cpus_per_task: int = 1
    gpus_per_task: float | None = None
    slurm_partition: str | None = None
    slurm_time: int = 1440
    num_workers: int | None = None
    shard: str | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 1 <= self.num_snapshots <= self.num_train_epochs:
            raise ValueError(f"num_snapshots={self.num_snapshots} must be between 1 and num_train_epochs={self.num_train_epochs}.")
        self._read_deprecated()
        if self.launcher not in LAUNCHERS:
            raise ValueError(f"launcher={self.launcher!r} must be one of {', '.join(LAUNCHERS)}.")
        for name, launcher in (("ray_address", "ray"), ("slurm_partition", "submitit")):
            if getattr(self, name) is not None and launcher != self.launcher:
                raise ValueError(f"{name}={getattr(self, name)!r} goes with launcher={launcher!r}, found launcher={self.launcher!r}.")
        if self.cpus_per_task < 1 or self.slurm_time < 1:
            raise ValueError(f"cpus_per_task={self.cpus_per_task} and slurm_time={self.slurm_time} must be at least 1.")
        gpus = self.gpus_per_task or 0
        if gpus < 0 or (gpus % 1 and (gpus > 1 or self.launcher == "submitit")):
            raise ValueError(f"gpus_per_task={gpus} must be a whole number or, with launcher='ray', a share of one.")

    def _read_deprecated(self) -> None:
        """0.1.0 had a pool of processes of its own; a dataclass's `__init__` and `__post_init__` stand between here and who wrote it."""
        if self.shard is not None:
            line = "shard is deprecated and goes in 0.3.0: processes that are started on one folder share its tasks without it."
            warnings.warn(line, FutureWarning, stacklevel=4)
        if self.num_workers is not None:
            line = "num_workers is deprecated and goes in 0.3.0: write launcher='ray', and how many cores a task gets in cpus_per_task."
            warnings.warn(line, FutureWarning, stacklevel=4)
            if self.num_workers > 1 and self.launcher == "local":
                self.launcher, self.cpus_per_task = "ray", -(-(os.cpu_count() or 1) // self.num_workers)
        self.num_workers = self.shard = None  # read
