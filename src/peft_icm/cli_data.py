"""The verbs of data: tasks of the files that people have, and collections of LoRAs that are trained or exist."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

from . import cli_verbs
from .cli_options import chosen, seed
from .disk import replacing_folder
from .remote import is_url

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
    p.add_argument("source", help="folder or file of examples; for hub a data set's id or folder")
    p.add_argument(
        "--from",
        dest="form",
        choices=SOURCES,
        required=True,
        help="jsonl: texts (.jsonl, .csv, .parquet); coco, yolo (data.yaml), roboflow (.jsonl for Florence-2): pictures; hub: either",
    )
    p.add_argument("-o", "--output", "--output-dir", required=True, help="folder of the tasks")
    _description_option(p)
    p.add_argument("--test-share", type=float, default=0.2, help="share that is held out of what has no test split")
    p.add_argument("--seed", type=seed, default=0, help="of the draw of what is held out")


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


def collect(args: argparse.Namespace) -> dict[str, Any]:
    """One LoRA per task; a second start goes on where the first was stopped."""
    if not is_url(args.output):
        cli_verbs.check_folder(args.output, cli_verbs.COLLECTION)
    from peft import LoraConfig

    from . import collecting
    from .launching.arguments import LaunchArguments
    from .tasks import load_tasks
    from .tasks.detection import DetectionTask

    tasks = load_tasks(args.tasks)
    detection = isinstance(tasks[0], DetectionTask)
    targets = args.target_modules[0] if args.target_modules == ["all-linear"] else args.target_modules
    # PEFT knows no task type for a vision-language model: any other breaks AutoPeftModel and names the wrong pipeline on the card.
    lora = LoraConfig(r=args.rank, lora_alpha=args.lora_alpha, target_modules=targets, task_type=None if detection else "CAUSAL_LM")
    pictures = {"location_step": args.location_step, "negatives": args.negatives, "images_per_epoch": args.blocks_per_epoch}
    texts = {"block_size": args.block_size, "blocks_per_epoch": args.blocks_per_epoch, **cli_verbs.packing(args)}
    with cli_verbs.one_line_warnings():
        recipe = collecting.CollectingArguments(
            output_dir=f"{args.output}.work",
            dataset_kwargs=pictures if detection else texts,
            **chosen(args, collecting.CollectingArguments),
            **chosen(args, LaunchArguments),
        )
    collection = collecting.collect(args.base_model, tasks, lora, recipe)
    if collection is None:
        cli_verbs.say(args, f"Other processes are still training tasks. Run again with the same {args.output} to gather them.")
        return {"finished": False, "collection": None}
    collection.save_pretrained(args.output)
    cli_verbs.say(args, f"{len(collection.tasks)} tasks, P = {collection.layout.numel:,}: {args.output}")
    return {"finished": True, "collection": args.output, "tasks": collection.tasks, "numel": collection.layout.numel}


def gather_options(p: argparse.ArgumentParser) -> None:
    """Options of `peft-icm gather`."""
    p.add_argument("adapters", nargs="+", metavar="adapter", help="folder or Hub id of a PEFT LoRA; all of one layout")
    p.add_argument("-o", "--output", "--output-dir", required=True, help="folder of the collection")
    _description_option(p)
    p.add_argument("--token", help="access token; by default the stored one")


def gather(args: argparse.Namespace) -> dict[str, Any]:
    """LoRAs that exist become a collection."""
    cli_verbs.check_folder(args.output, cli_verbs.COLLECTION)
    given = _descriptions(args.description)
    from .adapters.collection import AdapterCollection, adapter_name
    from .adapters.layout import ADAPTER_FILES
    from .hub.card_reading import CARD, description_of
    from .hub.files import resolve

    folders = {name: resolve(name, allow_patterns=(*ADAPTER_FILES, CARD), token=args.token) for name in args.adapters}
    names = [adapter_name(name, folder) for name, folder in folders.items()]
    if strangers := given.keys() - set(names):
        raise ValueError(f"--description names {min(strangers)!r}: the adapters are {', '.join(names)}.")
    sentences = [given.get(name) or description_of(folder) for name, folder in zip(names, folders.values(), strict=True)]
    if silent := [name for name, sentence in zip(names, sentences, strict=True) if not sentence]:
        raise ValueError(f"No card says what {', '.join(silent)} do: give --description {silent[0]}=SENTENCE, and so for each.")
    described = [sentence for sentence in sentences if sentence]
    collection = AdapterCollection.from_adapters(list(folders), described, token=args.token)
    collection.save_pretrained(args.output)
    for name, said in collection.descriptions.items():
        cli_verbs.say(args, f'{name}: "{said[0]}"')
    cli_verbs.say(args, f"{len(names)} adapters, P = {collection.layout.numel:,}: {args.output}")
    return {"collection": args.output, "descriptions": collection.descriptions, "numel": collection.layout.numel}


def _descriptions(given: list[str]) -> dict[str, list[str]]:
    """`NAME=SENTENCE` by name."""
    found: dict[str, list[str]] = {}
    for one in given:
        name, equals, sentence = one.partition("=")
        if not equals or not name or not sentence.strip():
            raise ValueError(f"--description {one!r} must be NAME=SENTENCE.")
        found.setdefault(name, []).append(sentence)
    return found
