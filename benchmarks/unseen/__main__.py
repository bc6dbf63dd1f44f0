"""Adapters for classes that nothing was trained on: the open world of the bundled detector, against everything that could take its place.

    python -m benchmarks.unseen --build build conditions     # seen and unseen classes x text, 1, 4, 8 pictures, text and 8 pictures
    python -m benchmarks.unseen --build build rivals         # one LoRA for all, nearest class, soup, wrong and random conditions
    python -m benchmarks.unseen --build build own            # LoRAs of their own from 16, 64 and 1,000 annotated scenes
    python -m benchmarks.unseen --build build adapt          # 4, 16, 64 scenes: adapt, and what else can be done with them
    python -m benchmarks.unseen --build build latent         # what z does

`build` is that of examples/build_demo/build_demo_models.py, with the stages up to `open-generator`; `--split choose` takes the classes that
settings are chosen on in the place of those that decide. AP50 of one class, on scenes in three styles that nothing was trained on;
pictures and annotated scenes to learn from are drawn in the other styles. Writes results/PART.json, .md and .png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoProcessor

from benchmarks.unseen.lora import flat, mix, train_lora, tune_condition
from benchmarks.unseen.results import Row, write
from peft_icm import ICMGenerator
from peft_icm.adapters import attach, load_base
from peft_icm.evaluation.detection import class_precision
from peft_icm.tasks.annotated_images import crops, load_coco
from peft_icm.tasks.detection import DetectionTask, detect

HERE = Path(__file__).parent
BUILD_DEMO = HERE.parent.parent / "examples" / "build_demo"
sys.path.insert(0, str(BUILD_DEMO))
import demo_open  # noqa: E402 - it lies there

PICTURES = (1, 4, 8)
SHOWN = 40  # test scenes of a class at the most, and as many without it
FEW, STEPS = (4, 16, 64), 120  # scenes; steps of what `adapt` is compared with
RIVAL_RATES = {"LoRA from scratch": (3e-3, 1e-2), "start tuned freely": (1e-3, 3e-3), "condition alone": (1e-2, 3e-2)}  # all reported
POOL = 20  # seen classes whose adapters LoraHub mixes
OWN, OWN_RATES = ((16, 120), (64, 120), (64, 400), (1000, 400)), (3e-3, 1e-2)  # scenes and steps of a LoRA of its own


class World:
    """The open world's test scenes and its generator.

    Args:
        build (`Path`): With `open/` and `open_generator/`.
        generator (`Path`): The generator.
        split (`str`): `"test"` or `"choose"`.
        classes (`int`): At most so many of each kind.
    """

    def __init__(self, build: Path, generator: Path, split: str, classes: int):
        self.generator = ICMGenerator.from_pretrained(generator)
        self.base_folder = build / "florence"
        self.processor = AutoProcessor.from_pretrained(self.base_folder)
        self.images = load_coco(build / "open" / f"{split}.json", build / "open" / split)
        chosen = json.loads((BUILD_DEMO / "open_world.json").read_text(encoding="utf-8"))
        nouns = json.loads((BUILD_DEMO / "nouns.json").read_text(encoding="utf-8"))
        self.studio = demo_open.Studio(build)
        # One unseen noun, orca, has no drawing in any style but those that are tested on.
        unseen = [noun for noun in (nouns["unseen"] if split == "test" else chosen["choose"]) if self.studio.of(noun)]
        self.trained = chosen["tested"]  # of those that the generator was trained on, the ones whose adapters are tested
        self.classes = {"unseen": unseen[:classes], "seen": self.trained[:classes] if split == "test" else []}
        self.model: Any = self.generator.load_base()
        self.tested = {
            noun: [image for image in self.images if noun in image.labels][:SHOWN] for names in self.classes.values() for noun in names
        }

    def pictures(self, noun: str, count: int, seed: int = 0) -> list[Any]:
        """So many cut-outs of a class, drawn in other styles and on other photographs than what is tested on."""
        return crops(self.studio.draw(noun, 2 * count, seed=1000 + seed), noun)[:count]

    def score(self, noun: str, vector: torch.Tensor) -> float:
        """AP50 of a class under an adapter `[P]`."""
        layout = self.generator.layout
        self.model = attach(self.model, layout, layout.unflatten(vector))
        others = [image for image in self.images if noun not in image.labels][: len(self.tested[noun])]
        images = self.tested[noun] + others
        found = detect(self.model, self.processor, images, batch_size=60, max_new_tokens=40, progress=False)
        return class_precision(self.task(noun, []).named(found), images, noun)["map_50"]

    def task(self, noun: str, images: list[Any]) -> DetectionTask:
        """The task of a class."""
        return DetectionTask(noun, [f"detect {demo_open.spoken(noun)}"], noun, images, [], answer=demo_open.ANSWER)

    def sample(self, **given: Any) -> torch.Tensor:
        """The adapter `[P]` of a request, at z = 0."""
        return self.generator.sample(self.generator.task_vector(**given), temperature=0.0)[0].detach()

    def examples(self, noun: str, count: int) -> Any:
        """So many annotated scenes of a class, three of five with it, as the base takes them; drawn as the pictures are."""
        return self.task(noun, self.studio.draw(noun, count, seed=2000)).train_dataset(
            self.processor, negatives=10.0, location_step=20, in_memory=True
        )

    def own_lora(self, noun: str, count: int, steps: int, rate: float, start: torch.Tensor | None = None) -> torch.Tensor:
        """A LoRA of a class from annotated scenes."""
        return train_lora(self.generator.layout, str(self.base_folder), self.examples(noun, count), steps, rate, start)


def conditions(world: World, seeds: int) -> dict[str, Row]:
    """AP50 by class, and by what was given."""
    rows: dict[str, Row] = {}
    for kind, nouns in world.classes.items():
        for noun in tqdm(nouns, desc=kind):
            row: Row = {}
            text = {"text": f"detect {demo_open.spoken(noun)}"} if "text" in world.generator.encoder.accepts else None
            for count in PICTURES:
                for seed in range(seeds):
                    images = {"images": world.pictures(noun, count, seed)}
                    row[f"{count} pictures, seed {seed}"] = world.score(noun, world.sample(**images))
                    if text and count == 8 and seed == 0:
                        row["text and 8 pictures"] = world.score(noun, world.sample(**text, **images))
            if text:
                row["text"] = world.score(noun, world.sample(**text))
            rows[noun] = row
    return rows


def rivals(world: World, seeds: int) -> dict[str, Row]:
    """AP50 by class of what could stand in the generator's place."""
    generator = world.generator
    trained = [str(task["name"]) for task in generator.config.tasks or []]
    known = torch.stack([generator.task_vector(images=world.pictures(noun, 8, 1)) for noun in tqdm(trained, desc="trained classes")])
    nouns = world.classes["unseen"]
    rows: dict[str, Row] = {}
    own = {noun: world.sample(images=world.pictures(noun, 8)) for noun in nouns}
    shared = generator.sample(generator.no_condition, temperature=0.0)[0].detach()
    for index, noun in enumerate(tqdm(nouns, desc="rivals")):
        row = {"8 pictures": world.score(noun, own[noun]), "one LoRA for all (no condition)": world.score(noun, shared)}
        row["another class's pictures"] = world.score(noun, own[nouns[(index + 7) % len(nouns)]])
        wild = (
            torch.randn(generator.config.condition_dim, generator=torch.Generator().manual_seed(index)) * generator.statistics.condition_std
        )
        row["random condition"] = world.score(
            noun, generator.sample(wild + generator.statistics.condition_mean, temperature=0.0)[0].detach()
        )
        here = generator.normalize_condition(generator.task_vector(images=world.pictures(noun, 8))[None])
        near = torch.cosine_similarity(here, generator.normalize_condition(known)).topk(4).indices.tolist()
        adapters = torch.stack([generator.sample(known[index], temperature=0.0)[0].detach() for index in near])
        row["nearest trained class"] = world.score(noun, adapters[0])
        row["soup of the 4 nearest"] = world.score(noun, adapters.mean(0))
        rows[noun] = {"nearest": trained[near[0]], **row}
    return rows


