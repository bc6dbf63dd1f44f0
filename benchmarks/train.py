"""The paper's architecture against the default on one collection: samples per second, and time to equal error.

    python benchmarks/train.py --collection build/collection --encoder build/encoder --seconds 900 --output benchmarks/train.json

Same latent size, batch, threads and data. Both get their learning rate from the same short list, the best kept; `paper` then trains
until --seconds are over. Errors are mean squared errors on held-out snapshots, in pooled, normalised units: from the posterior, and of
adapters decoded from z ~ N(0, I). The clock counts the estimation of statistics and subspace and every step, not the evaluations.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from pathlib import Path

import matplotlib
import peft
import torch
import transformers
from transformers import TrainerCallback

from peft_icm import AdapterCollection, ICMConfig, ICMTrainer, ICMTrainingArguments
from peft_icm.conditioning import ClipEncoder

matplotlib.use("Agg")
from matplotlib import pyplot

RATES = (3e-3, 1e-3, 3e-4)
BATCH = 36


class Clock(TrainerCallback):
    """Stops after so many seconds of training, and notes them at every evaluation, whose own time does not count."""

    def __init__(self, limit: float):
        self.limit, self.spent, self.curve = limit, 0.0, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.spent += time.perf_counter() - self.start
        control.should_training_stop = self.spent > self.limit

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.curve.append(
            {"seconds": self.spent, "steps": state.global_step, **{k: metrics[f"eval_{k}"] for k in ("mse", "prior_mse", "kl")}}
        )


def run(collection: AdapterCollection, architecture: str, rate: float, limit: float, evaluations: int, epochs: int) -> Clock:
    clock = Clock(limit)
    args = ICMTrainingArguments(
        "/tmp/peft-icm-benchmark",
        num_train_epochs=epochs,
        per_device_train_batch_size=BATCH,
        learning_rate=rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=20,
        kl_warmup_ratio=0.0,  # the number of steps is not known beforehand
        eval_strategy="steps",
        eval_steps=evaluations,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=0,
    )
    start = time.perf_counter()
    trainer = ICMTrainer(ICMConfig(architecture=architecture), args, collection=collection, callbacks=[clock])
    clock.spent = time.perf_counter() - start  # the PCA counts
    clock.parameters = sum(tensor.numel() for tensor in trainer.generator.state_dict().values())
    trainer.train()
    return clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collection", required=True)
    parser.add_argument("--encoder", required=True, help="folder of the text encoder")
    parser.add_argument("--seconds", type=float, default=900.0, help="training time of `paper`; a tenth of it for each rate before")
    parser.add_argument("--output", type=Path, default=Path("train.json"))
    args = parser.parse_args()
    collection = AdapterCollection.from_pretrained(args.collection)
    collection.encode(ClipEncoder.from_pretrained(args.encoder))
    curves, rows = {}, {}
    for architecture in ("paper", "principal"):
        limit = args.seconds if architecture == "paper" else args.seconds / 10
        every = 10 if architecture == "paper" else 50
        trials = {rate: run(collection, architecture, rate, limit / 10, every, 100_000).curve[-1]["mse"] for rate in RATES}
        rate = min(trials, key=trials.get)
        clock = run(collection, architecture, rate, limit, every, 100_000)
        curves[architecture] = clock.curve
        last = clock.curve[-1]
        rows[architecture] = {
            "numbers": clock.parameters,
            "learning_rate": rate,
            "learning_rates_tried": {str(key): round(value, 4) for key, value in trials.items()},
            "samples_per_second": round(last["steps"] * BATCH / last["seconds"], 1),
            "best_mse": round(min(point["mse"] for point in clock.curve), 4),
            "best_prior_mse": round(min(point["prior_mse"] for point in clock.curve), 4),
            "final_kl": round(last["kl"], 3),
            "seconds": round(last["seconds"], 1),
        }
        print(architecture, json.dumps(rows[architecture]))
    result = {
        "command": f"python benchmarks/train.py --seconds {args.seconds:g}",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "seed": 0,
        "P": collection.layout.numel,
        "tasks": len(collection.tasks),
        "batch": BATCH,
        **rows,
    }
    for error in ("mse", "prior_mse"):
        best = min(curves["paper"], key=lambda point: point[error])
        reached = next((point["seconds"] for point in curves["principal"] if point[error] <= best[error]), None)
        result[f"time to paper's best {error}"] = {
            "paper": round(best["seconds"], 1),
            "principal": round(reached, 2) if reached is not None else None,
            "ratio": round(reached / best["seconds"], 4) if reached is not None else None,
        }
    args.output.write_text(json.dumps(result, indent=1))
    figure, axes = pyplot.subplots(layout="constrained")
    for name, curve in curves.items():
        axes.plot([p["seconds"] for p in curve], [p["mse"] for p in curve], label=f"{name}, posterior")
        axes.plot([p["seconds"] for p in curve], [p["prior_mse"] for p in curve], "--", label=f"{name}, z ~ N(0, I)")
    axes.set(xscale="log", yscale="log", xlabel="training seconds", ylabel="held-out squared error (pooled units)")
    axes.legend(frameon=False)
    figure.savefig(args.output.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
