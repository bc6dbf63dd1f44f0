"""Writes what was measured: every task, the means, and how it was run."""

from __future__ import annotations

import datetime
import json
import math
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from peft_icm.figures import plot_bars

RESULTS = Path(__file__).parent / "results"

Row = dict[str, float | str]
"""Of one task: its kind under `kind`, and numbers by what was given or done."""


def provenance() -> dict[str, object]:
    """The command that runs, its date, machine and versions."""
    return {
        "command": f"python -m {sys.modules['__main__'].__spec__.name.removesuffix('.__main__')} {' '.join(sys.argv[1:])}",
        "date": datetime.date.today().isoformat(),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads",
        "versions": {package: version(package) for package in ("torch", "transformers", "peft")},
    }


def markdown(document: dict[str, Any]) -> str:
    """A table of what a result holds: means and standard errors, a column for each kind of task.

    Args:
        document (`dict`): What [`write`] wrote as JSON.
    """
    means, errors = document["mean"], document["standard error"]
    counts = {kind: sum(row["kind"] == kind for row in document["tasks"].values()) for kind in means}
    lines = [f"`{document['run']['command']}`, {document['run']['date']}; {document['unit']}", ""]
    lines += ["| | " + " | ".join(f"{count} {kind}" for kind, count in counts.items()) + " |", "|---" * (len(means) + 1) + "|"]
    for column in dict.fromkeys(column for row in means.values() for column in row):
        cells = [f"{row[column]:.3f} ± {errors.get(kind, {}).get(column, 0):.3f}" if column in row else "" for kind, row in means.items()]
        lines.append(f"| {column} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write(name: str, rows: dict[str, Row], unit: str, unplotted: str | None = None) -> None:
    """Write results/NAME.json, .md and .png, and print the means.

    Args:
        name (`str`): Of the files.
        rows (`dict[str, Row]`): By task.
        unit (`str`): What the numbers are.
        unplotted (`str`, *optional*): A column that is in another unit.
    """
    means: dict[str, dict[str, float]] = {}
    errors: dict[str, dict[str, float]] = {}
    for kind in dict.fromkeys(str(row["kind"]) for row in rows.values()):
        found = [row for row in rows.values() if row["kind"] == kind]
        for column in (column for column, value in found[0].items() if not isinstance(value, str)):
            values = [float(row[column]) for row in found]
            means.setdefault(kind, {})[column] = round(statistics.mean(values), 4)
            if len(values) > 1:
                errors.setdefault(kind, {})[column] = round(statistics.stdev(values) / math.sqrt(len(values)), 4)
    rounded = {
        task: {name: value if isinstance(value, str) else round(value, 4) for name, value in row.items()} for task, row in rows.items()
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    document = {"run": provenance(), "unit": unit, "mean": means, "standard error": errors, "tasks": rounded}
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(markdown(document), encoding="utf-8")
    columns = list(dict.fromkeys(column for row in means.values() for column in row if column != unplotted))
    plot_bars(columns, {kind: [row.get(column, 0.0) for column in columns] for kind, row in means.items()}, unit, file.with_suffix(".png"))
    print(json.dumps({"mean": means, "standard error": errors}, indent=1))
