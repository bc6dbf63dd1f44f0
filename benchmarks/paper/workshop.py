"""What the tables are made from: LoRAs, generators and baselines of one family, each made once and kept in the work folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor
from transformers import PrinterCallback

from peft_icm.adapters.collection import AdapterCollection
from peft_icm.baselines.cond_p_diff import CondPDiff
from peft_icm.baselines.cond_p_diff_training import train_cond_p_diff
from peft_icm.bundled import bundled_encoder
from peft_icm.collecting import CollectingArguments, collect
from peft_icm.conditioning import ClipEncoder, TaskEncoder
from peft_icm.generator.configuration_icm import ICMConfig
from peft_icm.generator.modeling_icm import ICMGenerator
from peft_icm.tasks import load_tasks
from peft_icm.tasks.annotated_images import crops
from peft_icm.tasks.detection import DetectionTask
from peft_icm.tasks.language_modeling import LanguageModelingTask
from peft_icm.training.arguments import ICMTrainingArguments
from peft_icm.training.trainer import ICMTrainer

from .results import write_json
from .scales import Family
from .scoring import Memory, Scorer, Task, test_items

UNSEEN_PICTURES = 48
GENERATOR_BATCH = 40  # snapshots
JOINT_STEPS = 2  # the LoRA of all tasks is trained for so many times the steps of one task's LoRA


@dataclass
class JointDetectionTask(DetectionTask):
    """One-class tasks as one: each answer names the objects of all their classes.

    Args:
        labels (`frozenset[str]`): The classes.
    """

    labels: frozenset[str] = frozenset()

    @property
    def trained_labels(self) -> frozenset[str]:
        """All of the classes."""
        return self.labels


def joint_task(tasks: Sequence[Any]) -> Task:
    """All tasks of a family as one, named `"all"`."""
    if isinstance(tasks[0], DetectionTask):
        labels = frozenset(task.label for task in tasks)
        return JointDetectionTask("all", ["all tasks"], tasks[0].label, tasks[0].train_images, [], labels=labels)
    return LanguageModelingTask("all", ["all tasks"], [text for task in tasks for text in task.train_texts], [])


class Workshop:
    """Makes, and keeps, everything that the tables of one family need.

    Args:
        family ([`Family`]): The recipes.
        data (`Path`): Holds the family's `tasks.json` in a folder of its name.
        work (`Path`): Where LoRAs, models and scores are kept; a second run takes what is there.

    Raises:
        `ValueError`: If a task is missing or has nothing to be tested on.
    """

    def __init__(self, family: Family, data: Path, work: Path):
        self.family, self.work = family, work / family.name
        self.base = family.base_path(data)
        found: dict[str, Any] = {task.name: task for task in load_tasks(data / family.name)}
        if missing := [name for name in family.tasks if name not in found]:
            raise ValueError(f"{data / family.name / 'tasks.json'} lacks the task {missing[0]!r}; it lists {', '.join(found)}.")
        self.tasks: list[Any] = [found[name] for name in family.tasks]
        for task in self.tasks:
            test_items(task, family.test_items)  # what cannot be tested is told before anything is trained
        self._check_recipe()
        self.memory = Memory(self.work / "scores.jsonl")
        self._scorer: Scorer | None = None
        self._collections: dict[str, AdapterCollection] = {}

    def _check_recipe(self) -> None:
        """Everything in the work folder is found by its name: it must all be of one recipe. Ranks are part of the names."""
        file = self.work / "family.json"
        recipe = json.loads(json.dumps({name: value for name, value in asdict(self.family).items() if name != "ranks"}))
        if not file.is_file():
            write_json(file, recipe)
        found = json.loads(file.read_text(encoding="utf-8"))
        for name, value in recipe.items():
            if found.get(name) != value:
                raise ValueError(
                    f"{self.work} was made by another recipe: {name} was {found.get(name)!r}, now {value!r}. Choose another --work."
                )

    # ------------------------------------------------------------------ conditions
    @cached_property
    def encoder(self) -> TaskEncoder:
        """The family's task encoder."""
        if self.family.encoder == "bundled":
            return ClipEncoder.from_pretrained(bundled_encoder())
        return ClipEncoder.from_pretrained(self.family.encoder, pretrained="openai")

    @cached_property
    def pictures(self) -> dict[str, list[Any]]:
        """Objects of each class that a generator learns to read; none for text."""
        found = [task for task in self.tasks if isinstance(task, DetectionTask)]
        return {task.name: crops(task.train_images, task.label, self.family.pictures) for task in found}

    def task(self, name: str) -> Any:
        """The task of that name."""
        return self.tasks[self.family.tasks.index(name)]

    def unseen_pictures(self, task: str) -> list[Any]:
        """Objects of a class from its test images."""
        found = self.task(task)
        return crops(found.test_images, found.label, UNSEEN_PICTURES)

    def condition(self, task: str, phrasing: int | None = None) -> Tensor:
        """`[d]`: of a task's description, or of one of its unseen phrasings."""
        found = self.task(task)
        lines = found.descriptions if phrasing is None else found.unseen_descriptions[phrasing:]
        if not lines:
            raise ValueError(f"Task {task!r} has {len(found.unseen_descriptions)} unseen_descriptions, the tables ask for more: add some.")
        return self.encoder.encode(lines[:1])[0]

    # ------------------------------------------------------------------ LoRAs
    def collection(self, rank: int, seeds: Sequence[int] | None = None) -> AdapterCollection:
        """The LoRAs of all tasks, with task vectors; trained where they are not there yet.

        Args:
            rank (`int`): r.
            seeds (`Sequence[int]`, *optional*): A seed of A and B for each task; by default all share seed 0.

        Raises:
            `ValueError`: If a kept collection has fewer snapshots than the family asks for.
        """
        folder = self.work / (f"r{rank}" if seeds is None else f"r{rank}-own-seeds")
        if folder.name in self._collections:
            return self._collections[folder.name]
        if not (folder / "collection.json").is_file():
            self._collect(folder, rank, seeds).save_pretrained(folder)
        collection = AdapterCollection.from_pretrained(folder)
        for task in self.family.tasks:
            count = len(collection.snapshots.get(task, ()))
            if count < self.family.snapshots:
                raise ValueError(
                    f"{folder} has {count} snapshots of {task!r}, {self.family.snapshots} are asked for: remove it, or collect it anew."
                )
        collection.descriptions = {task.name: list(task.descriptions) for task in self.tasks}
        collection.encode(self.encoder, images=self.pictures)
        self._collections[folder.name] = collection
        return collection

    def _collect(self, folder: Path, rank: int, seeds: Sequence[int] | None) -> AdapterCollection:
        work = f"{folder}.collecting"
        if seeds is None:
            return self._train_loras(self.tasks, rank, work)
        parts = [self._train_loras([task], rank, f"{work}/{task.name}", seed=seed) for task, seed in zip(self.tasks, seeds, strict=True)]
        snapshots = {name: tensor for part in parts for name, tensor in part.snapshots.items()}
        return AdapterCollection(parts[0].layout, snapshots, parts[0].descriptions, metadata={**parts[0].metadata, "seed": list(seeds)})

    def _train_loras(self, tasks: Sequence[Any], rank: int, output_dir: str, seed: int = 0, **dataset: Any) -> AdapterCollection:
        recipe = {**self.family.recipe, "dataset_kwargs": {**self.family.recipe["dataset_kwargs"], **dataset}}
        args = CollectingArguments(output_dir, num_snapshots=self.family.snapshots, seed=seed, **recipe)
        collection = collect(self.base, tasks, LoraConfig(r=rank, **self.family.lora), args)
        assert collection is not None  # one shard
        return collection

    def joint(self, rank: int) -> Tensor:
        """`[P]`: one LoRA trained on all tasks."""
        items = {}
        if count := self.family.recipe["dataset_kwargs"].get(self.family.items):
            items = {self.family.items: JOINT_STEPS * count}
        collection = self._train_loras([joint_task(self.tasks)], rank, str(self.work / f"r{rank}-joint.collecting"), **items)
        return collection.final("all")

    # ------------------------------------------------------------------ generators
    def generator(self, name: str, collection: AdapterCollection, seed: int, *, epochs: int | None = None, **changes: Any) -> ICMGenerator:
        """A generator of the family's recipe, or of a changed one.

        Args:
            name (`str`): Of its folder; one name is one recipe.
            collection (`AdapterCollection`): With task vectors.
            seed (`int`): Of weights and episodes.
            epochs (`int`, *optional*): By default the family's.
            **changes: For [`ICMConfig`] and [`ICMTrainingArguments`].

        Returns:
            [`ICMGenerator`]
        """
        folder = self.work / "models" / f"{name}-seed{seed}"
        if not (folder / "model.safetensors").is_file():
            known = ICMConfig.__dataclass_fields__
            config = ICMConfig(**{**self.family.generator, **{key: value for key, value in changes.items() if key in known}})
            arguments = {key: value for key, value in changes.items() if key not in known}
            args = ICMTrainingArguments(
                output_dir=str(folder.with_suffix(".part")),
                num_train_epochs=self.family.epochs if epochs is None else epochs,
                per_device_train_batch_size=arguments.pop("batch_size", GENERATOR_BATCH),
                lr_scheduler_type="cosine",
                eval_strategy="no",
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                seed=seed,
                **arguments,
            )
            trainer = ICMTrainer(config, args, collection=collection)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            model: Any = trainer.generator.cpu()
            with _kept(folder) as temporary:
                model.save_pretrained(temporary)
        return ICMGenerator.from_pretrained(folder)

    def diffusion(self, rank: int, seed: int) -> CondPDiff:
        """COND P-DIFF on the LoRAs of one rank."""
        folder = self.work / "models" / f"cond-p-diff-r{rank}-seed{seed}"
        if not (folder / "model.safetensors").is_file():
            with _kept(folder) as temporary:
                train_cond_p_diff(self.collection(rank), output_dir=temporary, seed=seed, **self.family.diffusion)
        return CondPDiff.from_pretrained(folder)

    # ------------------------------------------------------------------ scores
    def scorer(self, collection: AdapterCollection) -> Scorer:
        """The scorer of a collection's layout; the base is loaded anew for another layout."""
        if self._scorer is None or self._scorer.layout.fingerprint != collection.layout.fingerprint:
            family = self.family
            self._scorer = Scorer(collection.layout, self.base, self.tasks, self.memory, family.dtype, family.test_items)
        return self._scorer


@contextmanager
def _kept(folder: Path) -> Iterator[Path]:
    """A temporary name for a folder, which gets its own when it is whole."""
    temporary = folder.with_suffix(".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
