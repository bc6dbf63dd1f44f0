"""Adapters for texts that nothing was trained on: the world of language, in nats per token of held-out passages.

    python -m benchmarks.unseen.language --build build conditions   # from a sentence, 1 and 8 excerpts, both, another task's, none
    python -m benchmarks.unseen.language --build build rivals       # the nearest trained task's adapter, the mean of the nearest four's
    python -m benchmarks.unseen.language --build build own          # LoRAs of their own, from 64 and 1,000 blocks
    python -m benchmarks.unseen.language --build build adapt        # 16 excerpts: adapt, LoRA from scratch, both starts tuned freely

`build` is that of examples/build_demo/build_demo_models.py, with the stages up to `language-generator`; `--split choose` takes the tasks
that settings are chosen on in the place of those that decide. The rival is one LoRA for all tasks, trained for as many steps on the same
texts. Excerpts are pieces of 400 characters of a task's training texts, of which neither generator nor rival has read any. Writes
results/language_PART.json and .png.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from benchmarks.unseen.lora import flat, train_lora
from benchmarks.unseen.results import Row, write
from peft_icm import ICMGenerator
from peft_icm.adapters import load_base
from peft_icm.adapters.per_sample import PerSampleLora
from peft_icm.tasks.language_modeling import LanguageModelingTask, nll
from peft_icm.training.conditions import excerpts

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "build_demo"))
from demo_bundle import DEVICE
from demo_language import split
from demo_language_generator import language_tasks

EXCERPTS = (1, 8)
EXAMPLES, BLOCK, STEPS = 16, 128, 120  # of `adapt` and its rivals
RATES = (1e-3, 3e-3)
OWN = ((64, 120), (1000, 400))  # blocks and steps of a LoRA of its own
SEEN, PASSAGES = 8, 3  # trained tasks, for comparison; held-out passages of each task, of 2,000 characters at the most
RIVAL = "rival (nats per token)"  # the others are gains over it
SHIFT = 7  # whose excerpts are the wrong ones


class LanguageWorld:
    """The tasks of one part of the split, the generator and its rival.

    Args:
        build (`Path`): With `language/`, `language_generator/`, `language_rival/` and `base_model/`.
        part (`str`): `"unseen"` or `"choose"`.
        count (`int`): At most so many tasks, from all groups of them.
        generator (`str`, defaults to `"language_generator"`): Its folder in `build`.
        rival (`str`, defaults to `"language_rival"`): The folder of one LoRA for all.
    """

    def __init__(self, build: Path, part: str, count: int, generator: str = "language_generator", rival: str = "language_rival"):
        self.generator: ICMGenerator = ICMGenerator.from_pretrained(build / generator).to(DEVICE)
        self.base_folder = str(build / "base_model")
        self.tokenizer = AutoTokenizer.from_pretrained(self.base_folder)
        self.model = self.base()
        self.lora = PerSampleLora(self.model, self.generator.layout)
        tasks = language_tasks(build, part)
        self.tasks = tasks[:: -(-len(tasks) // count)]
        trained = language_tasks(build, "train")
        self.trained, self.seen = trained, random.Random(0).sample(trained, min(SEEN, count))
        self.rival = self.generator.layout.flatten(load_file(build / rival / "adapter_model.safetensors"))

    def base(self) -> Any:
        """A base of one's own."""
        return load_base(self.generator.layout, self.base_folder, None).to(DEVICE)  # type: ignore[arg-type]

    def score(self, task: LanguageModelingTask, vector: Tensor) -> float:
        """Nats per token of a task's held-out passages under an adapter `[P]`."""
        self.lora.use(vector[None].to(self.model.device))
        found = nll(self.model, self.tokenizer, task.test_texts[:PASSAGES], progress=False)
        return sum(found[1:], found[0]).nats_per_token

    def pieces(self, task: LanguageModelingTask, count: int) -> list[str]:
        """So many excerpts from all over a task's texts."""
        return random.Random(0).sample(excerpts(task.train_texts, 64), count)

    def sample(self, **given: Any) -> Tensor:
        """The adapter `[P]` of a request, at z = 0."""
        return self.generator.sample(self.generator.task_vector(**given), temperature=0.0)[0].detach().cpu()

    def examples(self, task: LanguageModelingTask, count: int) -> Any:
        """So many blocks of a task's texts, from all over them, as the base takes them."""
        blocks = task.train_dataset(self.tokenizer, block_size=BLOCK)
        return [blocks[index] for index in random.Random(1).sample(range(len(blocks)), min(count, len(blocks)))]


def conditions(world: LanguageWorld, share: slice) -> dict[str, Row]:
    """Gain over the rival by task, and by what was given; of a share of the tasks."""
    rows: dict[str, Row] = {}
    generator = world.generator
    shared = generator.sample(generator.no_condition, temperature=0.0)[0].detach().cpu()
    for kind, tasks in (("unseen", world.tasks), ("seen", world.seen)):
        for index, task in tqdm(list(enumerate(tasks))[share], desc=kind):
            text = task.descriptions[0]
            wrong = world.pieces(tasks[(index + SHIFT) % len(tasks)], 8)
            adapters = {
                "base": torch.zeros_like(shared),
                "without a condition": shared,
                "a sentence": world.sample(text=text),
                **{f"{count} excerpts": world.sample(examples=world.pieces(task, count)) for count in EXCERPTS},
                "a sentence and 8 excerpts": world.sample(text=text, examples=world.pieces(task, 8)),
                "8 excerpts of another task": world.sample(examples=wrong),
            }
            rival = world.score(task, world.rival)
            gains = {name: rival - world.score(task, vector) for name, vector in adapters.items()}
            rows[task.name] = {"kind": kind, RIVAL: rival, **gains}
    return rows