def own(world: World, seeds: int) -> dict[str, Row]:
    """AP50 by class of a LoRA of its own, from few and from many annotated scenes, by recipe."""
    rows: dict[str, Row] = {}
    for noun in tqdm(world.classes["unseen"], desc="own LoRAs"):
        rows[noun] = {"8 pictures": world.score(noun, world.sample(images=world.pictures(noun, 8)))}
        for count, steps in OWN:
            for rate in OWN_RATES:
                name = f"{count} scenes, {steps} steps at {rate:g}"
                rows[noun][name] = world.score(noun, world.own_lora(noun, count, steps, rate))
    return rows


def few(world: World, seeds: int) -> dict[str, Row]:
    """AP50 by class from few scenes: adapt against LoRA from scratch, the start tuned freely, a tuned condition, and LoraHub.

    No rate is chosen for a rival: each of its rates is reported, and the best of them is what `adapt` has to beat.
    """
    generator = world.generator
    rows: dict[str, Row] = {}
    pool = torch.stack([world.sample(images=world.pictures(noun, 8, 1)) for noun in world.trained[:POOL]])
    for noun in tqdm(world.classes["unseen"], desc="few examples"):
        pictures = world.pictures(noun, 8)
        start, vector = world.sample(images=pictures), generator.task_vector(images=pictures)
        row: Row = {"start": world.score(noun, start)}
        for count in FEW:
            examples = world.examples(noun, count)
            adapted = generator.adapt(
                labelled=examples, base_model=load_base(generator.layout, str(world.base_folder), None), images=pictures
            )
            row[f"adapt, {count}"] = world.score(noun, flat(generator.layout, adapted))
            row[f"LoraHub, {count}"] = world.score(noun, mix(generator.layout, str(world.base_folder), examples, pool))
            for name, rates in RIVAL_RATES.items():
                for rate in rates:
                    if name == "condition alone":
                        found = tune_condition(generator, str(world.base_folder), vector, examples, STEPS, rate)
                    else:
                        found = world.own_lora(noun, count, STEPS, rate, start if name == "start tuned freely" else None)
                    row[f"{name} at {rate:g}, {count}"] = world.score(noun, found)
        rows[noun] = row
        print(json.dumps({noun: {name: round(float(value), 3) for name, value in row.items()}}), flush=True)
    return rows


