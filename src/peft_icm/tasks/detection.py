"""Detection as a task for Florence-2: annotated pictures in, one-class tasks, boxes with scores out."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

from .florence_answers import answer_text, parse_answer


@dataclass
class AnnotatedImage:
    """A picture and the objects in it.

    Args:
        image (`str` or `PIL.Image.Image`): A file, opened only when it is needed, or a picture.
        boxes (`list[list[float]]`): `[N, 4]`, xyxy in pixels.
        labels (`list[str]`): N labels.

    Example:

    ```python
    >>> AnnotatedImage(PIL.Image.new("L", (40, 30)), [[0, 0, 20, 30]], ["door"]).load().mode
    'RGB'

    ```
    """

    image: str | PIL.Image.Image
    boxes: list[list[float]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)

    def load(self) -> PIL.Image.Image:
        """The picture, in RGB.

        Raises:
            `ValueError`: If the file is no picture.
        """
        with self._opened() as picture:
            return picture.convert("RGB")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, read without decoding the picture; raises `ValueError` if the file is no picture."""
        with self._opened() as picture:
            return picture.size

    @contextmanager
    def _opened(self) -> Iterator[PIL.Image.Image]:
        if isinstance(self.image, PIL.Image.Image):
            yield self.image
            return
        try:
            with PIL.Image.open(self.image) as picture:
                yield picture
        except (OSError, SyntaxError) as error:  # SyntaxError is how Pillow reports a broken PNG
            raise ValueError(f"{self.image} is no picture that Pillow can read ({error}).") from error


def load_coco(annotations: str | os.PathLike[str], images: str | os.PathLike[str]) -> list[AnnotatedImage]:
    """Read a COCO instances file; crowds (`iscrowd`) are left out, images without objects are kept.

    Args:
        annotations (`str` or `Path`): The JSON file, such as `instances_train2017.json`.
        images (`str` or `Path`): The folder that its `file_name`s lie in.

    Returns:
        `list[AnnotatedImage]`: In the order of the file.

    Raises:
        `ValueError`: If the file is no COCO instances JSON, images are missing, an annotation names an unknown image or category, or a
            box is empty or more than a pixel outside its image.
    """
    try:
        document = json.loads(Path(annotations).read_text(encoding="utf-8"))
        entries = {entry["id"]: (entry["file_name"], (entry["width"], entry["height"])) for entry in document["images"]}
        categories = {entry["id"]: entry["name"] for entry in document["categories"]}
        objects = [(o["image_id"], o["category_id"], o["bbox"]) for o in document["annotations"] if not o.get("iscrowd")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{annotations} is no COCO instances file, {{"images": [...], "annotations": [...], "categories": [...]}} ({error!r}).'
        ) from error
    folder = Path(images)
    if missing := [name for name, _ in entries.values() if not (folder / name).is_file()]:
        raise ValueError(f"{len(missing)} of the {len(entries)} images of {annotations} are not in {folder}, the first is {missing[0]}.")
    found = {key: AnnotatedImage(str(folder / name)) for key, (name, _) in entries.items()}
    for image, category, bbox in objects:
        if image not in entries or category not in categories:
            unknown = f"category_id {category}" if image in entries else f"image_id {image}"
            raise ValueError(f"{annotations} has an annotation of {unknown}, which the file does not define.")
        found[image].boxes.append(_corners(bbox, entries[image][1], entries[image][0]))
        found[image].labels.append(categories[category])
    return list(found.values())


def from_dataset(dataset: datasets.Dataset) -> list[AnnotatedImage]:
    """Read a data set with the Hub's usual columns for object detection; its pictures are decoded into memory.

    Args:
        dataset (`datasets.Dataset`): Columns `image` and `objects`, `{"bbox": [[x, y, width, height], ...], "category": [...]}`, with
            categories of a `ClassLabel` or as strings.

    Returns:
        `list[AnnotatedImage]`

    Raises:
        `ValueError`: If the columns are others, or a box is empty or more than a pixel outside its image.
    """
    objects = dataset.features.get("objects")
    category = getattr(objects.get("category"), "feature", None) if isinstance(objects, dict) else None
    is_known = isinstance(category, datasets.ClassLabel) or category == datasets.Value("string")
    if not (is_known and isinstance(dataset.features.get("image"), datasets.Image)):
        raise ValueError(
            'The data set needs the columns image and objects {"bbox", "category"}, with categories of a ClassLabel or strings; '
            f"found {dataset.features}."
        )
    found = []
    for index, row in enumerate(dataset):
        boxes = [_corners(bbox, row["image"].size, f"image {index}") for bbox in row["objects"]["bbox"]]
        labels = row["objects"]["category"]
        found.append(AnnotatedImage(row["image"], boxes, category.int2str(labels) if isinstance(category, datasets.ClassLabel) else labels))
    return found


