"""How many tasks must be trained on: gain on unseen tasks of the world of language against the number of training tasks.

    python -m benchmarks.unseen.curve --build build              # three seeds; or some of it: --seeds 1 2 --counts 10 475

`build` is that of examples/build_demo/build_demo_models.py, with the stages up to `language-shared`. Each generator begins with the same
LoRA for all tasks and is trained for as many steps on tasks drawn at random; the kin of the unseen ones are held out, whichever are drawn.
Each is scored as benchmarks/unseen/language.py does, from 8 excerpts. Sentences and excerpts are read once for all of them. Writes
results/curve.json and .png after each; what was measured before stays there, with how it was run.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.unseen.language import LanguageWorld
from benchmarks.unseen.results import RESULTS, provenance
from peft_icm.conditioning import JoinedEncoder
from peft_icm.figures import save_figure

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "build_demo"))
from demo_bundle import task_encoder
from demo_language_generator import language_tasks, language_trainer

COUNTS = (10, 25, 50, 100, 200, 475)
STEPS = 400


class RememberingEncoder(JoinedEncoder):
    """Reads each sentence and excerpt once."""

    def __init__(self, parts: Any):
        super().__init__(parts)
        self.known: dict[tuple[str, str], Tensor] = {}

    def read(self, argument: str, items: Sequence[Any]) -> Tensor:
        """Of each the vector that it was given first."""
        new = [item for item in dict.fromkeys(items) if (argument, item) not in self.known]
        if new:
            self.known |= {(argument, item): row for item, row in zip(new, super().read(argument, new), strict=True)}
        return torch.stack([self.known[argument, item] for item in items])


def keep(seed: str, rows: dict[str, dict[str, float]]) -> None:
    """Put one seed's points beside what is there."""
    file = RESULTS / "curve.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"runs": [], "by seed": {}}
    runs = [*(run for run in known["runs"] if run != provenance()), provenance()]
    points = known["by seed"].get(seed, {}) | rows
    gains = known["by seed"] | {seed: {count: points[count] for count in map(str, COUNTS) if count in points}}
    result = {"steps": STEPS, "unit": "gain over one LoRA for all (nats per token)", "runs": runs, "by seed": gains}
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(gains, file.with_suffix(".png"))


def plot(gains: dict[str, dict[str, dict[str, float]]], file: Path) -> None:
    """Gain against the number of tasks: a line for each seed, and their mean."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for seed, rows in gains.items():
        axes.plot([int(count) for count in rows], [row["gain"] for row in rows.values()], "o-", alpha=0.4, label=f"seed {seed}")
    shared = [count for count in map(str, COUNTS) if all(count in rows for rows in gains.values())]
    mean = [statistics.mean(rows[count]["gain"] for rows in gains.values()) for count in shared]
    axes.plot([int(count) for count in shared], mean, "k-", linewidth=2, label="mean")
    axes.axhline(0, color="grey", linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks(COUNTS, map(str, COUNTS))
    axes.minorticks_off()
    axes.set_xlabel("training tasks")
    axes.set_ylabel("gain over one LoRA for all\n(nats per token, unseen tasks)")
    axes.legend()
    save_figure(figure, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--counts", type=int, nargs="+", choices=COUNTS, default=list(COUNTS), help="of training tasks")
    parser.add_argument("--split", choices=("unseen", "choose"), default="unseen")
    parser.add_argument("--tasks", type=int, default=48, help="at most so many unseen ones")
    args = parser.parse_args()
    encoder = RememberingEncoder(task_encoder(args.build, "base_model", "examples").parts)
    trained = language_tasks(args.build, "train")
    world = LanguageWorld(args.build, args.split, args.tasks)
    rival = {task.name: world.score(task, world.rival) for task in world.tasks}
    for seed in args.seeds:
        rows: dict[str, dict[str, float]] = {}
        order = random.Random(seed).sample(trained, len(trained))
        for count in args.counts:
            trainer = language_trainer(args.build, "curve", encoder, order[:count], max_steps=STEPS, seed=seed)
            trainer.train()
            world.generator = trainer.generator.eval()
            found = [rival[task.name] - world.score(task, world.sample(examples=world.pieces(task, 8)).clone()) for task in world.tasks]
            error = statistics.stdev(found) / len(found) ** 0.5
            rows[str(count)] = {"gain": round(statistics.mean(found), 4), "standard error": round(error, 4)}
            print(json.dumps({"seed": seed, "training tasks": count, **rows[str(count)]}), flush=True)
            keep(str(seed), rows)


if __name__ == "__main__":
    main()
