"""Detection as a task for Florence-2: annotated pictures in, one-class tasks, boxes with scores out."""

from __future__ import annotations

import hashlib
import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

from ..disk import safe_name
from .annotated_images import AnnotatedImage, load_coco
from .fields import at_least, check_sentences, make_tasks, path_from_json, read_tasks_json
from .florence_answers import answer_text, parse_answer


class DetectionExamples(Dataset[dict[str, Tensor]]):
    """Pictures with Florence-2's answer about all their boxes: `pixel_values` `[3, H, W]`, `input_ids`, `attention_mask`, `labels`.

    Labels are padded with -100 to one length, so that the Trainer's default collator stacks them.

    Args:
        images (`Sequence[AnnotatedImage]`): At least one.
        processor (`Florence2Processor`): Of the base model.
        prompt (`str`, defaults to `"<OD>"`): What is asked.
        location_step (`int`, defaults to 1): See [`answer_text`].
        images_per_epoch (`int`, *optional*): An epoch is so many images, drawn anew from all with torch's global generator; by default it
            is each image once.
        in_memory (`bool`, defaults to `False`): Process all pictures at once and keep them; for small ones.

    Raises:
        `ValueError`: If there is no image, a file is no picture, `images_per_epoch` is less than 1, or [`answer_text`] cannot write the
            answer.
    """

    def __init__(
        self,
        images: Sequence[AnnotatedImage],
        processor: Any,
        *,
        prompt: str = "<OD>",
        location_step: int = 1,
        images_per_epoch: int | None = None,
        in_memory: bool = False,
    ):
        if not images:
            raise ValueError("There are no images to learn from: give one at least.")
        if images_per_epoch is not None:
            at_least(1, images_per_epoch=images_per_epoch)
        self.images, self.processor, self.images_per_epoch = images, processor, images_per_epoch
        asked = processor(text=prompt, images=images[0].load(), return_tensors="pt")
        self.prompt = {name: asked[name][0] for name in ("input_ids", "attention_mask")}
        answers = [answer_text(image.boxes, image.labels, image.size, processor, location_step) for image in images]
        tokenizer = processor.tokenizer
        # <s> answer </s>, as in BART and in Florence-2's own fine-tuning: the decoder starts from </s>, and its first token is <s>, which
        # the released checkpoints force in generation.
        rows = [
            torch.tensor([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id])
            for ids in tokenizer(answers, add_special_tokens=False)["input_ids"]
        ]
        self.labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        self.pixel_values = [self._process(image) for image in images] if in_memory else None

    def _process(self, image: AnnotatedImage) -> Tensor:
        return self.processor.image_processor(image.load(), return_tensors="pt")["pixel_values"][0]

    def __len__(self) -> int:
        return self.images_per_epoch or len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = int(torch.randint(len(self.images), ())) if self.images_per_epoch else index
        pixel_values = self.pixel_values[row] if self.pixel_values else self._process(self.images[row])
        return {"pixel_values": pixel_values, **self.prompt, "labels": self.labels[row]}

    def fingerprint(self) -> str:
        """Hex digest over prompt, answers and the pictures' files, whichever of them an epoch draws; no file is decoded."""
        digest = hashlib.sha256()
        for tensor in (self.prompt["input_ids"], self.labels):
            digest.update(f"{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
        for image in self.images:
            if isinstance(image.image, PIL.Image.Image):
                digest.update(f"{image.size}".encode() + image.load().tobytes())
            else:
                with open(image.image, "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


@dataclass
class DetectionTask:
    """Detecting the objects of one class.

    Args:
        name (`str`): Short name, a valid file name, such as `"sofa"`.
        descriptions (`list[str]`): Sentences that ask for it; the first is the canonical one. Here as below one string is a list of one.
        label (`str`): The class as the annotations and Florence-2 write it, such as COCO's `"couch"`.
        train_images (`list[AnnotatedImage]`): Images to train on, with and without the class.
        test_images (`list[AnnotatedImage]`): Held-out images.
        unseen_descriptions (`list[str]`): Sentences that ask for it and that no generator is trained on; for evaluation.
        prompt (`str`, defaults to `"<OD>"`): What Florence-2 is asked; not the class, which the adapter knows.
        answer (`str`, *optional*): What Florence-2 calls an object of the class, where that is not its label: `"object"`, where the
            base has no name for it.

    Raises:
        `ValueError`: If the name is no file name ([`safe_name`]), the label or a description is no string or blank, or there is no
            description.
    """

    name: str
    descriptions: list[str]
    label: str
    train_images: list[AnnotatedImage]
    test_images: list[AnnotatedImage]
    unseen_descriptions: list[str] = field(default_factory=list)
    prompt: str = "<OD>"
    answer: str | None = None
    holds: ClassVar[str] = "pictures"  # which the base must read

    def __post_init__(self) -> None:
        safe_name(self.name, "task")
        check_sentences(self)
        if not isinstance(self.label, str) or not self.label.strip():
            raise ValueError(f"label of task {self.name!r} must be a non-empty string; found {self.label!r:.80}.")

    @property
    def trained_labels(self) -> frozenset[str]:
        """The labels that the answers of [`~DetectionTask.train_dataset`] name."""
        return frozenset([self.label])

    def train_dataset(
        self,
        processor: Any,
        location_step: int = 1,
        negatives: float = 0.0,
        images_per_epoch: int | None = None,
        in_memory: bool = False,
    ) -> DetectionExamples:
        """The training images with the class, each with the answer that names the objects of this class alone.

        Args:
            processor (`Florence2Processor`): Of the base model.
            location_step (`int`, defaults to 1): See [`answer_text`].
            negatives (`float`, defaults to 0.0): Images without the class, whose answer is empty, for each image with it; drawn with a
                fixed seed, and all of them where there are not enough.
            images_per_epoch (`int`, *optional*): See [`DetectionExamples`].
            in_memory (`bool`, defaults to `False`): See [`DetectionExamples`].

        Returns:
            [`DetectionExamples`]

        Raises:
            `ValueError`: If no training image has the class, `negatives` is below 0, or [`DetectionExamples`] refuses the rest.
        """
        if not 0 <= negatives < math.inf:
            raise ValueError(f"negatives={negatives!r} must be a number of at least 0.")
        positive = [image for image in self.train_images if not self.trained_labels.isdisjoint(image.labels)]
        negative = [image for image in self.train_images if self.trained_labels.isdisjoint(image.labels)]
        if not positive:
            raise ValueError(
                f"Task {self.name!r} is a class with no examples: none of its {len(negative)} training images has a {self.label!r}."
            )
        drawn = random.Random(0).sample(negative, min(round(negatives * len(positive)), len(negative)))
        return DetectionExamples(
            [self._answered(image) for image in positive + drawn],
            processor,
            prompt=self.prompt,
            location_step=location_step,
            images_per_epoch=images_per_epoch,
            in_memory=in_memory,
        )

    def named(self, found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What [`detect`] found, with the class under its label where it answered otherwise.

        Args:
            found (`Sequence[Mapping]`): One entry for each image.
        """
        return [{**one, "labels": [self.label if name == self.answer else name for name in one["labels"]]} for one in found]

    def _answered(self, image: AnnotatedImage) -> AnnotatedImage:
        """The image with the objects that its answer names, by the name that it gives them."""
        named = [(box, label) for box, label in zip(image.boxes, image.labels, strict=True) if label in self.trained_labels]
        return AnnotatedImage(image.image, [box for box, _ in named], [self.answer or label for _, label in named])


def detection_tasks(
    train: list[AnnotatedImage],
    test: list[AnnotatedImage],
    classes: Mapping[str, str],
    descriptions: Mapping[str, list[str]],
    unseen_descriptions: Mapping[str, list[str]] | None = None,
) -> list[DetectionTask]:
    """Split annotated images into tasks of one class each.

    Args:
        train (`list[AnnotatedImage]`): Images to train on; each task holds all of them, for its negatives.
        test (`list[AnnotatedImage]`): Held-out images; likewise.
        classes (`Mapping[str, str]`): The label of each task by its name, such as `{"sofa": "couch"}`.
        descriptions (`Mapping[str, list[str]]`): Sentences that ask for each task, by its name.
        unseen_descriptions (`Mapping[str, list[str]]`, *optional*): Sentences kept for evaluation, by the task's name.

    Returns:
        `list[DetectionTask]`: In the order of `classes`.

    Raises:
        `ValueError`: If a class has no training or no test example, or a task no description.
    """
    for split, images in (("training", train), ("test", test)):
        labels = {label for image in images for label in image.labels}
        if absent := sorted(set(classes.values()) - labels):
            raise ValueError(f"{', '.join(absent)}: a class with no {split} examples. There are examples of {', '.join(sorted(labels))}.")
    if silent := [name for name in classes if not descriptions.get(name)]:
        raise ValueError(f"descriptions has no sentence for {', '.join(silent)}: each task needs at least one.")
    unseen = unseen_descriptions or {}
    return [DetectionTask(name, descriptions[name], label, train, test, unseen.get(name, [])) for name, label in classes.items()]


def load_detection_tasks(folder: str | Path) -> list[DetectionTask]:
    """Read the detection tasks of a folder.

    `tasks.json` holds `{"train": {"annotations", "images"}, "test": {...}, "tasks": [{"name", "label", "descriptions",
    "unseen_descriptions", "answer"}]}`, where annotations is a COCO instances file and images a folder, both relative to `folder`; a split
    may be null, `unseen_descriptions` and `answer` left out. Relative names stay inside `folder`.

    Args:
        folder (`str` or `Path`): The folder.

    Returns:
        `list[DetectionTask]`

    Raises:
        `ValueError`: If there is no readable `tasks.json`, a field of it is missing or of another type (the message names file, task and
            field), or an annotation file is not as [`load_coco`] wants it.
    """
    form = '{"train": {"annotations", "images"} or null, "test": ..., "tasks": [{"name", "label", "descriptions"}]}'
    document = read_tasks_json(folder, form)
    images: dict[str, list[AnnotatedImage]] = {"train": [], "test": []}

    def make(entry: dict[str, Any]) -> DetectionTask:
        unseen = entry.get("unseen_descriptions", [])
        known = (entry["name"], entry["descriptions"], entry["label"], images["train"], images["test"], unseen)
        return DetectionTask(*known, answer=entry.get("answer"))

    tasks = make_tasks(folder, document["tasks"], make)
    for split in images:  # read last: of a large data set this takes minutes
        entry = document.get(split)
        if split not in document or not (entry is None or (isinstance(entry, dict) and {"annotations", "images"} <= entry.keys())):
            raise ValueError(f"{folder} needs a tasks.json of the form {form} ({split} is {document.get(split, 'missing')!r:.80}).")
        if entry is not None:
            fields = ("annotations", "images")
            images[split] += load_coco(*(path_from_json(folder, entry[name], f"{folder}/tasks.json: {name} of {split}") for name in fields))
    return tasks


class _Confidence(LogitsProcessor):
    """Keeps the log-probability of the token that greedy search takes: one number where `output_logits` keeps the whole vocabulary."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores.log_softmax(-1).amax(-1))
        return scores


@torch.no_grad()
def detect(
    model: Any,
    processor: Any,
    images: Sequence[AnnotatedImage | PIL.Image.Image | str] | AnnotatedImage | PIL.Image.Image | str,
    *,
    prompt: str = "<OD>",
    batch_size: int = 16,
    max_new_tokens: int = 512,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Detect objects with Florence-2, with or without an adapter, by greedy generation.

    Args:
        model (`Florence2ForConditionalGeneration` or `PeftModel`): The model.
        processor (`Florence2Processor`): Its processor.
        images (`Sequence`): Annotated images (whose boxes are not looked at), pictures or files; or one of them.
        prompt (`str`, defaults to `"<OD>"`): What is asked; the answer is read as that to `<OD>`.
        batch_size (`int`, defaults to 16): Images generated from at once.
        max_new_tokens (`int`, defaults to 512): The longest answer, about six tokens an object; at most what the model has positions for.
        progress (`bool`, defaults to `True`): Show a progress bar when there are more than 20 batches.

    Returns:
        `list[dict]`: For each image `boxes` (`Tensor` `[N, 4]`, xyxy in pixels of the original picture), `labels` (`list[str]`) and
        `scores` (`Tensor` `[N]`, the geometric mean of the probabilities of an object's tokens).

    Raises:
        `ValueError`: If the tokenizer has tokens that the model does not know, a file is no picture, or a number is less than 1.
    """
    at_least(1, batch_size=batch_size, max_new_tokens=max_new_tokens)
    tokens, known = len(processor.tokenizer), model.config.text_config.vocab_size
    longest = min(max_new_tokens, model.config.text_config.max_position_embeddings - 1)
    if tokens > known:
        raise ValueError(f"The processor's tokenizer has {tokens} tokens, the model only {known}: take the processor of this model.")
    if isinstance(images, AnnotatedImage | PIL.Image.Image | str | os.PathLike):
        images = [images]
    pictures = [image if isinstance(image, AnnotatedImage) else AnnotatedImage(image) for image in images]
    batches = [pictures[i : i + batch_size] for i in range(0, len(pictures), batch_size)]
    found = []
    was_training = model.training
    model.eval()
    try:
        for batch in tqdm(batches, desc="detecting", leave=False, disable=not progress or len(batches) <= 20):
            loaded = [picture.load() for picture in batch]
            inputs = processor(text=[prompt] * len(batch), images=loaded, return_tensors="pt").to(model.device, model.dtype)
            confidence = _Confidence()
            # The released checkpoints ask for three beams without repeated trigrams, but `refrigerator` twice is such a repetition.
            greedy = {"do_sample": False, "num_beams": 1, "early_stopping": False, "no_repeat_ngram_size": 0}
            sequences = model.generate(**inputs, **greedy, max_new_tokens=longest, logits_processor=LogitsProcessorList([confidence]))
            answers, log_probs = sequences[:, 1:].tolist(), torch.stack(confidence.steps, 1).tolist()
            found += [parse_answer(a, p, picture.size, processor) for a, p, picture in zip(answers, log_probs, loaded, strict=True)]
    finally:
        model.train(was_training)
    return found
