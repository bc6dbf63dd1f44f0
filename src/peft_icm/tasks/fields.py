"""What comes from JSON files and callers, checked: each message says where, what is allowed and what was found."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..disk import inside

Made = TypeVar("Made")


def strings(value: Any, what: str, *, blank: bool = False) -> list[str]:
    """A list of strings; a single string is a list of one.

    Args:
        value: From a JSON file or a caller.
        what (`str`): What it is, for the message: `"descriptions"`.
        blank (`bool`, defaults to `False`): Whether strings of white space alone, or of nothing, are taken too.

    Returns:
        `list[str]`

    Raises:
        `ValueError`: If it is neither, or a string is blank or cannot be written as UTF-8.

    Example:

    ```python
    >>> strings("write poems", "descriptions")
    ['write poems']

    ```
    """
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, Sequence):
        raise ValueError(f"{what} must be a list of strings; found {value!r:.80}.")
    for one in found:
        # Half of a surrogate pair, as JSON's \ud800 gives it, is no text: tokenizers and files refuse it.
        if not isinstance(one, str) or not (blank or one.strip()) or one.encode(errors="ignore").decode() != one:
            raise ValueError(f"{what} must be a list of {'' if blank else 'non-empty '}strings; found {one!r:.80}.")
    return list(found)


def at_least(least: int, **values: Any) -> None:
    """Check whole numbers.

    Args:
        least (`int`): The smallest that is allowed.
        **values: By the names of the arguments.

    Raises:
        `ValueError`: If one is no whole number, or smaller.

    Example:

    ```python
    >>> at_least(1, batch_size=0)
    Traceback (most recent call last):
    ValueError: batch_size=0 must be a whole number of at least 1.

    ```
    """
    for name, value in values.items():
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r:.80} must be a whole number of at least {least}.")


def read_json(file: str | os.PathLike[str], refusal: str) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        file (`str` or `Path`): The file, UTF-8 with or without a byte order mark.
        refusal (`str`): How the message begins.

    Returns:
        `dict`

    Raises:
        `ValueError`: If it cannot be read, is no JSON, or holds no object.
    """
    try:
        document = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{refusal} ({type(error).__name__}: {error}).") from error
    if not isinstance(document, dict):
        raise ValueError(f"{refusal} (it holds {document!r:.80}).")
    return document


def read_tasks_json(folder: str | os.PathLike[str], form: str) -> dict[str, Any]:
    """Read a `tasks.json`.

    Args:
        folder (`str` or `Path`): Where it lies.
        form (`str`): What it should look like, for the message.

    Returns:
        `dict`: In which `"tasks"` is a list of objects.

    Raises:
        `ValueError`: If it is missing or of another form.
    """
    refusal = f"{folder} needs a tasks.json of the form {form}"
    document = read_json(Path(folder) / "tasks.json", refusal)
    entries = document.get("tasks")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{refusal} (tasks is {entries!r:.80}).")
    return document


def make_tasks(folder: str | os.PathLike[str], entries: list[dict[str, Any]], make: Callable[[dict[str, Any]], Made]) -> list[Made]:
    """Make tasks of what a `tasks.json` says of them.

    Args:
        folder (`str` or `Path`): Where it lies, for messages.
        entries (`list[dict]`): Its list of tasks.
        make (`Callable`): Takes an entry and returns a task; may raise `KeyError` and `ValueError`.

    Returns:
        `list`: The tasks.

    Raises:
        `ValueError`: Naming file and task, if an entry lacks a field or holds a wrong value, or two have one name.
    """
    file, made, names = Path(folder) / "tasks.json", [], set()
    for place, entry in enumerate(entries):
        try:
            made.append(make(entry))
        except KeyError as error:
            raise ValueError(f"{file}: tasks[{place}] has no {error}.") from error
        except ValueError as error:
            raise ValueError(f"{file}: tasks[{place}]: {error}") from error
        if entry["name"] in names:
            raise ValueError(f"{file}: tasks[{place}]: a second task is named {entry['name']!r}: give each a name of its own.")
        names.add(entry["name"])
    return made


def path_from_json(folder: str | os.PathLike[str], name: Any, field: str) -> Path:
    """A file or folder that a JSON file names: inside its own folder, or anywhere by an absolute path.

    Args:
        folder (`str` or `Path`): Where the JSON file lies.
        name: What it says.
        field (`str`): In which field, for the message.

    Returns:
        `Path`

    Raises:
        `ValueError`: If it is no string, or relative and leads out of `folder`.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"{field} must be the name of a file or folder; found {name!r:.80}.")
    if os.path.isabs(name) or os.path.normpath(name) == ".":
        return Path(folder) / name
    try:
        return inside(folder, name)
    except ValueError as error:
        raise ValueError(f"{field} must name something inside {folder}, or an absolute path ({error})") from error


def check_sentences(task: Any) -> None:
    """Check the sentences of a task, and make lists of single ones.

    Args:
        task ([`Task`]): Whose `descriptions` and `unseen_descriptions` are set.

    Raises:
        `ValueError`: If one is no list of non-empty strings, or there are no `descriptions`.
    """
    for name in ("descriptions", "unseen_descriptions"):
        setattr(task, name, strings(getattr(task, name), f"{name} of task {task.name!r}"))
    if not task.descriptions:
        raise ValueError(f"descriptions of task {task.name!r} is empty: give one sentence at least that asks for it.")


def numbered_examples(task: Any, processor: Any, **dataset_kwargs: Any) -> Any:
    """The `train_dataset` of a task, whose examples are drawn by their number.

    Args:
        task ([`Task`]): Whose.
        processor: Of the base model.
        **dataset_kwargs: For `task.train_dataset`.

    Returns:
        `Dataset`: Map-style.

    Raises:
        `ValueError`: If the task holds pictures and the base reads texts, or the other way round; or if its data set is a stream.
    """
    from torch.utils.data import IterableDataset
    from transformers import ProcessorMixin

    reads = "pictures" if isinstance(processor, ProcessorMixin) else "texts"
    if (holds := getattr(task, "holds", reads)) != reads:
        base = getattr(processor, "tokenizer", processor).name_or_path
        raise ValueError(f"Task {task.name!r} has {holds}, the base {base} reads {reads}: take another base.")
    dataset = task.train_dataset(processor, **dataset_kwargs)
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(
            f"train_dataset of task {task.name!r} returns a stream ({type(dataset).__name__}), and examples are drawn by their number:"
            " return a map-style data set; a datasets.Dataset stays on disk, and of it each process reads its own share."
        )
    return dataset
