"""The snapshots of a collection where they lie: read when they are asked for, in blocks that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from .layout import AdapterLayout

MAX_MEMORY_BYTES = 2 * 2**30
_BYTES = 16  # of memory for each number of a block: its fp32, as it was read, and what is computed from it
_DELAY = 5  # seconds before a progress bar is shown


class SnapshotFiles(Mapping[str, Tensor]):
    """The snapshots of a saved collection, task by task, which stay on disk.

    A task's `[K, P]` tensor is mapped into memory whenever it is asked for and let go with the tensor: what is touched of it is read, and
    no more. A change to such a tensor reaches neither the file nor the next one.

    Args:
        files (`Mapping[str, Path]`): The safetensors file of each task, with a tensor `snapshots`.

    Raises:
        `ValueError`: When a task is asked for whose file is missing, cut short, or of another shape than when it was asked for first.
    """

    def __init__(self, files: Mapping[str, Path]):
        self.files = dict(files)
        self._shapes: dict[str, torch.Size] = {}

    def __getitem__(self, task: str) -> Tensor:
        file = self.files[task]
        with open_shard(file) as shard:
            snapshots = shard.get_tensor("snapshots") if "snapshots" in shard.keys() else torch.empty(0)  # noqa: SIM118 - no dict
        if self._shapes.setdefault(task, snapshots.shape) != snapshots.shape:
            found, was = tuple(snapshots.shape), tuple(self._shapes[task])
            raise ValueError(f"{file} has changed since it was opened: its snapshots were {was}, now {found}. Open the collection again.")
        return snapshots

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def open_shard(file: Path) -> Any:
    """`safetensors.safe_open`: reads the header alone.

    Args:
        file (`Path`): Of a collection.

    Returns:
        `safe_open`: A context manager.

    Raises:
        `ValueError`: If it is missing, cut short or no safetensors file.
    """
    try:
        return safe_open(file, "pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is missing or corrupted ({error}). Download or collect it again.") from error


def check_finite(task: str, snapshots: Tensor, layout: AdapterLayout, numbers: Sequence[int] | None = None) -> None:
    """Refuse snapshots with a value that is not finite.

    Args:
        task (`str`): Whose they are.
        snapshots (`Tensor`): `[K, P]`.
        layout ([`AdapterLayout`]): Names the tensor.
        numbers (`Sequence[int]`, *optional*): Which snapshots of the task they are; by default the first K.

    Raises:
        `ValueError`: If there is one; names task, snapshot and tensor.
    """
    if snapshots.sum().isfinite():  # much faster than to look at each
        return
    bad = (~torch.isfinite(snapshots)).nonzero()
    if len(bad):  # a sum may overflow
        row, column = bad[0].tolist()
        number, key = row if numbers is None else numbers[row], layout.key_at(column)
        raise ValueError(f"Task {task!r}: snapshot {number} holds {snapshots[row, column].item()} in {key}. Train it again.")


@dataclass(frozen=True)
class TaskSnapshots:
    """Some of the snapshots of a task, each a row `[P]` in fp32 that is read when it is asked for.

    Args:
        snapshots (`Mapping[str, Tensor]`): Of a collection.
        task (`str`): Which.
        numbers (`list[int]`): Which of its snapshots, in order.
        layout ([`AdapterLayout`], *optional*): With it, rows that are read are checked for values that are not finite.
    """

    snapshots: Mapping[str, Tensor]
    task: str
    numbers: list[int]
    layout: AdapterLayout | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Tensor:
        """`[P]` of an index, `[k, P]` of a slice."""
        if not isinstance(index, slice):
            return self[index : index + 1 or None][0]
        numbers = self.numbers[index]
        first, stop = min(numbers, default=0), max(numbers, default=-1) + 1
        rows = self.snapshots[self.task][first:stop][[number - first for number in numbers]].float()
        if self.layout is not None:
            check_finite(self.task, rows, self.layout, numbers)
        return rows

    def columns(self, start: int, stop: int) -> Tensor:
        """`[k, stop - start]` of all rows, as stored."""
        return self.snapshots[self.task][:, start:stop][self.numbers]


@dataclass(frozen=True)
class SnapshotMatrix:
    """Snapshots of many tasks as one matrix `[N, P]` in fp32, of which a block is in memory at a time.

    Args:
        parts (`list[TaskSnapshots]`): Its rows, task by task.
        width (`int`): P.
        max_memory_bytes (`int`, defaults to 2 GiB): Of a block with what is computed from it. One row, or one column, is read
            however little that is.
        units (`tuple`, *optional*): Of the layout's tensors in turn their sizes (`list[int]`), the mean that is taken from each number
            of one (`Tensor`, `[num_tensors]`), and the deviation by which that is divided.
        progress (`bool`, defaults to `False`): Show a progress bar for passes that take more than some seconds.

    Example:

    ```python
    >>> matrix = SnapshotMatrix.of(torch.arange(6.0).view(3, 2))
    >>> [(rows, block.shape) for rows, block in matrix.rows()]
    [(slice(0, 3, None), torch.Size([3, 2]))]

    ```
    """

    parts: list[TaskSnapshots]
    width: int
    max_memory_bytes: int = MAX_MEMORY_BYTES
    units: tuple[list[int], Tensor, Tensor] | None = field(default=None, repr=False)
    progress: bool = False

    @classmethod
    def of(cls, snapshots: Tensor | SnapshotMatrix) -> SnapshotMatrix:
        """A tensor `[N, P]` as such a matrix; one that is a matrix is returned."""
        if isinstance(snapshots, SnapshotMatrix):
            return snapshots
        return cls([TaskSnapshots({"": snapshots}, "", list(range(len(snapshots))))], snapshots.shape[1])

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def normalized(self, sizes: list[int], mean: Tensor, std: Tensor) -> SnapshotMatrix:
        """The same rows in other units: `(row - mean) / std`, with a mean and deviation for each tensor of these sizes."""
        return replace(self, units=(sizes, mean.cpu(), std.cpu()))

    def rows(self, about: str = "rows") -> Iterator[tuple[slice, Tensor]]:
        """One pass in the order of the rows.

        Args:
            about (`str`): What is done, for the progress bar.

        Yields:
            `tuple[slice, Tensor]`: Which rows, and `[n, P]` of them: the caller's until the next block.
        """
        count = len(self)
        block = torch.empty(min(count, max(1, self.max_memory_bytes // (_BYTES * self.width))), self.width)
        start = filled = 0
        with self._bar(count, about) as bar:
            for part in self.parts:
                done = 0
                while done < len(part):
                    taken = part[done : done + len(block) - filled]
                    block[filled : filled + len(taken)] = taken
                    done, filled = done + len(taken), filled + len(taken)
                    if filled == len(block) or start + filled == count:
                        yield slice(start, start + filled), self._normalize(block[:filled], 0)
                        bar.update(filled)
                        start, filled = start + filled, 0

    def columns(self, about: str = "columns") -> Iterator[tuple[slice, Tensor]]:
        """One pass in the order of the columns; values are not checked.

        Args:
            about (`str`): What is done, for the progress bar.

        Yields:
            `tuple[slice, Tensor]`: Which columns, and `[N, n]` of them: the caller's until the next block.
        """
        step = min(self.width, max(1, self.max_memory_bytes // (_BYTES * len(self))))
        memory = torch.empty(len(self) * step)  # of all blocks: fresh memory for each takes time
        with self._bar(self.width, about) as bar:
            for start in range(0, self.width, step):
                stop = min(start + step, self.width)
                block, filled = memory[: len(self) * (stop - start)].view(len(self), -1), 0
                for part in self.parts:
                    block[filled : filled + len(part)] = part.columns(start, stop)
                    filled += len(part)
                yield slice(start, stop), self._normalize(block, start)
                bar.update(stop - start)

    def average(self) -> Tensor:
        """`[P]`: the mean row."""
        total = torch.zeros(self.width, dtype=torch.float64)
        for _, block in self.rows("mean"):
            total += block.sum(0)
        return (total / len(self)).float()

    def _normalize(self, block: Tensor, first: int) -> Tensor:
        """In place, of a block whose columns begin there: tensor by tensor, for two vectors `[P]` of means and deviations are too large."""
        stop = -first
        for size, mean, std in zip(*self.units or ((), (), ()), strict=True):
            start, stop = stop, stop + size
            block[:, max(start, 0) : max(stop, 0)].sub_(mean).div_(std)
        return block

    def _bar(self, total: int, about: str) -> Any:
        return tqdm(total=total, desc=about, leave=False, delay=_DELAY, disable=not self.progress)
