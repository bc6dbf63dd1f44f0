"""A work folder at a URL: worked in here, sent there task by task."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import remote
from .folder import DONE, LOCKS, make_folder

PAUSES = (2.0, 10.0)  # seconds before a task is sent again


@contextmanager
def working_folder(output_dir: str) -> Iterator[Path]:
    """`output_dir` itself or, of a URL, an empty folder that stands in for it as long as it is worked in.

    Raises:
        `OSError`: If it is a file, or cannot be made.
    """
    if not remote.is_url(output_dir):
        yield make_folder(output_dir, "output_dir")
        return
    with tempfile.TemporaryDirectory(prefix="peft-icm-") as scratch:
        (Path(scratch) / LOCKS).mkdir()
        yield Path(scratch)


def is_finished(output_dir: str, task: str) -> bool:
    """Whether a task lies finished in `output_dir`, wherever that is."""
    done = f"{_at(output_dir, task)}/{DONE}"
    return remote.has(done) if remote.is_url(output_dir) else Path(done).is_file()


def bring(output_dir: str, folder: Path, tasks: Iterable[str]) -> None:
    """Of a URL, copy into the folder that stands in for it what lies beside the tasks, and those that are finished and not here yet."""
    if remote.is_url(output_dir):
        there = set(remote.files(output_dir))
        new = {name for name in tasks if f"{name}/{DONE}" in there and not (folder / name / DONE).is_file()}
        remote.download(output_dir, [file for file in there if file.partition("/")[0] in new or "/" not in file], folder)


def send_file(output_dir: str, file: Path) -> None:
    """Of a URL, copy a file that lies beside the tasks there: who may not write finds out."""
    if remote.is_url(output_dir):
        remote.write(_at(output_dir, file.name), file.read_bytes())


def send(output_dir: str, folder: Path, task: str) -> None:
    """Of a URL, move a finished task there; what cannot be sent is kept.

    Raises:
        `OSError`: One line, if it cannot be sent in three attempts.
    """
    if not remote.is_url(output_dir):
        return
    for pause in (*PAUSES, None):
        try:
            remote.upload(folder / task, _at(output_dir, task), last=DONE)
            break
        except OSError as error:
            if pause is None:
                kept = Path(tempfile.mkdtemp(prefix="peft-icm-kept-")) / task
                shutil.move(folder / task, kept)
                raise OSError(f"{error} Task {task!r} is trained and lies in {kept}: copy it there, and run again.") from error
            time.sleep(pause)
    shutil.rmtree(folder / task)


def _at(output_dir: str, name: str) -> str:
    return f"{output_dir.rstrip('/')}/{name}"
