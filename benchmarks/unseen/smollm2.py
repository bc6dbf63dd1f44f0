"""The world of language on a language model that was trained elsewhere, SmolLM2-135M: made for a GPU, and the same at fewer steps on a CPU.

    python examples/reproduction_data.py smollm2 --data DATA     # and link DATA/smollm2 as BUILD/base_model
    python -m benchmarks.unseen.smollm2 shared --build BUILD                    # one LoRA for all tasks, where both others begin
    python -m benchmarks.unseen.smollm2 rival --rate 1e-3 --build BUILD         # that LoRA trained on, for as many steps as a generator
    python -m benchmarks.unseen.smollm2 generator --rate 3e-4 --build BUILD
    python -m benchmarks.unseen.smollm2 choose --build BUILD                    # the best rate of each, on the tasks that choose
    python -m benchmarks.unseen.smollm2 conditions --build BUILD                # on the unseen ones, of those rates

`BUILD` has `language/` and `encoder/`, as benchmarks/unseen/language.py wants it; LoRA, batches and blocks are the same. Rivals and
generators are independent of one another and may be trained at once. Writes results/smollm2_choose.json and smollm2_conditions.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from tqdm.auto import tqdm

from benchmarks.unseen.language import LanguageWorld, measure
from benchmarks.unseen.results import RESULTS, provenance

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "build_demo"))
from demo_bundle import task_encoder
from demo_language_generator import SHARED_STEPS, STEPS, language_tasks, language_trainer, shared_lora

SHARED_RATE = 1e-3
CHOICE = RESULTS / "smollm2_choose.json"


def train_generator(build: Path, steps: int, rate: float) -> None:
    """Train a generator through the loss of the tasks, from the LoRA for all of them."""
    encoder = task_encoder(build, "base_model", "examples")
    out = f"generator_{rate:g}"
    trainer = language_trainer(build, out, encoder, language_tasks(build, "train"), max_steps=steps, learning_rate=rate)
    trainer.train()
    trainer.generator.save_pretrained(build / out)


def choose(build: Path, count: int) -> None:
    """Nats per token of each candidate on the tasks that choose, generators from 8 excerpts."""
    found: dict[str, dict[str, float]] = {"rival": {}, "generator": {}}
    for folder in sorted(build.glob("generator_*[0-9]")):
        world = LanguageWorld(build, "choose", count, folder.name, next(build.glob("rival_*[0-9]")).name)
        adapters = [world.sample(examples=world.pieces(task, 8)) for task in world.tasks]
        pairs = zip(world.tasks, adapters, strict=True)
        found["generator"][folder.name] = statistics.mean(world.score(task, vector) for task, vector in tqdm(pairs, desc=folder.name))
    for folder in sorted(build.glob("rival_*[0-9]")):
        world = LanguageWorld(build, "choose", count, next(iter(found["generator"])), folder.name)
        found["rival"][folder.name] = statistics.mean(world.score(task, world.rival) for task in tqdm(world.tasks, desc=folder.name))
    best = {kind: min(rows, key=rows.__getitem__) for kind, rows in found.items()}
    rounded = {kind: {name: round(value, 4) for name, value in rows.items()} for kind, rows in found.items()}
    document = {"run": provenance(), "unit": "nats per token, tasks that choose", "found": rounded, "best": best}
    CHOICE.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("shared", "rival", "generator", "choose", "conditions"))
    parser.add_argument("--build", type=Path, required=True)
    parser.add_argument("--rate", type=float, help="of a rival or a generator")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a rival or a generator; of the shared LoRA half as many")
    parser.add_argument("--tasks", type=int, default=48, help="at most so many to measure on")
    parser.add_argument("--processes", type=int, default=1, help="of conditions, that share the tasks")
    args = parser.parse_args()
    if args.part == "shared":
        shared_lora(args.build, "language_shared", args.steps * SHARED_STEPS // STEPS, seed=0, rate=SHARED_RATE)
    elif args.part == "rival":
        shared_lora(args.build, f"rival_{args.rate:g}", args.steps, seed=1, start="language_shared", rate=args.rate)
    elif args.part == "generator":
        train_generator(args.build, args.steps, args.rate)
    elif args.part == "choose":
        choose(args.build, args.tasks)
    else:
        best = json.loads(CHOICE.read_text(encoding="utf-8"))["best"]
        world = (args.build, "unseen", args.tasks, best["generator"], best["rival"])
        measure("conditions", "smollm2_conditions", args.processes, *world)


if __name__ == "__main__":
    main()
