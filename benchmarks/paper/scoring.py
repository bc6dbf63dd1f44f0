"""Score an adapter vector on a task, and never the same one twice."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoProcessor

from peft_icm.adapters.attach import attach
from peft_icm.adapters.base import load_base
from peft_icm.adapters.layout import AdapterLayout
from peft_icm.evaluation import DetectionEvaluation, Evaluation
from peft_icm.tasks.annotated_images import AnnotatedImage
from peft_icm.tasks.detection import DetectionTask, detect
from peft_icm.tasks.language_modeling import LanguageModelingTask

Score = dict[str, float]
Task = LanguageModelingTask | DetectionTask
VALIDATION_ITEMS = 3  # training texts that greedy soups are chosen on
VALIDATION_IMAGES = 40  # training images with the class, and as many without


class Memory:
    """Scores on disk, one JSON object a line; a line that a killed run left half-written is dropped.

    Args:
        file (`Path`): Where they are kept.
    """

    def __init__(self, file: Path):
        self.file = file
        self.known: dict[str, Any] = {}
        if file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            if len(whole) < len(lines):
                file.write_text("".join(whole), encoding="utf-8")
            self.known = dict(json.loads(line) for line in whole)

    def get(self, key: str, compute: Any) -> Any:
        """What is known under a key, or what `compute()` returns, which is then kept."""
        if key not in self.known:
            self.known[key] = compute()
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps([key, self.known[key]]) + "\n")
        return self.known[key]


class Scorer:
    """Scores adapters of one layout on held-out text or pictures, by the metric of `peft_icm.evaluation`.

    Text: `nats` (per token), `ppl`, `bpc`. Detection: `map`, `map_50`, `map_75`. `gain` is what is better the larger it is: -nats, or AP50.

    Args:
        layout ([`AdapterLayout`]): Of the vectors.
        base (`str`): Folder or Hub id of the base model.
        tasks (`Sequence[Task]`): With test data.
        memory ([`Memory`]): Where scores are kept.
        dtype (`str`): Of the base.
        limit (`int`, *optional*): `test_items` of the [`Family`].

    Raises:
        `ValueError`: If a task has nothing to be tested on.
    """

    def __init__(self, layout: AdapterLayout, base: str, tasks: Sequence[Task], memory: Memory, dtype: str, limit: int | None):
        self.layout, self.memory = layout, memory
        self.processor = AutoProcessor.from_pretrained(base)
        self.splits = {task.name: {"test": test_items(task, limit), "train": _validation(task)} for task in tasks}
        self.tasks = {task.name: task for task in tasks}
        self._model: PeftModel | None = None
        self._base, self._dtype = base, dtype
        self._fingerprints = {
            (name, split): hashlib.sha256("\0".join(map(_describe, items)).encode()).hexdigest()[:16]
            for name, parts in self.splits.items()
            for split, items in parts.items()
        }

    def __call__(self, task: str, vector: Tensor | None, split: str = "test") -> Score:
        """The score of one adapter.

        Args:
            task (`str`): Name of the task.
            vector (`Tensor`, *optional*): `[P]`; `None` is the base itself.
            split (`str`, defaults to `"test"`): `"test"`, or `"train"` for what is chosen by a score.

        Returns:
            `dict[str, float]`
        """
        digest = "base" if vector is None else hashlib.sha256(vector.float().contiguous().numpy().tobytes()).hexdigest()[:32]
        key = f"{task}/{split}/{self._fingerprints[task, split]}/{digest}"
        return self.memory.get(key, lambda: self._score(self.tasks[task], self.splits[task][split], vector))

    def model(self, vector: Tensor | None) -> PeftModel:
        """The base with this adapter; the same object at every call."""
        state_dict = self.layout.unflatten(torch.zeros(self.layout.numel) if vector is None else vector.cpu())  # B = 0: the base
        if self._model is None:
            base: Any = load_base(self.layout, self._base, None, dtype=self._dtype)
            self._model = attach(base.to("cuda" if torch.cuda.is_available() else "cpu"), self.layout, state_dict)
        return attach(self._model, self.layout, state_dict)

    def find(self, task: str, vector: Tensor | None, images: Sequence[AnnotatedImage]) -> list[dict[str, Any]]:
        """What a detection adapter finds in pictures."""
        return detect(self.model(vector), self.processor, images, batch_size=64, progress=False)

    def _score(self, task: Task, items: Sequence[Any], vector: Tensor | None) -> Score:
        model = self.model(vector)
        if isinstance(task, LanguageModelingTask):
            part: Any = dataclasses.replace(task, test_texts=list(items))
            return Evaluation.numbers(Evaluation.score(model, self.processor, part, batch_size=8))
        part = dataclasses.replace(task, test_images=list(items))
        return DetectionEvaluation.numbers(DetectionEvaluation.score(model, self.processor, part, batch_size=64))


def test_items(task: Task, limit: int | None) -> Sequence[Any]:
    """The texts or pictures that a task is tested on.

    Args:
        task (`Task`): With test data.
        limit (`int`, *optional*): See [`Family`].

    Raises:
        `ValueError`: If there are none.
    """
    if isinstance(task, LanguageModelingTask):
        if not task.test_texts:
            raise ValueError(f"Task {task.name!r} has no test text: name a file under 'test' in its tasks.json.")
        return task.test_texts[:limit]
    return _balanced(task, task.test_images, limit, "test")


def _validation(task: Task) -> Sequence[Any]:
    if isinstance(task, LanguageModelingTask):
        return [text[:4000] for text in task.train_texts[:VALIDATION_ITEMS]]
    return _balanced(task, task.train_images, VALIDATION_IMAGES, "training")


def _balanced(task: DetectionTask, images: Sequence[AnnotatedImage], limit: int | None, split: str) -> list[AnnotatedImage]:
    """The images with the class and as many without."""
    positive = [image for image in images if task.label in image.labels][:limit]
    if not positive:
        raise ValueError(f"Task {task.name!r} has no {split} image of a {task.label!r}: correct its annotations.")
    negative = [image for image in images if task.label not in image.labels]
    return positive + negative[: len(positive)]


def _describe(item: Any) -> str:
    if isinstance(item, str):
        return item
    picture = Path(item.image).name if isinstance(item.image, str) else item.size
    return f"{picture}{item.boxes}{item.labels}"