def rivals(world: LanguageWorld, share: slice) -> dict[str, Row]:
    """Gain over the rival by task, of what could stand in the generator's place; the nearest are those of all tasks trained on."""
    generator = world.generator

    def vector(task: LanguageModelingTask) -> Tensor:
        return generator.task_vector(examples=world.pieces(task, 8))

    known = torch.stack([vector(task) for task in tqdm(world.trained, desc="trained tasks")])
    rows: dict[str, Row] = {}
    for task in tqdm(world.tasks[share], desc="rivals"):
        here, there = (generator.normalize_condition(each) for each in (vector(task)[None], known))
        near = torch.cosine_similarity(here, there).topk(4).indices.tolist()
        adapters = torch.stack([generator.sample(known[index], temperature=0.0)[0].detach().cpu() for index in near])
        rival = world.score(task, world.rival)
        given = {
            "8 excerpts": world.sample(examples=world.pieces(task, 8)),
            "nearest trained task": adapters[0],
            "mean of the 4 nearest": adapters.mean(0),
        }
        gains = {name: rival - world.score(task, adapter) for name, adapter in given.items()}
        rows[task.name] = {"kind": "unseen", "nearest": world.trained[near[0]].name, **gains}
    return rows


def own(world: LanguageWorld, share: slice) -> dict[str, Row]:
    """Gain over the rival by task, of LoRAs trained on the task's own texts, by recipe."""
    rows: dict[str, Row] = {}
    for task in tqdm(world.tasks[share], desc="own LoRAs"):
        vectors = {"8 excerpts": world.sample(examples=world.pieces(task, 8))}
        for count, steps in OWN:
            blocks = world.examples(task, count)
            for rate in RATES:
                vectors[f"{count} blocks, {steps} steps at {rate:g}"] = train_lora(
                    world.generator.layout, world.base_folder, blocks, steps, rate
                )
        rival = world.score(task, world.rival)
        rows[task.name] = {"kind": "unseen", **{name: rival - world.score(task, vector) for name, vector in vectors.items()}}
    return rows


def few(world: LanguageWorld, share: slice) -> dict[str, Row]:
    """Gain over the rival by task, from 16 blocks of 128 tokens: `adapt` against its rivals; of a share of the tasks."""
    rows: dict[str, Row] = {}
    generator = world.generator
    for task in tqdm(world.tasks[share], desc="few examples"):
        pieces, examples = world.pieces(task, 8), world.examples(task, EXAMPLES)
        start = world.sample(examples=pieces)
        adapted = generator.adapt(labelled=examples, base_model=world.base(), examples=pieces)
        vectors = {"start": start, "adapt": flat(generator.layout, adapted)}
        for name, at in (("LoRA from scratch", None), ("start tuned freely", start), ("rival tuned freely", world.rival)):
            for rate in RATES:
                vectors[f"{name}, {rate:g}"] = train_lora(generator.layout, world.base_folder, examples, STEPS, rate, at)
        rival = world.score(task, world.rival)
        rows[task.name] = {"kind": "unseen", **{name: rival - world.score(task, vector) for name, vector in vectors.items()}}
        print(task.name, {name: round(value, 3) for name, value in rows[task.name].items() if name != "kind"}, flush=True)
    return rows


PARTS = {"conditions": conditions, "rivals": rivals, "own": own, "adapt": few}


def rows_of_share(part: str, world: tuple[Any, ...], share: slice) -> dict[str, Row]:
    """The rows of one process, in a [`LanguageWorld`] of these arguments that it makes for itself."""
    return PARTS[part](LanguageWorld(*world), share)


def measure(part: str, name: str, processes: int, *world: Any) -> None:
    """Measure one of PARTS, each process a share of the tasks, and write it.

    Args:
        part (`str`): Of PARTS.
        name (`str`): Of the results.
        processes (`int`): How many; one GPU serves several.
        *world: For [`LanguageWorld`].
    """
    shares = [slice(index, None, processes) for index in range(processes)]
    rows: dict[str, Row] = {}
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(partial(rows_of_share, part, world), shares):
            rows |= found
    for group, names in split()[world[1]].items():
        for task in rows.keys() & names:
            rows[task]["what is new"] = group
    write(name, rows, "gain over one LoRA for all (nats per token)", RIVAL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--build", type=Path, required=True)
    parser.add_argument("--split", choices=("unseen", "choose"), default="unseen")
    parser.add_argument("--tasks", type=int, default=48, help="at most so many")
    parser.add_argument("--name", help="of the results; by default language_PART")
    parser.add_argument("--processes", type=int, default=1, help="that share the tasks")
    args = parser.parse_args()
    measure(args.part, args.name or f"language_{args.part}", args.processes, args.build, args.split, args.tasks)


if __name__ == "__main__":
    main()
