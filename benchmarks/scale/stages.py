"""The stages that are timed, each of a case: a layout, so many tasks, so many snapshots of each."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import gc
import itertools
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback

from benchmarks.generate import SMOLLM2
from benchmarks.paper.dry_run import LLAMA, meta_base
from peft_icm import (
    AdapterCollection,
    AdapterLayout,
    ICMConfig,
    ICMGenerator,
    ICMTrainer,
    ICMTrainingArguments,
    bundled_generator,
    collecting,
    save_adapter,
)
from peft_icm.tasks.language_modeling import LanguageModelingTask

GIB = 2**30
BASES: dict[str, Callable[[], Any]] = {  # on the meta device
    "the bundled text base": lambda: LlamaForCausalLM(AutoConfig.from_pretrained(Path(bundled_generator("text"), "base_model"))),
    "SmolLM2-135M": lambda: LlamaForCausalLM(LlamaConfig(**SMOLLM2)),
    "Llama-3-8B": lambda: meta_base(LLAMA),
}
CONDITIONS, DIM = 8, 384  # task vectors of a task, and numbers of each
MEMORY, SECONDS = 6 * GIB, 600  # of a stage, beyond what the process has at first; with more it is ended
TURNS, ENOUGH, LONG = 10, 1.0, 10.0  # at most; seconds after which there is no other; after which there is no second, as the first warms up
STEPS = 4


@dataclass(frozen=True)
class Case:
    """One size: a layout, so many tasks with so many snapshots each, and where its files are."""

    base: str
    targets: tuple[str, ...]
    rank: int
    tasks: int
    snapshots: int
    folder: Path

    @functools.cached_property
    def layout(self) -> AdapterLayout:
        lora = LoraConfig(r=self.rank, target_modules=list(self.targets), task_type="CAUSAL_LM")
        with torch.device("meta"):
            layout = AdapterLayout.from_peft_model(get_peft_model(BASES[self.base](), lora))
        return dataclasses.replace(layout, dtype="bfloat16")

    def model(self) -> Any:
        """The base in bf16, every weight of which is one zero: nothing of its size is held."""
        with torch.device("meta"):
            base = BASES[self.base]()
        for module in base.modules():
            for name, weight in module.named_parameters(recurse=False):
                zero = torch.zeros((), dtype=torch.bfloat16).expand(weight.shape)
                setattr(module, name, nn.Parameter(zero, requires_grad=False))
        return base

    @property
    def names(self) -> list[str]:
        return [f"task{index}" for index in range(self.tasks)]

    @property
    def config(self) -> ICMConfig:
        tasks = [{"name": name, "description": name} for name in self.names]
        return ICMConfig(layout=self.layout.to_dict(), condition_dim=DIM, tasks=tasks)

    @property
    def collection_bytes(self) -> int:
        return self.tasks * self.snapshots * self.layout.num_bytes

    @property
    def generator_bytes(self) -> int:
        return (self.config.num_components + 1) * self.layout.num_bytes

    def __str__(self) -> str:
        return f"{self.base}, {len(self.targets)} targets, r = {self.rank}: P = {self.layout.numel:,}, {self.tasks} tasks"


def noise(case: Case) -> Iterator[tuple[str, torch.Tensor]]:
    """Tasks with snapshots `[K, P]` that cost little to make: each a window of one long row of noise, a little further on."""
    apart, size = 7, case.layout.numel
    row = torch.empty(size + apart * case.tasks * case.snapshots, dtype=torch.bfloat16).normal_(std=0.01)
    for index, name in enumerate(case.names):
        yield name, row.as_strided((case.snapshots, size), (apart, 1), apart * case.snapshots * index)


class Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(time.perf_counter() - self.start)


def trainer(case: Case) -> ICMTrainer:
    collection = AdapterCollection.from_pretrained(case.folder / "collection")
    quiet: dict[str, Any] = {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    args = ICMTrainingArguments(str(case.folder / "out"), max_steps=STEPS, held_out=0.0, phrasings=0, use_cpu=True, seed=0, **quiet)
    return ICMTrainer(ICMConfig(basis_dtype="int8"), args, collection=collection)


def loaded(case: Case) -> ICMGenerator:
    return ICMGenerator.from_pretrained(case.folder / "generator")


def flush(folder: Path) -> None:
    """Wait for the disk: small files alone would only reach the system's cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as written:
                os.fsync(written.fileno())


