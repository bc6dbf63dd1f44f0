"""Records: the examples of a language task as people have them, in trl's formats, and the files that hold them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from jinja2 import TemplateError

from .fields import strings

SUFFIXES = (".jsonl", ".csv", ".parquet")
FORMATS = {"text": ("text",), "prompt and completion": ("prompt", "completion"), "messages": ("messages",)}


@dataclass(frozen=True)
class Completion:
    """A prompt, and what is to be said to it: the prompt is read, the completion learnt and scored.

    `str()` of it is prompt and completion, which is what encoders read.

    Args:
        prompt (`str`): As the model will get it.
        completion (`str`): What follows.

    Raises:
        `ValueError`: If one of them is no string, or blank.

    Example:

    ```python
    >>> str(Completion("2 + 2 =", " 4"))
    '2 + 2 = 4'

    ```
    """

    prompt: str
    completion: str

    def __post_init__(self) -> None:
        for name in ("prompt", "completion"):
            _words(getattr(self, name), f"the {name}")

    def __str__(self) -> str:
        return self.prompt + self.completion

    @property
    def target(self) -> str:
        """What is learnt and scored."""
        return self.completion

    @property
    def answer(self) -> str:
        """What a generated answer is compared with."""
        return self.completion

    def pieces(self, tokenizer: Any) -> list[tuple[str, bool]]:
        """Text in pieces, and whether each is a target."""
        return [(self.prompt, False), (self.completion, True)]


@dataclass(frozen=True)
class Conversation:
    """Messages under the tokenizer's chat template: what the assistant says is learnt and scored, the rest is read.

    Args:
        messages (`Sequence[Mapping[str, str]]`): `role` and `content` of each, at least one of the assistant's.

    Raises:
        `ValueError`: If a message has other fields or a blank content, or the assistant says nothing, or speaks first.
    """

    messages: Sequence[Mapping[str, str]]

    def __post_init__(self) -> None:
        found = self.messages
        if not isinstance(found, list | tuple) or not all(isinstance(one, Mapping) and one.keys() == {"role", "content"} for one in found):
            raise ValueError(f"messages must be a list of objects with role and content, and nothing else; found {found!r:.80}.")
        for one in found:
            _words(one["role"], "the role of a message")
            _words(one["content"], f"the content of a message of role {one['role']!r:.40}")
        if all(one["role"] != "assistant" for one in found) or found[0]["role"] == "assistant":
            raise ValueError("messages must have one of role 'assistant', which is learnt, and another before it, which asks for it.")

    def __str__(self) -> str:
        return "\n".join(f"{one['role']}: {one['content']}" for one in self.messages)

    @property
    def target(self) -> str:
        """All that the assistant says."""
        return "".join(self._said)

    @property
    def answer(self) -> str:
        """What the assistant says last."""
        return self._said[-1]

    @property
    def _said(self) -> list[str]:
        return [one["content"] for one in self.messages if one["role"] == "assistant"]

    def pieces(self, tokenizer: Any) -> list[tuple[str, bool]]:
        """Text in pieces as the chat template writes it, special tokens too, and whether each is a target; the last one is.

        Raises:
            `ValueError`: If the tokenizer has no chat template, or its template refuses the messages or writes a turn otherwise once
                another follows.
        """
        name = f"The tokenizer of {tokenizer.name_or_path or 'this base'}"
        if not tokenizer.chat_template:
            raise ValueError(
                f"{name} has no chat template to write messages with: take a base that was tuned for chat, set tokenizer.chat_template,"
                " or give prompt and completion in the place of messages."
            )
        found: list[tuple[str, bool]] = []
        written = ""
        for place, message in enumerate(self.messages):
            if message["role"] != "assistant":
                continue
            for until, target in ((place, False), (place + 1, True)):
                try:
                    text = tokenizer.apply_chat_template(self.messages[:until], tokenize=False, add_generation_prompt=not target)
                except TemplateError as error:
                    raise ValueError(f"{name} has a chat template that refuses the messages ({error}): {self.messages!r:.80}") from error
                if not text.startswith(written):
                    raise ValueError(
                        f"{name} has a chat template that writes a turn otherwise once another follows: give one turn a record."
                    )
                found.append((text[len(written) :], target))
                written = text
        return found


Record: TypeAlias = str | Completion | Conversation


def _words(value: Any, what: str) -> str:
    """A string that is not blank and can be written."""
    if not isinstance(value, str):
        raise ValueError(f"{what} must be a string; found {value!r:.80}.")
    if not value.strip():
        raise ValueError(f"{what} is empty: leave the record out, or fill it.")
    return strings(value, what)[0]


def records(value: Any, what: str) -> list[Record]:
    """A list of records of one format; a single one is a list of one.

    Args:
        value: From a caller.
        what (`str`): What it is, for the message: `"train_texts"`.

    Returns:
        `list[str]`, `list[Completion]` or `list[Conversation]`

    Raises:
        `ValueError`: If it is no such list.
    """
    found = [value] if isinstance(value, Completion | Conversation) else value
    kinds = {type(one) for one in found} if isinstance(found, list | tuple) else set()
    if kinds.isdisjoint((Completion, Conversation)):
        return list(strings(found, what, blank=True))
    if len(kinds) > 1:
        raise ValueError(f"{what} must be of one kind; found {', '.join(sorted(kind.__name__ for kind in kinds))}.")
    return list(found)


# ---------------------------------------------------------------------- files
def read_examples(file: Path, also: Sequence[str] = ()) -> list[tuple[Record, dict[str, str]]]:
    """Read a file of examples; its format is recognised from the columns.

    Args:
        file (`Path`): `.jsonl`, `.csv` or `.parquet`, with the columns `text`; or `prompt` and `completion`; or `messages`.
        also (`Sequence[str]`): Columns that may stand beside them.

    Returns:
        `list[tuple[Record, dict[str, str]]]`: Each record, and what stands beside it.

    Raises:
        `ValueError`: Naming file and line, if a line is broken, is of another format than those before, has a column of another name, or
            is empty where there must be words; or if there is no example.
    """
    found: list[tuple[Record, dict[str, str]]] = []
    first = None
    for place, row in _rows(file):
        try:
            given = {name: value for name, value in row.items() if value is not None and name not in also}
            form = _format(given, also)
            if first and form != first:
                raise ValueError(f"{form}, where the lines before have {first}: one format a file.")
            first = form
            beside = {name: _words(row[name], f"the {name}") for name in also if row.get(name) not in (None, "")}
            found.append((_record(form, given), beside))
        except ValueError as error:
            raise ValueError(f"{file}, {place}: {error}") from error
    if not found:
        raise ValueError(f"{file} holds no example.")
    return found


def write_examples(file: Path, examples: Sequence[Record]) -> None:
    """Write records as JSON Lines.

    Args:
        file (`Path`): Where to.
        examples (`Sequence[Record]`): Of one format.
    """
    rows = ({"text": one} if isinstance(one, str) else vars(one) for one in examples)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _format(given: Mapping[str, Any], also: Sequence[str]) -> str:
    allowed = f"{', or '.join(FORMATS)}{' (and ' + ', '.join(also) + ')' if also else ''}"
    known = {name for names in FORMATS.values() for name in names}
    if strangers := [str(name) for name in given if name not in known]:
        raise ValueError(f"unknown column {strangers[0]!r:.80}: allowed are {allowed}.")
    for form, names in FORMATS.items():
        if given.keys() == set(names):
            return form
    raise ValueError(f"found {' and '.join(given) or 'nothing'}: a record has {allowed}.")


def _record(form: str, given: Mapping[str, Any]) -> Record:
    match form:
        case "text":
            return _words(given["text"], "the text")
        case "messages":
            return Conversation(_without_none(given["messages"]))
    return Completion(**given)


def _without_none(messages: Any) -> Any:
    """Parquet fills the fields that a message lacks."""
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        return messages
    return [{name: value for name, value in one.items() if value is not None} for one in messages]


def _rows(file: Path) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Where each row of a file stands, and its columns."""
    if file.suffix.lower() == ".parquet":
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table

        try:
            rows = read_table(file).to_pylist()
        except ArrowException as error:
            raise ValueError(f"{file} is no Parquet file that can be read ({error}).") from error
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
        return
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            yield from (_csv_rows if file.suffix.lower() == ".csv" else _json_rows)(file, lines)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8 ({error}).") from error


def _json_rows(file: Path, lines: Any) -> Iterator[tuple[str, dict[Any, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}, line {number}: no JSON ({getattr(error, 'msg', error)}).") from error
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number}: must be a JSON object; found {line.strip()!r:.80}.")
        yield f"line {number}", row


def _csv_rows(file: Path, lines: Any) -> Iterator[tuple[str, dict[Any, Any]]]:
    reader = csv.DictReader(lines, strict=True)
    try:
        names = list(reader.fieldnames or ())
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{file}, line 1: the column {twice[0]!r:.80} comes twice: leave one of them out.")
        for row in reader:
            if None in row:
                raise ValueError(f"{file}, line {reader.line_num}: more fields than the {len(reader.fieldnames or ())} of the first line.")
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: no CSV ({error}): save it as JSONL.") from error