def latent(world: World, seeds: int) -> dict[str, Row]:
    """How far z moves an adapter, in the distance between adapters of different classes, and what it does to AP50."""
    generator, nouns = world.generator, world.classes["unseen"]
    vectors = {noun: generator.task_vector(images=world.pictures(noun, 8)) for noun in nouns}
    modes = {noun: generator.sample(vector, temperature=0.0)[0].detach() for noun, vector in vectors.items()}
    center = torch.stack(list(modes.values())).mean(0)
    apart = torch.stack([(mode - center).norm() for mode in modes.values()]).square().mean().sqrt()
    rows: dict[str, Row] = {}
    for noun in tqdm(nouns, desc="latent"):
        drawn = generator.sample(vectors[noun], 8, torch.Generator().manual_seed(0)).detach()
        moved = (drawn - modes[noun]).norm(dim=1).square().mean().sqrt()
        rows[noun] = {
            "z / classes": float(moved / apart),
            "AP50, z = 0": world.score(noun, modes[noun]),
            "AP50, z ~ N(0, I)": statistics.mean(world.score(noun, vector) for vector in drawn[:3]),
        }
    return rows


PARTS = {"conditions": conditions, "rivals": rivals, "own": own, "adapt": few, "latent": latent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--build", type=Path, required=True)
    parser.add_argument("--generator", type=Path, help="by default that of the build")
    parser.add_argument("--split", choices=("test", "choose"), default="test")
    parser.add_argument("--classes", type=int, default=40, help="at most so many of each kind")
    parser.add_argument("--seeds", type=int, default=1, help="draws of the pictures")
    parser.add_argument("--name", help="of the results; by default the part")
    args = parser.parse_args()
    world = World(args.build, args.generator or args.build / "open_generator", args.split, args.classes)
    rows = PARTS[args.part](world, args.seeds)
    kinds = {noun: kind for kind, nouns in world.classes.items() for noun in nouns}
    write(args.name or args.part, {noun: {"kind": kinds[noun], **row} for noun, row in rows.items()}, "AP50")


if __name__ == "__main__":
    main()
