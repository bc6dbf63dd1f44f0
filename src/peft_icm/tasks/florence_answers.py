"""What Florence-2 answers to `<OD>`: boxes to text, and generated tokens back to boxes with scores."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch

_ANSWER = re.compile(r"([^<]+)((?:(?:<loc_\d{1,3}>){4})+)")
LONGEST_LABEL = 200  # characters: the processor's pattern takes the square of their number


def is_answerable(label: str) -> bool:
    """Whether Florence-2 can answer with a label, so that its processor reads it back.

    Args:
        label (`str`): The label.

    Returns:
        `bool`: Not of one that is blank, not ASCII, longer than 200 characters, with `<` or a line break, or with space around it.

    Example:

    ```python
    >>> is_answerable("traffic light"), is_answerable("Tür")
    (True, False)

    ```
    """
    return bool(label) and label.isascii() and not {"<", "\n"} & {*label} and label == label.strip() and len(label) <= LONGEST_LABEL


def answer_text(
    boxes: Sequence[Sequence[float]], labels: Sequence[str], size: tuple[int, int], processor: Any, location_step: int = 1
) -> str:
    """The answer that Florence-2 is trained on: `label<loc_x1><loc_y1><loc_x2><loc_y2>` for each object, left to right, then top down.

    Args:
        boxes (`Sequence[Sequence[float]]`): `[N, 4]`, xyxy in pixels.
        labels (`Sequence[str]`): N labels.
        size (`tuple[int, int]`): Width and height of the image.
        processor (`Florence2Processor`): Its quantizer makes the bins.
        location_step (`int`, defaults to 1): So many of the 1000 bins are written as one, by the one in their middle: a small base learns
            20 positions (step 50) where it would not learn 1000.

    Returns:
        `str`: Empty where there are no objects.

    Raises:
        `ValueError`: If `location_step` is not a whole number between 1 and 1000, or a label is one that the processor would not read back:
            not ASCII, longer than 200 characters, with `<` or with space around it.
    """
    if not isinstance(location_step, int) or not 1 <= location_step <= 1000:
        raise ValueError(f"location_step={location_step} must be between 1 (all of Florence-2's bins) and 1000 (a single one).")
    for label in labels:
        if not is_answerable(label):
            raise ValueError(
                f"Florence-2 cannot answer with the label {label!r:.80}: it must be ASCII, at most {LONGEST_LABEL} characters, without '<',"
                " line breaks or space around it."
            )
    bins = processor.post_processor.quantize(torch.tensor(boxes, dtype=torch.float32).view(-1, 4), size)
    bins = (bins // location_step * location_step + location_step // 2).clamp(max=999)
    # Sorted as written, not in pixels: the order is then a function of what the model can see in its own answer.
    objects = sorted(zip(bins.tolist(), labels, strict=True))
    return "".join(label + "".join(f"<loc_{number}>" for number in corners) for corners, label in objects)


def read_answer(text: str, size: tuple[int, int]) -> tuple[list[list[float]], list[str]]:
    """Read an answer that is data to learn from: what [`answer_text`] writes, or a label before several boxes.

    Args:
        text (`str`): The whole answer, `name<loc_1><loc_2><loc_3><loc_4>...`.
        size (`tuple[int, int]`): Width and height of the image.

    Returns:
        `tuple[list[list[float]], list[str]]`: `[N, 4]` boxes, xyxy in pixels, the middles of their bins; and N labels.

    Raises:
        `ValueError`: If a part of it is no such object, or its corners are swapped.

    Example:

    ```python
    >>> read_answer("dog<loc_0><loc_499><loc_999><loc_999>", (1000, 1000))
    ([[0.5, 499.5, 999.5, 999.5]], ['dog'])

    ```
    """
    if left := _ANSWER.sub("", text):
        raise ValueError(f"{left.strip()!r:.80} is no name with four locations from <loc_0> to <loc_999>")
    boxes, labels = [], []
    for label, locations in _ANSWER.findall(text):
        bins = [int(number) for number in re.findall(r"\d+", locations)]
        for left, top, right, bottom in zip(*(bins[corner::4] for corner in range(4)), strict=True):
            if left > right or top > bottom:
                raise ValueError(f"{label.strip()!r:.80} has swapped corners: {left}, {top}, {right}, {bottom}")
            corners = zip((left, top, right, bottom), (*size, *size), strict=True)
            boxes.append([(number + 0.5) / 1000 * length for number, length in corners])
            labels.append(label.strip())
    return boxes, labels


def parse_answer(tokens: Sequence[int], log_probs: Sequence[float], size: tuple[int, int], processor: Any) -> dict[str, Any]:
    """Read one generated answer.

    Label and boxes are what the processor's own `post_process_generation` reads, one phrase at a time: so the tokens behind each box are
    known, and a malformed object does not spoil the label of the next.

    Args:
        tokens (`Sequence[int]`): Generated tokens, without the decoder's start token; what follows EOS is not read.
        log_probs (`Sequence[float]`): The log-probability of each.
        size (`tuple[int, int]`): Width and height of the image.
        processor (`Florence2Processor`): The model's processor.

    Returns:
        `dict`: `boxes` (`Tensor` `[N, 4]`, xyxy in pixels), `labels` (`list[str]`) and `scores` (`Tensor` `[N]`): the geometric mean of
        the probabilities of an object's label tokens and four location tokens. Objects without a label, with fewer than four locations or
        with swapped corners are left out.
    """
    tokenizer = processor.tokenizer
    end = tokens.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in tokens else len(tokens)
    pieces = tokenizer.convert_ids_to_tokens(tokens[:end])
    # A vocabulary that is padded to a round number has rows that stand for no token.
    spoken = [at for at in range(end) if tokens[at] != tokenizer.bos_token_id and pieces[at] is not None]
    bins, labels, scores = [], [], []
    phrase: list[int] = []
    for is_location, group in groupby(spoken, key=lambda at: bool(re.fullmatch(r"<loc_\d{1,3}>", pieces[at]))):
        if not is_location:
            phrase = list(group)
            continue
        # No label holds a `<`; where one does, or is absent, the processor's pattern would take its start from inside the first location.
        if not phrase or any("<" in pieces[at] for at in phrase) or sum(len(pieces[at]) for at in phrase) > LONGEST_LABEL:
            continue
        locations = list(group)
        # In an image of 1000 x 1000 a coordinate is the number of its bin; in the real one it would be rounded to whole pixels.
        sequence = [tokens[at] for at in phrase + locations]
        answer = processor.post_process_generation(sequence=sequence, task="<OD>", image_size=(1000, 1000))["<OD>"]
        for index, (corners, label) in enumerate(zip(answer["bboxes"], answer["labels"], strict=True)):
            if corners[0] <= corners[2] and corners[1] <= corners[3]:
                own = phrase + locations[4 * index : 4 * index + 4]
                bins.append(corners)
                labels.append(label)
                scores.append(math.exp(sum(log_probs[at] for at in own) / len(own)))
    width, height = size
    boxes = (torch.tensor(bins, dtype=torch.float32).view(-1, 4) + 0.5) / 1000 * torch.tensor([width, height, width, height])
    return {"boxes": boxes, "labels": labels, "scores": torch.tensor(scores)}
