"""The verbs of data that people have: tasks of their files, and a collection of adapters that exist."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

from . import cli_verbs
from .disk import replacing_folder

TASKS = "tasks.json"  # what tells a folder of tasks
FEW = {"records": 20, "pictures": 8}  # to train on, below which a task is warned of
# Of each --from the module and its function, `(source: Path, output: Path, *, descriptions: dict[str, list[str]],
# test_share: float, seed: int) -> dict`: it writes tasks.json and what that names into the empty folder `output`, and returns
# {"unit": "records", "tasks": [{"name", "descriptions", "train", "test"}]}, of the last two the numbers, and where there are any
# "warnings", a line each.
SOURCES = {
    "jsonl": ("tasks.import_text", "text_tasks"),
    "coco": ("data_import", "coco_tasks"),
    "yolo": ("data_import", "yolo_tasks"),
    "roboflow": ("data_import", "roboflow_tasks"),
    "hub": ("data_import", "hub_tasks"),
}


def tasks_options(p: argparse.ArgumentParser) -> None:
    """Options of `peft-icm tasks`."""
    p.add_argument("source", help="folder or file of examples; for hub a data set's id too")
    p.add_argument(
        "--from",
        dest="form",
        choices=SOURCES,
        required=True,
        help="jsonl: texts (.jsonl, .csv, .parquet); annotated pictures: coco, yolo (data.yaml), roboflow (.jsonl for Florence-2), hub",
    )
    p.add_argument("-o", "--output", "--output-dir", required=True, help="folder of the tasks")
    _description_option(p)
    p.add_argument("--test-share", type=float, default=0.2, help="share that is held out of what has no test split")
    p.add_argument("--seed", type=int, default=0, help="of the draw of what is held out")


def _description_option(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--description", metavar="NAME=SENTENCE", action="append", default=[], help="a sentence that asks for a task; may be repeated"
    )


def tasks(args: argparse.Namespace) -> dict[str, Any]:
    """Files of examples become a folder of tasks."""
    cli_verbs.check_folder(args.output, TASKS)
    if not 0 < args.test_share < 1:
        raise ValueError(f"--test-share {args.test_share} must lie between 0 and 1.")
    module, name = SOURCES[args.form]
    make = getattr(importlib.import_module(f"peft_icm.{module}"), name)
    with replacing_folder(args.output) as folder:
        facts = make(Path(args.source), folder, descriptions=_descriptions(args.description), test_share=args.test_share, seed=args.seed)
    for task in facts["tasks"]:
        counts = f"{task['train']} {facts['unit']} to train on, {task['test']} held out"
        cli_verbs.say(args, f'{task["name"]}: {counts}; "{task["descriptions"][0]}"')
        if task["train"] < FEW[facts["unit"]]:
            print(f"peft-icm: warning: task {task['name']!r} has few {facts['unit']} to train on: {task['train']}.", file=sys.stderr)
    for line in facts.get("warnings", ()):
        print(f"peft-icm: warning: {line}", file=sys.stderr)
    return {"folder": args.output, **facts}


def _descriptions(given: list[str]) -> dict[str, list[str]]:
    """`NAME=SENTENCE` by name."""
    found: dict[str, list[str]] = {}
    for one in given:
        name, equals, sentence = one.partition("=")
        if not equals or not name or not sentence.strip():
            raise ValueError(f"--description {one!r} must be NAME=SENTENCE.")
        found.setdefault(name, []).append(sentence)
    return found
