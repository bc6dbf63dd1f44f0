"""What goes wrong between here and a Hub: each in one line that says what to do."""

from __future__ import annotations

import errno
from json import JSONDecodeError

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

_ANSWERS = {
    401: "the access token is missing or wrong: pass token=, or log in with `hf auth login`",
    403: "the access token has no right to it: pass the token= of an account that has it",
    404: "there is no such repo, revision or file: check the spelling",
    429: "too many requests: wait a while, or pass token=",
}
# Of the types that an error is of, the first here is told.
_REASONS: dict[type[Exception], str] = {
    HFValidationError: "{name!r} is neither an existing folder nor the id of a Hub repo ('org/name').",
    RevisionNotFoundError: "{name} has no revision {revision!r}: pass a branch, a tag or a commit that exists.",
    GatedRepoError: "{name} is gated: ask for access on its page of the Hub, and pass the token= of an account that has it.",
    RepositoryNotFoundError: "{name} is neither a folder nor a {repo_type} repo that you may read: check the spelling, or pass token=.",
    LocalEntryNotFoundError: "{name} is not in the local cache, or not whole: download it first, without local_files_only=.",
    OfflineModeIsEnabled: "{name} is not in the local cache, or not whole: download it first, without HF_HUB_OFFLINE.",
    HTTPError: "{name} could not be read, {answer}",
    JSONDecodeError: "{name} could not be read, {answer}",
    EntryNotFoundError: "{name} has {error}: is it what was meant?",
    Exception: "{name} could not be downloaded: {error}",
}
_FULL = "{name} could not be downloaded, the disk of {cache} is full: make room there, or pass cache_dir= of another."
_NOT_WRITTEN = "{name} could not be written to {cache} ({error}): pass as cache_dir= a folder that you may write to."


def why_not_read(error: Exception, cache: str, **facts: str | None) -> str:
    """Why a repo could not be read.

    Args:
        error (`Exception`): What huggingface_hub raised.
        cache (`str`): The folder that was downloaded to.
        **facts: `name` of the repo, its `repo_type`, and the `revision` that was asked for.

    Returns:
        `str`: One line.

    Example:

    ```python
    >>> why_not_read(OSError(28, "No space left on device"), "/cache", name="org/x", repo_type="model", revision=None)
    'org/x could not be downloaded, the disk of /cache is full: make room there, or pass cache_dir= of another.'

    ```
    """
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HTTPError):
        error = error.__cause__
    reason = next(text for kind, text in _REASONS.items() if isinstance(error, kind))
    if isinstance(error, OSError) and error.errno is not None:  # of this machine; what huggingface_hub makes itself has none
        reason = _FULL if error.errno in (errno.ENOSPC, errno.EDQUOT) else _NOT_WRITTEN
    return reason.format(error=_line(error), answer=what_it_answered(error), cache=cache, **facts)


def what_it_answered(error: Exception) -> str:
    """What a Hub said, or that it said nothing, and what to do.

    Args:
        error (`Exception`): `HTTPError` of huggingface_hub or of the client below it, or the `JSONDecodeError` of an answer.

    Returns:
        `str`: The rest of a line.
    """
    if isinstance(error, JSONDecodeError):
        return f"what answers at {constants.ENDPOINT} is no Hub: check HF_ENDPOINT, and whether a proxy stands between."
    if not isinstance(error, HfHubHTTPError):
        return f"the Hub did not answer ({type(error).__name__}): check the connection."
    status = error.response.status_code
    return f"the Hub answered {status}: {_ANSWERS.get(status, 'try again later' if status >= 500 else _line(error))}."


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
