"""Hugging Face Hub: find a folder, push a folder and its card in one commit, and leave behind what is not meant for others."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypedDict

import yaml
from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData, RepoCard, constants, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from ..remote import cached, is_url
from .reasons import what_it_answered, why_not_read

BASE_FOLDER = "base_model"
CARD = "README.md"
REPORT = "memorisation.json"
PICTURE = "picture.png"
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
    """The local folder of a folder, a URL or a Hub repo; what is missing is downloaded.

    Args:
        name (`str` or `Path`): A folder, a URL of one such as `"s3://bucket/loras"`, of which only `allow_patterns` says something, or
            `"org/name"`.
        revision (`str`, *optional*): Branch, tag or commit.
        token (`str` or `bool`, *optional*): Access token; by default the stored one.
        cache_dir (`str` or `Path`, *optional*): Cache; by default that of huggingface_hub.
        local_files_only (`bool`, defaults to `False`): Look only in the cache.
        allow_patterns (`Sequence[str]`, *optional*): Download only these files; at least one is there then.
        repo_type (`str`, defaults to `"model"`): `"model"` or `"dataset"`.

    Returns:
        `Path`

    Raises:
        `OSError`: One line, with what to do: no such folder, repo, revision or file; no right to read it; the Hub does not answer, or
            answers with an error; the disk is full.
    """
    if os.path.isdir(name):
        return Path(name)
    if is_url(name):
        return cached(str(name), allow_patterns)
    repo_id, patterns = str(name), list(allow_patterns) if allow_patterns else None
    cache = str(cache_dir or constants.HF_HUB_CACHE)
    silence: Exception | None = None
    try:
        if not local_files_only:
            try:  # snapshot_download asks the same, and would wait for ever for a Hub that takes the question and says nothing
                timeout, branch = constants.HF_HUB_ETAG_TIMEOUT, revision or constants.DEFAULT_REVISION
                HfApi(token=token).repo_info(repo_id, repo_type=repo_type, revision=branch, timeout=timeout)
            except RevisionNotFoundError:
                raise
            except (HTTPError, OfflineModeIsEnabled) as error:  # what is in the cache will do
                silence = error
        path = Path(
            snapshot_download(
                repo_id,
                repo_type=repo_type,
                revision=revision,
                token=token,
                cache_dir=cache,
                local_files_only=local_files_only or silence is not None,
                allow_patterns=patterns,
            )
        )
        there = [file.relative_to(path).as_posix() for file in path.rglob("*")]
        if patterns and not any(filter_repo_objects(there, allow_patterns=patterns)):
            raise silence or EntryNotFoundError(f"no file {' or '.join(patterns)}")
    except (OSError, HTTPError, ValueError, EntryNotFoundError) as error:
        reason = silence if silence and isinstance(error, LocalEntryNotFoundError) else error
        line = why_not_read(reason, cache, name=repo_id, repo_type=repo_type, revision=revision)
        raise OSError(line) from error
    return path


# ---------------------------------------------------------------------- push
class PushOptions(TypedDict, total=False):
    """How something is pushed; whatever is pushed takes these.

    Args:
        commit_message (`str`): Message of the commit; by default it says what is uploaded.
        commit_description (`str`, *optional*): What stands below the message.
        tags (`Sequence[str]`, *optional*): More tags for the card that is made.
        private (`bool`, *optional*): Create a private repo.
        token (`str` or `bool`, *optional*): Access token; by default the stored one.
        revision (`str`, *optional*): Branch; created where it does not exist.
        create_pr (`bool`, defaults to `False`): Open a pull request instead of committing.
        overwrite_card (`bool`, defaults to `False`): Replace a card that was edited by hand on the Hub.
    """

    commit_message: str | None
    commit_description: str | None
    tags: Sequence[str] | None
    private: bool | None
    token: str | bool | None
    revision: str | None
    create_pr: bool
    overwrite_card: bool


def push_folder(
    write: Callable[[Path], Any],
    repo_id: str,
    *,
    card: Callable[[Path], RepoCard],
    source: str | os.PathLike[str] | None = None,
    repo_type: str = "model",
    commit_message: str | None = None,
    commit_description: str | None = None,
    tags: Sequence[str] | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    overwrite_card: bool = False,
) -> CommitInfo:
    """Write a folder, add its card, check both, and upload them in one commit; only then is a repo made where there is none.

    A card that a person has edited is kept: that of `source` goes along as it is, else that of the Hub stays.

    Args:
        write (`Callable[[Path], Any]`): Writes the files into an empty folder.
        repo_id (`str`): `"org/name"`; created where it does not exist.
        card (`Callable[[Path], RepoCard]`): Makes the card of the written folder.
        source (`str` or `Path`, *optional*): The local folder that all this was loaded from, if any.
        repo_type (`str`, defaults to `"model"`): `"model"`, `"dataset"`, or `"space"`, which is one of gradio.
        commit_message, commit_description, tags, private, token, revision, create_pr, overwrite_card: See [`PushOptions`].

    Returns:
        `huggingface_hub.CommitInfo`

    Raises:
        `ValueError`: If a file names a folder of this machine, or `repo_id` cannot be one. Nothing is on the Hub then.
        `huggingface_hub.errors.HfHubHTTPError`: One line: the Hub refuses (no token, no right to write, a failed upload). Nothing is
            committed then.
        `OSError`: One line: the Hub does not answer.
    """
    validate_repo_id(repo_id)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(folder)
        own = _card_by_hand(source)
        if own is None:
            made = card(folder)
            made.data["tags"] = list(dict.fromkeys([*(made.data.get("tags") or []), *(tags or [])])) or None
        (folder / CARD).write_text(marked(str(made)) if own is None else own, encoding="utf-8", newline="\n")
        _check_no_local_paths(folder, by_hand=own is not None)
        with _refusals(f"{repo_id} was not pushed"):
            sdk = "gradio" if repo_type == "space" else None
            repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, space_sdk=sdk).repo_id
            if revision and not create_pr:
                api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
            if own is None and not overwrite_card and _edited_on_the_hub(api, repo_id, repo_type, revision):
                (folder / CARD).unlink()
            return api.upload_folder(
                repo_id=repo_id,
                repo_type=repo_type,
                folder_path=folder,
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )


def check_pushable(repo_id: str, *, private: bool | None = None, token: str | bool | None = None) -> str:
    """Create a repo, and refuse before the work what could not be pushed after it.

    Args:
        repo_id (`str`): `"org/name"` of a model; created where it does not exist.
        private (`bool`, *optional*): Create a private repo.
        token (`str` or `bool`, *optional*): Access token; by default the stored one.

    Returns:
        `str`: `"org/name"`.

    Raises:
        `ValueError`: If `repo_id` cannot be one.
        `huggingface_hub.errors.HfHubHTTPError`: One line: the Hub lets nobody with this token create the repo, or write to it.
        `OSError`: One line: the Hub does not answer.
    """
    validate_repo_id(repo_id)
    api = HfApi(token=token)
    with _refusals(f"Nothing was done, {repo_id} cannot be pushed to"):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)  # of a repo that is there, create_repo asks no right to write
    return str(repo_id)


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """What a Hub answers, as one line."""
    try:
        yield
    except (HTTPError, JSONDecodeError, RuntimeError) as error:
        # Where a file is not taken, huggingface_hub raises a RuntimeError from what the Hub answered.
        answer = error.__cause__ if isinstance(error, RuntimeError) else error
        if not isinstance(answer, HTTPError | JSONDecodeError):
            raise
        line = f"{what}, {what_it_answered(answer)}"
        raise (type(answer)(line, response=answer.response) if isinstance(answer, HfHubHTTPError) else OSError(line)) from error


def _edited_on_the_hub(api: HfApi, repo_id: str, repo_type: str, revision: str | None) -> bool:
    with tempfile.TemporaryDirectory() as scratch:
        try:
            file = api.hf_hub_download(repo_id, CARD, repo_type=repo_type, revision=revision, local_dir=scratch)
        except EntryNotFoundError:
            return False
        return edited_by_hand(Path(file).read_text(encoding="utf-8", errors="replace"))


# ---------------------------------------------------------------------- cards that people edit
def marked(text: str) -> str:
    """A card with the hash of its own text at its end, by which [`edited_by_hand`] knows it.

    Args:
        text (`str`): A card, front matter and all.

    Returns:
        `str`
    """
    text = text.rstrip("\n") + "\n"
    return f"{text}\n<!-- written by peft_icm, sha256 {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def edited_by_hand(text: str) -> bool:
    """Whether a person has had a hand in a card: neither does it carry the hash of its own text, nor is it peft's empty form.

    Args:
        text (`str`): A card, front matter and all.

    Returns:
        `bool`
    """
    text = text.replace("\r\n", "\n")
    mark = MARK.search(text)
    if mark:
        return hashlib.sha256(text[: mark.start()].encode()).hexdigest() != mark.group(1)
    return _plain(text) != _plain(str(ModelCard.from_template(ModelCardData())))


def _plain(text: str) -> str:
    """A card's words, without front matter and the versions that peft adds to its form."""
    body = re.sub(r"\A\s*---\n.*?\n---\n", "", text, flags=re.DOTALL)
    return " ".join(re.sub(r"(?:### )?Framework versions\s+- PEFT \S+", "", body).split())


