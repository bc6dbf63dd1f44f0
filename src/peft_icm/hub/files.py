"""Hugging Face Hub: find a folder, fill a card from hub_cards/, push both in one commit."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

BASE_FOLDER = "base_model"


CARD = "README.md"


REPORT = "memorisation.json"


MARK = re.compile(r"\n<!-- written by peft_icm, sha256 ([0-9a-f]{64}) -->\n*$")


# ---------------------------------------------------------------------- pull
def resolve(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    allow_patterns: Sequence[str] | None = None,
    repo_type: str = "model",
) -> Path:
    """The local folder of a folder or a Hub repo; what is missing is downloaded.

    Args:
        name (`str` or `Path`): A folder or `"org/name"`.
        revision (`str`, *optional*): Branch, tag or commit.
        token (`str` or `bool`, *optional*): Access token; by default the stored one.
        cache_dir (`str` or `Path`, *optional*): Cache; by default that of huggingface_hub.
        local_files_only (`bool`, defaults to `False`): Look only in the cache.
        allow_patterns (`Sequence[str]`, *optional*): Download only these files.
        repo_type (`str`, defaults to `"model"`): `"model"` or `"dataset"`.

    Returns:
        `Path`

    Raises:
        `OSError`: If there is no such folder, repo or revision, or the Hub cannot be reached; with what to do.
    """
    if os.path.isdir(name):
        return Path(name)
    try:
        path = snapshot_download(
            str(name),
            repo_type=repo_type,
            revision=revision,
            token=token,
            cache_dir=Path(cache_dir) if cache_dir else None,
            local_files_only=local_files_only,
            allow_patterns=list(allow_patterns) if allow_patterns else None,
        )
    except HFValidationError as error:
        raise OSError(f"{str(name)!r} is neither an existing folder nor the id of a Hub repo ('org/name').") from error
    except RevisionNotFoundError as error:
        raise OSError(f"{name} has no revision {revision!r}: pass a branch, a tag or a commit that exists.") from error
    except LocalEntryNotFoundError as error:
        raise OSError(f"{name} is not in the local cache, and the Hub was not asked or did not answer: check the connection.") from error
    except RepositoryNotFoundError as error:
        raise OSError(
            f"{name} is neither a folder nor a {repo_type} repo that you may read: check the spelling, or pass token=."
        ) from error
    return Path(path)


# ---------------------------------------------------------------------- push
def push_folder(
    write: Callable[[Path], Any],
    repo_id: str,
    *,
    card: Callable[[Path], ModelCard],
    repo_type: str = "model",
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    overwrite_card: bool = False,
) -> CommitInfo:
    """Write a folder, add its card, and upload both in one commit.

    Args:
        write (`Callable[[Path], Any]`): Writes the files into an empty folder.
        repo_id (`str`): `"org/name"`; created where it does not exist.
        card (`Callable[[Path], ModelCard]`): Makes the card of the written folder.
        repo_type (`str`, defaults to `"model"`): `"model"` or `"dataset"`.
        commit_message (`str`, *optional*): Message of the commit.
        private (`bool`, *optional*): Create a private repo.
        token (`str` or `bool`, *optional*): Access token.
        revision (`str`, *optional*): Branch; created where it does not exist.
        create_pr (`bool`, defaults to `False`): Open a pull request.
        overwrite_card (`bool`, defaults to `False`): Replace a card that was edited by hand on the Hub.

    Returns:
        `huggingface_hub.CommitInfo`

    Raises:
        `huggingface_hub.errors.HfHubHTTPError`: If the Hub refuses: no token, no right to write, a failed upload. Nothing is committed
            then.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
    if revision and not create_pr:
        api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(folder)
        if overwrite_card or not _edited_by_hand(api, repo_id, repo_type, revision):
            text = str(card(folder)).rstrip("\n") + "\n"
            mark = f"\n<!-- written by peft_icm, sha256 {hashlib.sha256(text.encode()).hexdigest()} -->\n"
            (folder / CARD).write_text(text + mark, encoding="utf-8", newline="\n")
        else:
            (folder / CARD).unlink(missing_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            repo_type=repo_type,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )


def _edited_by_hand(api: HfApi, repo_id: str, repo_type: str, revision: str | None) -> bool:
    """Whether the repo has a card that does not carry the hash of its own text."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            file = api.hf_hub_download(repo_id, CARD, repo_type=repo_type, revision=revision, local_dir=scratch)
        except EntryNotFoundError:
            return False
        text = Path(file).read_bytes().decode()
    mark = MARK.search(text)
    return mark is None or hashlib.sha256(text[: mark.start()].encode()).hexdigest() != mark.group(1)


def copy_base(base: str | os.PathLike[str], folder: Path) -> None:
    """Copy a base model's folder into `base_model/` of `folder`; checkpoints and pickles stay behind."""
    ignored = shutil.ignore_patterns(".*", "checkpoint-*", "*.bin", "*.pt", "*.pth", "*.pkl")
    shutil.copytree(base, folder / BASE_FOLDER, dirs_exist_ok=True, ignore=ignored)
