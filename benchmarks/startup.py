"""How long the command line takes to start, as ratios to `python -c "import torch, transformers, peft"`, measured side by side.

    python benchmarks/startup.py [--runs 3] [--note TEXT]

Every command runs in a process of its own, one after another in each round, so that a busy machine slows all alike; medians of the rounds.
Prints a table and writes benchmarks/startup.json, from which benchmarks/results_tables.py writes the one in docs/results.md.
"""

import argparse
import datetime
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.paper.results import Table, write_json

IMPORT = [sys.executable, "-c", "import torch, transformers, peft"]
CLI = [sys.executable, "-m", "peft_icm.cli"]
SENTENCE = "continue a Shakespeare play"
ROW = re.compile(r"^\w+ +[\d.]+ +[\d.]+ +[\d.]+ ")  # task, base, own, generated
# name: (arguments, wanted ratio)
COMMANDS = {
    "--help": (["--help"], 0.1),
    "--version": (["--version"], 0.1),
    "wrong option": (["generate", "--nonsense"], 0.1),
    "generate": (["generate", "bundled:text", SENTENCE, "-o", "OUT"], 1.0),
    "demo": (["demo", "-o", "OUT"], 4.0),
    "demo, first adapter": (None, 2.0),
    "demo, first row": (None, 2.0),
    "demo --task detection": (["demo", "--task", "detection", "-o", "OUT"], 4.0),
}


def seconds(command: list[str]) -> tuple[float, dict[str, float]]:
    """What a command takes, and when the adapter and the first row of the demo were printed."""
    start, marks = time.perf_counter(), {}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        now = time.perf_counter() - start
        if line.startswith("-> "):
            marks.setdefault("demo, first adapter", now)
        elif ROW.match(line):
            marks.setdefault("demo, first row", now)
    if process.wait() not in (0, 2):
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}.")
    return time.perf_counter() - start, marks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="rounds")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    args = parser.parse_args()
    taken: dict[str, list[float]] = {"import": []}
    seconds(IMPORT)  # files into the cache of the system
    for _ in range(args.runs):
        taken["import"].append(seconds(IMPORT)[0])
        for name, (arguments, _) in COMMANDS.items():
            if arguments is None:
                continue
            with tempfile.TemporaryDirectory() as folder:
                total, marks = seconds([*CLI, *(f"{folder}/out" if argument == "OUT" else argument for argument in arguments)])
            taken.setdefault(name, []).append(total)
            for mark, at in marks.items() if name == "demo" else ():
                taken.setdefault(mark, []).append(at)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    base = medians["import"]
    rows = {"`import torch, transformers, peft`": {"seconds": [base], "ratio": [1.0]}}
    for name, (_, wanted) in COMMANDS.items():
        rows[name] = {"seconds": [medians[name]], "ratio": [medians[name] / base], "wanted": f"<= {wanted}"}
    table = Table("startup", "Start of the command line", ["seconds", "ratio", "wanted"], rows)
    print(table.markdown())
    run = {
        "command": f"python benchmarks/startup.py --runs {args.runs}",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}{args.note and f' ({args.note})'}",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }
    write_json(Path(__file__).with_suffix(".json"), {**table.to_dict(), "run": run})


if __name__ == "__main__":
    main()
