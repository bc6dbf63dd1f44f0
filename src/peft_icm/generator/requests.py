"""What a generator makes of a request before it generates: which task it hears, and what to do where it hears none."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from ..conditioning import Picture
from ..unknown import UnknownTaskError, UnknownTaskWarning
from .condition_space import ConditionSpace
from .configuration_icm import ICMConfig
from .reading import Reader, Reading
from .text_reading import TextReader

logger = logging.getLogger(__name__)


class TaskInputs(TypedDict, total=False):
    """What may stand in the place of a text, or beside it; see [`~ICMGenerator.task_vector`].

    Args:
        examples (`Sequence[str]`, *optional*): Examples of the task.
        images (`Sequence[PIL.Image.Image, str or Path]`, *optional*): Pictures of the task, instead of a text or beside it.
        task_vector (`Tensor`, *optional*): `[d]`.
    """

    examples: Sequence[str] | None
    images: Sequence[Picture] | None
    task_vector: Tensor | None


class RequestsMixin:
    """The side of [`ICMGenerator`] that listens."""

    config: ICMConfig
    space: ConditionSpace | None
    reader: Reader | None
    text_reader: TextReader | None
    context: Any
    task_vector: Callable[..., Tensor]
    normalize_condition: Callable[[Tensor], Tensor]
    _lazy: dict[str, Any]

    def read(self, text: str | None = None, **task: Unpack[TaskInputs]) -> Reading:
        """Tell which task is heard in a request, how sure that is, and whether it is one of the generator's at all.

        A generator that was trained through the loss of its tasks tells sentences apart. Pictures and examples it takes for whatever they
        are, of its tasks or not: there is nothing to tell then ([`~ICMGenerator.can_read`]).

        Args:
            text (`str`, *optional*): A sentence.
            **task: `examples`, `images` or `task_vector`: see [`~ICMGenerator.task_vector`].

        Returns:
            [`Reading`]: Without a threshold where the generator has none: it was saved by peft_icm 0.1.0, or trained on one task or
                without a condition space. A warning says so once.

        Raises:
            `ValueError`: If the input is not what the encoder reads, the generator names no tasks, or it tells sentences apart and
                something else is given.

        Example:

        ```python
        >>> from peft_icm import ICMGenerator, bundled_generator
        >>> generator = ICMGenerator.from_pretrained(bundled_generator("text"))
        >>> generator.read("knitting patterns for beginners").known
        False

        ```
        """
        vector = self.task_vector(text, **task)
        if self.hears and not self.can_read(text, **task):
            raise ValueError("This generator tells sentences apart, and takes whatever else it is given as it is: pass text= alone.")
        return self._read(vector)

    @property
    def hears(self) -> bool:
        """Whether there is something to compare a request with: a condition space, a reader of sentences, a context, or one task alone."""
        tasks = self.config.tasks or []
        kept = (self.reader, self.text_reader, self.context)
        return len(tasks) == 1 or (bool(tasks) and any(part is not None for part in kept))

    def can_read(self, text: str | None = None, **task: Unpack[TaskInputs]) -> bool:
        """Whether [`~ICMGenerator.read`] can tell what is meant.

        Args:
            text (`str`, *optional*): A sentence.
            **task: What is given in its place or beside it.

        Returns:
            `bool`: `False` where the generator keeps nothing to compare with, or compares sentences and more than a sentence is given.
        """
        alone = text is not None and all(value is None for value in task.values())
        return self.hears and (self.text_reader is None or alone)

    @torch.no_grad()
    def _read(self, vector: Tensor) -> Reading:
        tasks = self.config.tasks or []
        if not self.hears:
            raise ValueError(
                "This generator names no tasks in its config, or keeps nothing to tell them apart by (condition_space 'none', no context):"
                " it can generate, but it cannot tell what it hears."
            )
        familiarity, threshold = 1.0, None
        reader = self.reader or self.text_reader
        if reader is None:
            probabilities = self._nearest(vector)
        else:
            rows = vector[None].to(reader.threshold.device)
            scores, known = reader(rows) if isinstance(reader, TextReader) else reader(self.space, rows)
            probabilities = scores[0]
            if reader.threshold >= 0:
                familiarity, threshold = float(known[0]), float(reader.threshold)
        if threshold is None and "threshold" not in self._lazy:
            self._lazy["threshold"] = None
            logger.warning(
                "This generator has no threshold (saved by peft_icm 0.1.0, or trained on one task, with condition_space 'none' or on"
                " too few sentences): it takes any request for known."
            )
        order = probabilities.argsort(descending=True).tolist()
        return Reading(
            tasks={tasks[index]["name"]: float(probabilities[index]) for index in order},
            familiarity=familiarity,
            threshold=threshold,
            description=tasks[order[0]].get("description") or tasks[order[0]]["name"],
        )

    def _nearest(self, vector: Tensor) -> Tensor:
        """`[T]` probabilities by the distances to the tasks' vectors in the context; of one task, 1."""
        if self.context is None:
            return torch.ones(1)
        distances = (self.context.conditions.float() - self.normalize_condition(vector[None]).float()).square().sum(1)
        return (-distances / distances.mean().clamp(min=1e-12) * 4).softmax(0)

    @property
    def _shown(self) -> str:
        """What helps a generator that tells sentences apart with a task it does not know; nothing where its encoder has no part for it."""
        parts = (self.config.encoder or {}).get("parts", {}) if self.text_reader is not None else {}
        others = {"examples": "examples of it (examples=)", "images": "pictures of it (images=)"}
        return " or ".join(words for name, words in others.items() if name in parts)

    def _answer(
        self, vector: Tensor, text: str | None, on_unknown: str, strength: float, **task: Unpack[TaskInputs]
    ) -> tuple[Tensor, float]:
        """The task vector that a request is answered with, and the factor on dW; warns or raises as `on_unknown` says."""
        mute = self.reader is None and self.text_reader is None
        if not self.can_read(text, **task) or (mute and on_unknown == "warn"):
            return vector, strength
        reading = self._read(vector)
        if self.reader is not None and self.space is not None:
            vector = self.reader.settle(self.space, vector[None].to(self.reader.means.device))[0]
        request = f"{text[:80]!r}" if text is not None else "This request"
        nearest = f"{reading.task} ({reading.description!r}, {reading.confidence:.2f})"
        heard = f"{request} is none of this generator's tasks: the nearest is {nearest}"
        if on_unknown == "shrink":
            return vector, strength * reading.worth
        if reading.known:
            return vector, strength
        if on_unknown == "raise":
            instead = f", show it {self._shown}" if self._shown else ""
            raise UnknownTaskError(f"{heard}. Ask for one of its tasks{instead}, or pass on_unknown='warn', 'shrink' or 'base'.")
        if on_unknown == "base":
            return vector, 0.0
        instead = f"Show it {self._shown}: from these it makes adapters for other tasks too. " if self._shown else ""
        warnings.warn(
            f"{heard}, and its adapter may do harm. {instead}on_unknown= 'shrink', 'base' or 'raise' do something else.",
            UnknownTaskWarning,
            stacklevel=4,
        )
        return vector, strength


def scaled(state_dict: Mapping[str, Tensor], strength: float) -> dict[str, Tensor]:
    """An adapter whose dW = B A is multiplied by a number: all of its B are.

    Args:
        state_dict (`Mapping[str, Tensor]`): Of a LoRA.
        strength (`float`): Factor.

    Returns:
        `dict[str, Tensor]`: With tensors of its own only where the number is not 1.
    """
    if strength == 1:
        return dict(state_dict)
    return {key: tensor * strength if ".lora_B" in key or ".lora_embedding_B" in key else tensor for key, tensor in state_dict.items()}
