"""Folders at a URL, by fsspec: `s3://`, `gs://`, `hf://`, `memory://` and whatever else has a file system there.

Such a store has no rename of a folder and no lock. A folder is there when the file that is written last is.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .disk import inside, replacing_folder


def is_url(name: str | os.PathLike[str]) -> bool:
    """Whether a name is of no local folder and no Hub id.

    Example:

    ```python
    >>> is_url("s3://bucket/loras"), is_url("org/name"), is_url("/data/loras")
    (True, False, False)

    ```
    """
    return "://" in str(name)


def files(url: str) -> list[str]:
    """The files below a URL, relative to it.

    Args:
        url (`str`): Of a folder; where there is nothing, there are no files.

    Returns:
        `list[str]`: `["recipe.json", "sofa/done.json"]`.

    Raises:
        `OSError`: One line, if it cannot be read.
    """
    with _one_line(url, "read") as (fs, root):
        fs.invalidate_cache()  # others write there too
        with suppress(FileNotFoundError):
            return [path.removeprefix(root).lstrip("/") for path in fs.find(root)]
    return []


def has(url: str) -> bool:
    """Whether there is a file at a URL; `OSError`, one line, if that cannot be told."""
    with _one_line(url, "read") as (fs, path):
        fs.invalidate_cache()
        return fs.exists(path)


def download(url: str, names: Iterable[str], folder: Path) -> None:
    """Copy files from below a URL into a folder.

    Args:
        url (`str`): Of a folder.
        names (`Iterable[str]`): Of [`files`].
        folder (`Path`): Exists; what is there of the same name is replaced.

    Raises:
        `ValueError`: If a name leads out of the folder.
        `OSError`: One line, if the URL cannot be read.
    """
    to = {name: inside(folder, name) for name in names}
    for file in to.values():
        file.parent.mkdir(parents=True, exist_ok=True)
    with _one_line(url, "read") as (fs, root):
        fs.get([f"{root}/{name}" for name in to], list(map(str, to.values())))


def write(url: str, content: bytes) -> None:
    """Write one file; `OSError`, one line, if it cannot be."""
    with _one_line(url, "written") as (fs, path):
        fs.pipe_file(path, content)


def cached(url: str, allow_patterns: Sequence[str] | None = None) -> Path:
    """A copy of a folder at a URL, in `assets/peft_icm/urls` of huggingface_hub's cache; made anew where the files there, or their dates,
    are others. Older copies stay until they are deleted: another process may be reading them.

    Args:
        url (`str`): Of the folder.
        allow_patterns (`Sequence[str]`, *optional*): Copy only these files.

    Returns:
        `Path`

    Raises:
        `OSError`: One line, if it cannot be read or there is nothing to copy.
    """
    from huggingface_hub import cached_assets_path
    from huggingface_hub.utils import filter_repo_objects

    with _one_line(url, "read") as (fs, root):
        fs.invalidate_cache()
        there = {path.removeprefix(root).lstrip("/"): (path, facts) for path, facts in fs.find(root, detail=True).items()}
        patterns = list(allow_patterns or ["*"])
        names = list(filter_repo_objects(there, allow_patterns=patterns))
        if not names:
            raise FileNotFoundError(f"there is no file {' or '.join(patterns)}")
        found = dict(there[name] for name in names)
    digest = hashlib.sha256(repr((url, sorted(found.items()))).encode()).hexdigest()
    folder = cached_assets_path("peft_icm", namespace="urls") / digest
    if not folder.is_dir():
        with replacing_folder(folder) as new:
            download(url, names, new)
    return folder


def upload(folder: Path, url: str, last: str) -> None:
    """Copy the files of a folder below a URL. Cut short, `last` is not there, an older one neither.

    Args:
        folder (`Path`): With its subfolders.
        url (`str`): Other files there are left alone. A repo of the Hub gets one commit.
        last (`str`): The file that says that the others are whole.

    Raises:
        `OSError`: One line, if the URL cannot be written to.
    """
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    with _one_line(url, "written") as (fs, root):
        if fs.protocol == "hf" and not root.startswith("buckets/"):
            place = fs.resolve_path(root)
            fs._api.upload_folder(
                repo_id=place.repo_id,
                repo_type=place.repo_type,
                revision=place.revision,
                path_in_repo=place.path_in_repo,
                folder_path=folder,
            )
            return
        if fs.exists(f"{root}/{last}"):
            fs.rm_file(f"{root}/{last}")
        others = [name for name in names if name != last]
        fs.put([str(folder / name) for name in others], [f"{root}/{name}" for name in others])
        fs.put_file(str(folder / last), f"{root}/{last}")


@contextmanager
def _one_line(url: str, done: str) -> Iterator[tuple[Any, str]]:
    """The file system and the path that a URL names; what it raises, said in one line."""
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(url)
        if "file" in fs.protocol:
            fs.auto_mkdir = True
        yield fs, path
    except Exception as error:  # every store raises what it likes
        reason = " ".join(str(error).split())
        raise OSError(
            f"{url} cannot be {done} ({type(error).__name__}: {reason}): check that its bucket or repo is there and that you may use it."
        ) from error