def _corners(bbox: Sequence[float], size: tuple[int, int], name: str) -> list[float]:
    """COCO's xywh as xyxy, clipped to the image."""
    x, y, width, height = bbox
    corners, limits = (x, y, x + width, y + height), (*size, *size)
    inside = all(-1 <= value <= limit + 1 for value, limit in zip(corners, limits, strict=True))
    # COCO itself has boxes a fraction of a pixel too large, and two (in train2017) that rounding left without any height.
    if not (inside and min(width, height) >= 0 and max(width, height) > 0):
        raise ValueError(
            f"{name}: the box {list(bbox)} (x, y, width, height) is empty or outside its image of {size[0]} x {size[1]} pixels."
        )
    return [min(max(float(value), 0.0), float(limit)) for value, limit in zip(corners, limits, strict=True)]


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
        `ValueError`: If a file is no picture, or `location_step` is out of range.
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


@dataclass
class DetectionTask:
    """Detecting the objects of one class.

    Args:
        name (`str`): Short name, a valid file name, such as `"sofa"`.
        descriptions (`list[str]`): Sentences that ask for it; the first is the canonical one.
        label (`str`): The class as the annotations and Florence-2 write it, such as COCO's `"couch"`.
        train_images (`list[AnnotatedImage]`): Images to train on, with and without the class.
        test_images (`list[AnnotatedImage]`): Held-out images.
        unseen_descriptions (`list[str]`): Sentences that ask for it and that no generator is trained on; for evaluation.
        prompt (`str`, defaults to `"<OD>"`): What Florence-2 is asked; not the class, which the adapter knows.
    """

    name: str
    descriptions: list[str]
    label: str
    train_images: list[AnnotatedImage]
    test_images: list[AnnotatedImage]
    unseen_descriptions: list[str] = field(default_factory=list)
    prompt: str = "<OD>"

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
            `ValueError`: If no training image has the class.
        """
        positive: list[AnnotatedImage] = []
        negative: list[AnnotatedImage] = []
        for image in self.train_images:
            boxes = [box for box, label in zip(image.boxes, image.labels, strict=True) if label == self.label]
            (positive if boxes else negative).append(AnnotatedImage(image.image, boxes, [self.label] * len(boxes)))
        if not positive:
            raise ValueError(
                f"Task {self.name!r} is a class with no examples: none of its {len(negative)} training images has a {self.label!r}."
            )
        drawn = random.Random(0).sample(negative, min(round(negatives * len(positive)), len(negative)))
        return DetectionExamples(
            positive + drawn,
            processor,
            prompt=self.prompt,
            location_step=location_step,
            images_per_epoch=images_per_epoch,
            in_memory=in_memory,
        )


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
    images: Sequence[AnnotatedImage | PIL.Image.Image | str],
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
        images (`Sequence`): Annotated images (whose boxes are not looked at), pictures or files.
        prompt (`str`, defaults to `"<OD>"`): What is asked; the answer is read as that to `<OD>`.
        batch_size (`int`, defaults to 16): Images generated from at once.
        max_new_tokens (`int`, defaults to 512): The longest answer, about six tokens an object.
        progress (`bool`, defaults to `True`): Show a progress bar when there are more than 20 batches.

    Returns:
        `list[dict]`: For each image `boxes` (`Tensor` `[N, 4]`, xyxy in pixels of the original picture), `labels` (`list[str]`) and
        `scores` (`Tensor` `[N]`, the geometric mean of the probabilities of an object's tokens).

    Raises:
        `ValueError`: If the tokenizer has tokens that the model does not know, or a file is no picture.
    """
    tokens, known = len(processor.tokenizer), model.config.text_config.vocab_size
    if tokens > known:
        raise ValueError(f"The processor's tokenizer has {tokens} tokens, the model only {known}: take the processor of this model.")
    pictures = [image if isinstance(image, AnnotatedImage) else AnnotatedImage(image) for image in images]
    batches = [pictures[i : i + batch_size] for i in range(0, len(pictures), batch_size)]
    found = []
    was_training = model.training
    model.eval()
    for batch in tqdm(batches, desc="detecting", leave=False, disable=not progress or len(batches) <= 20):
        loaded = [picture.load() for picture in batch]
        inputs = processor(text=[prompt] * len(batch), images=loaded, return_tensors="pt").to(model.device, model.dtype)
        confidence = _Confidence()
        # The released checkpoints ask for three beams without repeated trigrams, but `refrigerator` twice is such a repetition.
        greedy = {"do_sample": False, "num_beams": 1, "early_stopping": False, "no_repeat_ngram_size": 0}
        sequences = model.generate(**inputs, **greedy, max_new_tokens=max_new_tokens, logits_processor=LogitsProcessorList([confidence]))
        answers, log_probs = sequences[:, 1:].tolist(), torch.stack(confidence.steps, 1).tolist()
        found += [parse_answer(a, p, picture.size, processor) for a, p, picture in zip(answers, log_probs, loaded, strict=True)]
    model.train(was_training)
    return found
