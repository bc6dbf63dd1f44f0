"""Names and paths that come from files and users, and files and folders that are old or new, never half."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAX_NAME_BYTES = 200  # file systems take 255; what is added to a name needs room
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def safe_name(name: Any, what: str) -> str:
    """A name that is used as the name of a file or folder, checked.

    Args:
        name: From a JSON file or a user.
        what (`str`): What it names, for the message: `"task"`.

    Returns:
        `str`: `name`.

    Raises:
        `ValueError`: If it is no string, empty, has a separator, a control character or only dots, starts or ends with a space, or is
            longer than 200 bytes.

    Example:

    ```python
    >>> safe_name("sofa", "task")
    'sofa'
    >>> safe_name("../home", "task")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: The task name '../home' must be a plain file name: ...

    ```
    """
    if (
        not isinstance(name, str)
        or not name.strip(". ")
        or name != name.strip(" ")
        or any(character in "/\\:" or unicodedata.category(character) in ("Cc", "Cs") for character in name)
        or len(name.encode()) > MAX_NAME_BYTES
    ):
        raise ValueError(
            f"The {what} name {str(name)[:80]!r} must be a plain file name: not empty, no separators, control characters or dots alone,"
            f" at most {MAX_NAME_BYTES} bytes."
        )
    return name


def inside(root: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """A path that must lie inside a folder, symbolic links followed.

    Args:
        root (`str` or `Path`): The folder.
        path (`str` or `Path`): Relative to it.

    Returns:
        `Path`: `root / path`.

    Raises:
        `ValueError`: If it leads out of `root`.
    """
    found, top = Path(root) / path, Path(root).resolve()
    if top not in found.resolve().parents:
        raise ValueError(f"{str(path)!r} leads out of {root}: it must lie inside.")
    return found


@contextmanager
def replacing_file(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file beside its place and swap it in once it is whole; with the permissions that the umask says.

    Args:
        target (`str` or `Path`): The file; its folder exists.

    Yields:
        `Path`: Where to write.
    """
    path = Path(target)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:50]}-", suffix=".part", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(_file_mode(path.parent))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a folder beside its place and swap it in whole; files of the old one that the new one has not are kept.

    Args:
        target (`str` or `Path`): The folder; it and its parents may be missing.

    Yields:
        `Path`: An empty folder to write into.

    Raises:
        `OSError`: If `target` is a file, a mount point or a URL.
    """
    path = Path(target).resolve()
    if re.match(r"[A-Za-z][\w+.-]+:/", str(target)):  # Path makes one stroke of two
        raise OSError(f"{target} is a URL, and this is written into folders: save it into one, then copy that.")
    if path.exists() and not path.is_dir():
        raise OSError(f"{target} is a file: choose a folder.")
    if path.is_mount():
        raise OSError(f"{target} is a mount point, which cannot be replaced in one step: choose a folder in it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name[:50]}-", suffix=".part", dir=path.parent))
    try:
        yield temporary
        mode = _file_mode(temporary)
        for file in temporary.rglob("*"):
            file.chmod(mode | 0o111 & (mode >> 2) if file.is_dir() else mode)
        temporary.chmod(mode | 0o111 & (mode >> 2))
        if path.exists():
            _keep_others(path, temporary)
            _exchange(temporary, path)
        else:
            os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _file_mode(folder: Path) -> int:
    """The permissions of a new file in `folder`: the umask, read without setting it."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".mode-") as scratch:
        probe = Path(scratch) / "probe"
        probe.touch()
        return probe.stat().st_mode & 0o777


def _keep_others(old: Path, new: Path) -> None:
    """Link what the old folder has and the new one has not."""
    for entry in old.iterdir():
        kept = new / entry.name
        if kept.exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, kept, symlinks=True, copy_function=os.link)
        else:
            os.link(entry, kept, follow_symlinks=False)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders in one step where the system can, else in two renames."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if hasattr(libc, "renameat2") and not libc.renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE):
            return
    away = new.with_suffix(".old")
    os.rename(old, away)
    os.rename(new, old)
    os.rename(away, new)  # where the caller removes it