# Each makes ready, and yields what is timed for each turn; a number that it returns takes the place of the clock's.
def gather(case: Case) -> Iterator[Callable[[], Any]]:
    tasks = [LanguageModelingTask(name, [name], [], []) for name in case.names]
    vectors = {name: torch.randn(CONDITIONS, DIM) for name in case.names}

    def collect() -> None:
        collection = collecting.gather(work, tasks)
        collection.task_vectors = vectors
        collection.save_pretrained(case.folder / "collection")
        flush(case.folder / "collection")

    with tempfile.TemporaryDirectory(dir=case.folder) as work:
        write_work_folder(case, Path(work))
        while True:
            yield collect


def write_work_folder(case: Case, folder: Path) -> None:
    """What `collect` leaves of finished tasks, in noise."""
    (folder / collecting.RECIPE).write_text(json.dumps({"num_snapshots": case.snapshots}))
    done = json.dumps({"layout": case.layout.to_dict(), "train_loss": 0.0})
    for task, rows in noise(case):
        (folder / task).mkdir()
        for epoch, row in enumerate(rows, 1):
            tensors = {key: tensor.contiguous() for key, tensor in case.layout.unflatten(row).items()}
            save_file(tensors, folder / task / f"epoch-{epoch:04}.safetensors")
        (folder / task / collecting.DONE).write_text(done)


def fit(case: Case) -> Iterator[Callable[[], Any]]:
    while True:
        yield lambda: trainer(case)


def step(case: Case) -> Iterator[Callable[[], Any]]:
    ready, clock = trainer(case), Clock()
    ready.remove_callback(PrinterCallback)
    ready.add_callback(clock)  # after those of the trainer: what they do before a step does not count

    def train() -> float:
        ready.train()
        return min(clock.steps)

    yield train


def make(case: Case) -> Iterator[Callable[[], Any]]:
    def write() -> None:
        torch.set_default_dtype(torch.bfloat16)
        ICMGenerator(case.config).save_pretrained(case.folder / "generator")

    yield write


def load(case: Case) -> Iterator[Callable[[], Any]]:
    while True:
        yield lambda: loaded(case)


def decode(case: Case) -> Iterator[Callable[[], Any]]:
    generator, vector = loaded(case), torch.randn(DIM)
    while True:
        yield lambda: generator.generate_state_dict(task_vector=vector)


def attach(case: Case) -> Iterator[Callable[[], Any]]:
    generator, vector = loaded(case), torch.randn(DIM)
    while True:
        base = case.model()
        yield lambda base=base: generator.generate_adapter(base_model=base, task_vector=vector)


def save(case: Case) -> Iterator[Callable[[], Any]]:
    model = loaded(case).generate_adapter(base_model=case.model(), task_vector=torch.randn(DIM))
    while True:
        yield lambda: flush(save_adapter(model, case.folder / "adapter"))


STAGES: dict[str, Callable[[Case], Iterator[Callable[[], Any]]]] = {
    function.__name__: function for function in (gather, fit, step, make, load, decode, attach, save)
}


# ---------------------------------------------------------------------- a process for each
def memory(field: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def give_back() -> None:
    """To the system what is no longer held, cycles such as a trainer among it: malloc keeps that of small sizes alone, and fresh memory
    takes time.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def run(stage: str, case: Case, answer: Any) -> None:
    """In a process of its own: seconds and bytes of a stage, or why there are none."""
    give_back()
    limit = memory("VmData") + MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    before, seconds, peak = memory("VmRSS"), [], 0
    try:
        for action in itertools.islice(STAGES[stage](case), TURNS):
            give_back()
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            start = time.perf_counter()
            own = action()
            seconds.append(own if isinstance(own, float) else time.perf_counter() - start)
            peak, own = max(peak, memory("VmHWM")), None
            if sum(seconds) > (ENOUGH if len(seconds) > 1 else LONG):
                break
        answer.send({"seconds": min(seconds), "peak": peak - before})
    except Exception as error:  # torch, numpy and safetensors each say it in their own way
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error).lower():
            raise
        answer.send({"left_out": f"more than {MEMORY / GIB:.0f} GiB"})


def apart(stage: str, case: Case) -> dict[str, Any]:
    """The answer of [`run`]."""
    context = multiprocessing.get_context("fork")  # what is imported is there
    answer, theirs = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(stage, case, theirs))
    process.start()
    theirs.close()
    try:
        if not answer.poll(SECONDS):
            process.kill()
            return {"left_out": f"more than {SECONDS} s"}
        return answer.recv()
    except EOFError:
        process.join()
        return {"left_out": f"ended with exit code {process.exitcode}"}
    finally:
        process.join()
