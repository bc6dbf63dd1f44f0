"""A generator for a thousand tasks of Llama-3-8B, fitted and trained in little memory.

    python -m benchmarks.scale.thousand

Writes results/thousand.json.

The snapshots, 1,000 x 20 x 851,968 numbers (q and v, r = 2: 68 GB in fp32), lie nowhere: a seeded source makes the rows and columns that
are asked for, as a collection on disk gives them. They are what a collection looks like: tasks as points in a few dozen directions that
they share, with weights that fall off, snapshots as short walks round them, and noise of a third of their norm in all directions. The
clock counts the making of the numbers too: `making` says how long one pass over them takes that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor

from benchmarks.generate import facts
from benchmarks.paper.results import write_json
from peft_icm import AdapterCollection, AdapterLayout, ICMConfig, ICMGenerator, ICMTrainer, ICMTrainingArguments
from peft_icm.adapters.snapshots import SnapshotMatrix

from .stages import BASES, Clock

DIRECTIONS, NOISE = 32, 0.3
PHRASINGS, DIM = 5, 384  # task vectors of each task, as MiniLM makes them


class SeededSnapshots(Mapping[str, "SeededRows"]):
    """Snapshots that are a function of seed, task and position: made when they are asked for, forgotten afterwards.

    Args:
        tasks (`int`): T.
        snapshots (`int`): K.
        size (`int`): P.
        seed (`int`, defaults to 0): Of everything.
    """

    def __init__(self, tasks: int, snapshots: int, size: int, seed: int = 0):
        draw = torch.Generator().manual_seed(seed)
        falling = torch.arange(1, DIRECTIONS + 1) ** -0.5
        points, walks = (torch.randn(tasks, count, DIRECTIONS, generator=draw) for count in (1, snapshots))
        self.places = (points + 0.3 * walks) * falling / falling.norm()  # of about unit norm
        self.directions = torch.randn(DIRECTIONS, size, generator=draw)
        self.noise = NOISE * torch.randn(2 * size, generator=draw)
        self.starts = torch.randint(size, (tasks, snapshots), generator=draw)
        self.size = size

    def __getitem__(self, task: str) -> SeededRows:
        return SeededRows(self, int(task))

    def __iter__(self) -> Iterator[str]:
        return map(str, range(len(self)))

    def __len__(self) -> int:
        return len(self.places)


class SeededRows:
    """`[K, P]` of one task: what `[rows]` and `[rows, columns]` ask for is made, by slices."""

    dtype = torch.float32

    def __init__(self, source: SeededSnapshots, task: int):
        self.source, self.task = source, task
        self.shape = (source.places.shape[1], source.size)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Tensor:
        rows, columns = key if isinstance(key, tuple) else (key, slice(None))
        start, stop, _ = columns.indices(self.shape[1])
        made = self.source.places[self.task, rows] @ self.source.directions[:, start:stop]
        for row, first in zip(made, self.source.starts[self.task, rows].tolist(), strict=True):
            row += self.source.noise[first + start : first + stop]
        return made


def layout() -> AdapterLayout:
    """Llama-3-8B's q and v at r = 2: P = 851,968."""
    with torch.device("meta"):
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        return AdapterLayout.from_peft_model(get_peft_model(BASES["Llama-3-8B"](), lora))


def collection(tasks: int, snapshots: int, seed: int = 0) -> AdapterCollection:
    """Of the seeded source, with task vectors in which the tasks differ more than their phrasings."""
    form = layout()
    source: Any = SeededSnapshots(tasks, snapshots, form.numel, seed)
    draw = torch.Generator().manual_seed(seed + 1)
    vectors = {
        task: F.normalize(torch.randn(1, DIM, generator=draw) + 0.3 * torch.randn(PHRASINGS, DIM, generator=draw)) for task in source
    }
    return AdapterCollection(form, source, {task: [f"task {task}"] for task in source}, vectors)


def passes(seconds: dict[str, float]) -> None:
    """Note how long each pass over snapshots takes, with what is done to its blocks."""
    for name in ("rows", "columns"):
        read = getattr(SnapshotMatrix, name)

        def timed(self: SnapshotMatrix, about: str = name, read: Any = read) -> Iterator[Any]:
            start = time.perf_counter()
            yield from read(self, about)
            seconds[about] = round(seconds.get(about, 0.0) + time.perf_counter() - start, 2)

        setattr(SnapshotMatrix, name, timed)


def peak() -> float:
    """The largest resident set of this process so far, in GB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)


def run(tasks: int, snapshots: int, *, components: int, epochs: int, max_memory_bytes: int, seed: int) -> dict[str, Any]:
    """Fit, train, save and generate once.

    Returns:
        `dict`: JSON-able: `seconds`, `cpu_seconds` and `peak_gb` (resident, after it) of each stage, `passes` of the fit, `step_ms`
        (the median), `metrics`.
    """
    seconds: dict[str, float] = {}
    peaks: dict[str, float] = {}
    cpu: dict[str, float] = {}
    each: dict[str, float] = {}

    def done(stage: str, start: float) -> None:
        seconds[stage], peaks[stage] = round(time.perf_counter() - start, 2), peak()
        cpu[stage] = round(time.process_time() - sum(cpu.values()), 2)
        print(f"{stage}: {seconds[stage]} s, peak {peaks[stage]} GB", flush=True)

    start = time.perf_counter()
    found = collection(tasks, snapshots, seed)
    done("source", start)
    start, name = time.perf_counter(), found.tasks[0]
    for _ in range(4):
        found.snapshots[name][:]
    making = (time.perf_counter() - start) / 4 * tasks
    passes(each)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = ICMTrainingArguments(
            f"{folder}/work",
            num_train_epochs=epochs,
            max_memory_bytes=max_memory_bytes,
            save_strategy="no",
            logging_steps=50,
            report_to=[],
            use_cpu=True,
            seed=seed,
        )
        start = time.perf_counter()
        trainer = ICMTrainer(ICMConfig(num_components=components), args, collection=found, callbacks=[clock])
        done("fit", start)
        start = time.perf_counter()
        trainer.train()
        done("train and evaluate", start)
        start = time.perf_counter()
        trainer.generator.save_pretrained(f"{folder}/generator")
        done("save", start)
        size = sum(file.stat().st_size for file in Path(f"{folder}/generator").iterdir())
        start = time.perf_counter()
        loaded = ICMGenerator.from_pretrained(f"{folder}/generator")
        done("load", start)
        start = time.perf_counter()
        loaded.sample(found.task_vectors[name][0])
        done("generate", start)
    metrics = {row["type"]: row["value"] for row in trainer.generator.config.training["metrics"]}
    return {
        "tasks": tasks,
        "snapshots": snapshots,
        "P": found.layout.numel,
        "fp32_gb": round(tasks * snapshots * found.layout.numel * 4 / 1e9, 2),
        "components": components,
        "max_memory_bytes": max_memory_bytes,
        "epochs": epochs,
        "steps": len(clock.steps),
        "step_ms": round(1000 * sorted(clock.steps)[len(clock.steps) // 2], 2),
        "generator_bytes": size,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "passes": each,
        "making": round(making, 1),
        "peak_gb": peaks,
        "metrics": metrics,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--snapshots", type=int, default=20)
    parser.add_argument("--components", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--max-memory-bytes", type=int, default=ICMTrainingArguments.max_memory_bytes)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "thousand.json")
    args = parser.parse_args()
    options = {name: value for name, value in vars(args).items() if name != "output"}
    typed = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
    result = {**facts(f"python -m benchmarks.scale.thousand {typed}"), **run(**options)}
    write_json(args.output, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