def _card_by_hand(source: str | os.PathLike[str] | None) -> str | None:
    """The card of a local folder if a person wrote it; a folder of this machine in its front matter, as peft writes it, by name."""
    file = Path(source or "") / CARD
    if source is None or not file.is_file():
        return None
    text = file.read_text(encoding="utf-8", errors="replace")
    if not edited_by_hand(text):
        return None
    try:
        base = ModelCard(text, ignore_metadata_errors=True).data.get("base_model")
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{file}: its front matter, between two lines of ---, is no YAML: {' '.join(str(error).split())}") from error
    return text.replace(base, published(base)) if isinstance(base, str) and base != published(base) else text


# ---------------------------------------------------------------------- what is not meant for others
def published(value: Any) -> Any:
    """What may be told to others of a value: a folder or file of this machine becomes its name, the cache's folder of a repo its id.

    Args:
        value (`Any`): A string, or what JSON can hold.

    Returns:
        `Any`: A copy of `value`.

    Example:

    ```python
    >>> published({"base_model": "/home/ada/models/llama", "encoder": "org/clip", "epochs": 3})
    {'base_model': 'llama', 'encoder': 'org/clip', 'epochs': 3}

    ```
    """
    if isinstance(value, dict):
        return {key: published(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [published(item) for item in value]
    return _last_part(value) if isinstance(value, str) and is_local(value) else value


def is_local(name: str) -> bool:
    """Whether a name is that of a file or folder of a machine, this one or another, rather than of a Hub repo.

    Args:
        name (`str`): The name.

    Returns:
        `bool`
    """
    if not _last_part(name):
        return False
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute() or name.startswith(("~/", "./", "../", "file:/")):
        return os.path.exists(name) or not re.search(r"\s", name)  # a sentence may begin with a slash
    return "/" in name.replace(os.sep, "/") and os.path.exists(name)


def _last_part(path: str) -> str:
    cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/[0-9a-f]{40}/?$", path)
    if cached:
        return "/".join(cached.groups())
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def _check_no_local_paths(folder: Path, by_hand: bool) -> None:
    """Refuse a file that names a path below the home, the working or the temporary folder; a card by hand is its author's word."""
    homes = {Path(home) for home in (os.path.expanduser("~"), os.getcwd(), tempfile.gettempdir())}
    homes |= {home.resolve() for home in homes}
    names = "|".join(re.escape(str(home)) for home in homes if home.is_absolute() and home != home.parent)
    private = re.compile(rf"(?<![\w./-])(?:{names})/[^\s\"'`|)>]+")
    files = [file for file in sorted(folder.rglob("*.json")) if not file.name.startswith(("tokenizer.", "vocab"))]
    for file in files + [folder / CARD] * (not by_hand):
        found = private.search(file.read_text(encoding="utf-8", errors="replace"))
        if found:
            raise ValueError(
                f"{file.relative_to(folder)} names {found.group()}, a path of this machine: take it out first. Nothing was pushed."
            )
