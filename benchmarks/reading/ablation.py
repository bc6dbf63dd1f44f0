"""What the condition space is worth, and what more than one sentence a task is: text generators that differ in nothing else."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.paper.results import Table
from peft_icm import AdapterCollection, ICMConfig
from peft_icm.evaluation.requests import RequestsReport
from peft_icm.generator.condition_space import SPACES

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "build_demo"))
from demo_bundle import train_generator
from demo_text import GENERATOR_COMPONENTS, GENERATOR_KL_WEIGHT, GENERATOR_LATENT, domain_sentences

VARIANTS = {**{space: (space, None) for space in SPACES}, "lda, one sentence a task": ("lda", 1)}


def ablation(build: Path, evaluate: Callable[[Path], RequestsReport]) -> Table:
    """Train a generator for each of `VARIANTS` into `BUILD/ablation/N/`, and evaluate it; what `BUILD/ablation/N.json` has is done already.

    Args:
        build (`Path`): With `collection/` and `encoder/`.
        evaluate (`Callable[[Path], RequestsReport]`): Of the generator in a folder.

    Returns:
        `Table`: The share of the own LoRAs' gain, and how requests are heard.
    """
    tasks = AdapterCollection.from_pretrained(build / "collection").tasks
    rows = {}
    for number, (name, (space, sentences)) in enumerate(VARIANTS.items()):
        config = ICMConfig(
            num_components=GENERATOR_COMPONENTS, latent_size=GENERATOR_LATENT, kl_weight=GENERATOR_KL_WEIGHT, condition_space=space
        )
        folder = build / "ablation" / str(number)
        done = folder.with_suffix(".json")
        if done.is_file():
            rows[name] = json.loads(done.read_text(encoding="utf-8"))
            continue
        descriptions = {task: domain_sentences(task)[0][:sentences] for task in tasks}
        train_generator(build / "collection", build / "encoder", config, folder, descriptions)
        report = evaluate(folder)
        values = {
            "warn": report.share("generated", "warn", meant=True),
            "shrink": report.share("generated", "shrink", meant=True),
            "retrieved, warn": report.share("retrieved", "warn", meant=True),
            "unknown, warn": report.share("generated", "warn", meant=False),
            "unknown, shrink": report.share("generated", "shrink", meant=False),
            "heard right": report.right,
            "unknown at 95 % of known": report.unknown_at() if report.threshold is not None else None,
        }
        rows[name] = {column: [value] for column, value in values.items() if value is not None}
        done.write_text(json.dumps(rows[name]), encoding="utf-8")
        print(name, rows[name], flush=True)
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    return Table("ablation_text", "Condition spaces, on the requests that choose settings", columns, rows, digits=3)
