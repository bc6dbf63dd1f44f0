"""A work folder: made, kept from other processes, and what of it is finished."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

DONE = "done.json"
LOCKS = ".locks"
JOBS = ".jobs"  # what submitit writes


def make_folder(folder: str | os.PathLike[str], argument: str) -> Path:
    """Make the folder of an argument, where it is not there yet.

    Args:
        folder (`str` or `Path`): The folder.
        argument (`str`): What names it, for the message: `"output_dir"`.

    Returns:
        `Path`

    Raises:
        `OSError`: If it is a file, or cannot be made.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise OSError(f"{argument}={str(folder)!r} is a file: choose a folder.") from error
    except OSError as error:
        raise OSError(f"{argument}={str(folder)!r} cannot be made ({error.strerror}): choose a folder that you may write to.") from error
    return Path(folder)


@contextmanager
def locked(file: Path, patience: float = 0) -> Iterator[bool]:
    """Hold a lock, where no other process or thread does.

    Args:
        file (`Path`): The lock's file, in a folder that exists; it stays, and says nothing.
        patience (`float`, defaults to 0): Seconds that it is waited for.

    Yields:
        `bool`: Whether this call holds the lock. A process that dies lets go of it.
    """
    lock = FileLock(file)
    try:
        lock.acquire(timeout=patience)
        held = True
    except Timeout:
        held = False
    try:
        yield held
    finally:
        lock.release()


def task_lock(folder: Path, task: str) -> Path:
    """The file of a task's lock: whoever holds it trains the task."""
    return folder / LOCKS / task


def snapshot_files(folder: Path) -> list[Path]:
    """The snapshots of a task, by epoch."""
    return sorted(folder.glob("epoch-*.safetensors"), key=lambda file: int(file.stem.split("-")[1]))


def read_snapshot(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a snapshot; `ValueError` if its file is not whole."""
    with _whole(file):
        return load_file(file)


def check_snapshot(file: Path) -> None:
    """Refuse a file that was cut short, by its header and its length."""
    with _whole(file), safe_open(file, framework="pt"):
        pass


@contextmanager
def _whole(file: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{file} is no whole safetensors file ({error}): delete its folder and run collect again.") from error


def check_finished(folder: Path, num_snapshots: int, data_sha256: str) -> None:
    """Refuse a finished task that has lost snapshots since, or was trained on something else; nobody guesses at either.

    Args:
        folder (`Path`): Of the task.
        num_snapshots (`int`): How many there must be.
        data_sha256 (`str`): Of the data that the task has now.

    Raises:
        `ValueError`: Names the folder and what to do.
    """
    files = snapshot_files(folder)
    if len(files) != num_snapshots:
        raise ValueError(f"{folder} is of a finished task and has {len(files)} of {num_snapshots} snapshots: delete it to train anew.")
    for file in files:
        check_snapshot(file)
    if read_json(folder / DONE).get("data_sha256") != data_sha256:
        raise ValueError(
            f"{folder} is of a task that was trained on other data than it has now: delete it to train anew, or choose another output_dir."
        )


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file of a work folder; `ValueError` if there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}): it is of an interrupted run; delete its folder and collect again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no JSON object: it is of another program; delete its folder and collect again.")
    return found
