"""What is collected, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol


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
