"""Language tasks of the files that people have: one task a file, or by a column `task`."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..disk import safe_name
from .records import FORMATS, SUFFIXES, Record, read_examples, write_examples

SPLITS = ("train", "test")
BESIDE = ("task", "description")  # columns beside those of a record


@dataclass
class _Found:
    """What files say of a task."""

    descriptions: list[str] = field(default_factory=list)
    splits: dict[str, list[Record]] = field(default_factory=dict)


def text_tasks(source: Path, output: Path, *, descriptions: Mapping[str, list[str]], test_share: float, seed: int) -> dict[str, Any]:
    """Write a folder of language tasks: `tasks.json`, and for each task its examples in JSON Lines.

    A file is a task of its name, `NAME.test.jsonl` what is held out of `NAME.jsonl` or `NAME.train.jsonl`; where a file has a column
    `task`, its examples are those of the tasks named there. What has nothing held out is split. The sentence of a task is what
    `descriptions` says, else what the column `description` says, else its name in words: training puts it in other words.

    Args:
        source (`Path`): A file, or a folder of them: `.jsonl`, `.csv` or `.parquet`, see [`read_examples`].
        output (`Path`): An empty folder.
        descriptions (`Mapping[str, list[str]]`): Sentences by task.
        test_share (`float`): Share that is held out, between 0 and 1; one example at least.
        seed (`int`): Of the draw.

    Returns:
        `dict`: `{"unit", "tasks": [{"name", "descriptions", "train", "test"}], "warnings"}`, train and test as numbers.

    Raises:
        `ValueError`: If there is no such file, a file is not as it should be, a task's name is no file name, it has one format to train on
            and another held out, fewer than two different examples, or an example in both splits, or `descriptions` names another task.
    """
    found: dict[str, _Found] = {}
    for file in _files(source):
        stem, _, split = file.stem.rpartition(".")
        name, split = (stem, split) if stem and split in SPLITS else (file.stem, "train")
        here: dict[str, list[Record]] = {}
        for record, beside in read_examples(file, also=BESIDE):
            try:
                task = safe_name(beside.get("task", name), "task")
            except ValueError as error:
                raise ValueError(f"{file}: {error}") from error
            here.setdefault(task, []).append(record)
            known = found.setdefault(task, _Found()).descriptions
            sentence = beside.get("description")
            known += [sentence] if sentence and sentence not in known else []
        for task, records in here.items():
            if split in found[task].splits:
                raise ValueError(f"{file} has examples of task {task!r} to {split}, and so has another file: put them into one.")
            found[task].splits[split] = records
    if len({task.casefold() for task in found}) < len(found):
        raise ValueError(f"{source} has tasks whose names differ in capitals alone: {', '.join(sorted(found, key=str.casefold))}.")
    if strangers := descriptions.keys() - found.keys():
        raise ValueError(f"A description is of {min(strangers)!r}, which is no task: the tasks are {', '.join(found)}.")
    entries: list[dict[str, Any]] = []
    facts: list[dict[str, Any]] = []
    for task, about in found.items():
        train, test = _split(task, about.splits, test_share, random.Random(f"{seed} {task}"))
        said = descriptions.get(task) or about.descriptions or [" ".join(task.replace("_", " ").replace("-", " ").split())]
        names = {split: f"{task}.{split}.jsonl" for split in SPLITS}
        for split, records in zip(SPLITS, (train, test), strict=True):
            write_examples(output / names[split], records)
        entries.append({"name": task, "descriptions": said, **names})
        facts.append({"name": task, "descriptions": said, "train": len(train), "test": len(test)})
    (output / "tasks.json").write_text(json.dumps({"tasks": entries}, indent=1, ensure_ascii=False), encoding="utf-8")
    sentences = [entry["descriptions"][0] for entry in entries]
    shared = [sentence for sentence in dict.fromkeys(sentences) if sentences.count(sentence) > 1]
    return {"unit": "records", "tasks": facts, "warnings": [f"several tasks are asked for with {sentence!r}." for sentence in shared]}


def text_tasks_of(
    splits: Mapping[str, Any], source: Path, output: Path, *, descriptions: Mapping[str, list[str]], test_share: float, seed: int
) -> dict[str, Any]:
    """The same of a data set with the columns of one of trl's formats: one task of its name, or by its column `task`.

    Args:
        splits (`Mapping[str, datasets.Dataset]`): `"train"`, and `"test"` where there is one; other columns are left out.
        source (`Path`): Its id or folder.
        output, descriptions, test_share, seed: See [`text_tasks`].

    Raises:
        `ValueError`: If it has none of these formats, or [`text_tasks`] refuses it.
    """
    with tempfile.TemporaryDirectory() as folder:
        for split, rows in splits.items():
            form = next((names for names in reversed(FORMATS.values()) if set(names) <= set(rows.column_names)), None)
            if form is None:
                raise ValueError(
                    f"{source} has the columns {', '.join(rows.column_names)}: image and objects are needed, or {', or '.join(FORMATS)}."
                )
            columns = [*form, *(name for name in BESIDE if name in rows.column_names)]
            rows.select_columns(columns).to_parquet(Path(folder, f"{source.name}.{split}.parquet"))
        try:
            return text_tasks(Path(folder), output, descriptions=descriptions, test_share=test_share, seed=seed)
        except ValueError as error:
            raise ValueError(str(error).replace(f"{folder}/{source.name}.", f"{source}, ")) from error


def _files(source: Path) -> list[Path]:
    """The files of examples."""
    if source.is_file() and source.suffix.lower() in SUFFIXES:
        return [source]
    found = sorted(file for file in source.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file()) if source.is_dir() else []
    if not found:
        raise ValueError(f"{source} is neither a file of examples nor a folder of them: {', '.join(SUFFIXES)}.")
    return found


def _split(task: str, splits: dict[str, list[Record]], test_share: float, draw: random.Random) -> tuple[list[Record], list[Record]]:
    """What is trained on and what is held out, in the order of the files."""
    if "train" not in splits:
        raise ValueError(f"Task {task!r} has examples that are held out and none to train on: give {task}.jsonl too.")
    train, test = splits["train"], splits.get("test")
    if test is None:
        different = list(dict.fromkeys(map(str, train)))  # what comes twice is in one split
        if len(different) < 2:
            raise ValueError(f"Task {task!r} has one example: two at least are needed, one to train on and one that is held out.")
        held_out = set(draw.sample(different, min(len(different) - 1, max(1, round(test_share * len(different))))))
        train, test = ([one for one in train if (str(one) in held_out) == out] for out in (False, True))
    known = set(map(str, train))
    if both := [one for one in map(str, test) if one in known]:
        raise ValueError(f"Task {task!r} has {len(both)} examples to train on and held out, the first is {both[0]!r:.80}: take them out.")
    if type(train[0]) is not type(test[0]):
        raise ValueError(f"Task {task!r} has one format to train on, and another held out: {train[0]!s:.40} and {test[0]!s:.40}.")
    return train, test
