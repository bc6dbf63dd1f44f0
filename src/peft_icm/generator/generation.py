"""What a generator does with a task: text, examples or pictures -> task vector -> adapter on a base model."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from ..adapters.attach import attach, check_name, unchanged_on_failure
from ..adapters.tensors import all_finite, groups
from ..conditioning import Picture, open_images
from ..conditioning.spelling import respell
from ..disk import MAX_NAME_BYTES
from ..unknown import OnUnknown, check_request
from .belongings import BelongingsMixin
from .requests import RequestsMixin, TaskInputs, scaled
from .sampling import Generators, as_conditions
from .statistics import Statistics


class AdapterMixin(BelongingsMixin, RequestsMixin):
    """The side of [`ICMGenerator`] that meets its users."""

    sample: Callable[..., Tensor]
    statistics: Statistics
    _draw: Callable[..., tuple[Tensor, Tensor]]
    _writer: Callable[..., Callable[[int, Tensor], Tensor]]

    # ------------------------------------------------------------------ conditions
    def task_vector(
        self,
        text: str | None = None,
        *,
        examples: Sequence[str] | None = None,
        images: Sequence[Picture] | None = None,
        task_vector: Tensor | None = None,
    ) -> Tensor:
        """The task vector of a sentence, of pictures, of both, of examples of the task, or a vector as it is.

        Args:
            text (`str`, *optional*): A sentence, for encoders that read text.
            examples (`Sequence[str]`, *optional*): Examples of the task, whose states are averaged (Eq. 1).
            images (`Sequence[PIL.Image.Image, str or Path]`, *optional*): Pictures of the task or their paths, whose vectors are
                averaged; beside a text, the two means are averaged.
            task_vector (`Tensor`, *optional*): `[d]`, returned as it is.

        Returns:
            `Tensor`: `[d]` fp32.

        Raises:
            `ValueError`: If nothing is given, or something that this generator's encoder does not read, or a task vector that is none.
        """
        arguments = {"text": text, "examples": examples, "images": images, "task_vector": task_vector}
        given = [name for name, value in arguments.items() if value is not None]
        if given == ["task_vector"]:
            vector = as_conditions(task_vector, 1, 0.0, self.config.condition_dim)  # type: ignore[arg-type]
            if len(vector) != 1:
                raise ValueError(f"Expected one task vector of shape ({self.config.condition_dim},), found {len(vector)} rows.")
            return vector[0]
        reads = self.encoder.accepts
        if not given or not set(given) <= set(reads):
            raise ValueError(
                f"Pass what this generator's {self.encoder.kind} encoder reads, {' and/or '.join(f'{name}=' for name in reads)}, or"
                f" task_vector= alone; found {' and '.join(f'{name}=' for name in given) or 'none of them'}."
            )
        vectors = []
        if text is not None:
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"text={text!r} must be a non-empty sentence, such as 'detect sofas'.")
            vectors.append(self._vector_of(respell(text, self.config.words or (), self.encoder)))
        if examples is not None:
            if isinstance(examples, str) or not examples:
                raise ValueError(f"examples={examples!r} must be a non-empty list of strings.")
            vectors.append(self.encoder.average(self.encoder.read("examples", examples)))
        if images is not None:
            vectors.append(self.encoder.average(self.encoder.read("images", open_images(images))))
        return vectors[0] if len(vectors) == 1 else self.encoder.average(torch.stack(vectors))

    def _vector_of(self, sentence: str) -> Tensor:
        encoder, kept = self.encoder, self._lazy["sentences"]
        vector = kept.get(sentence)
        if vector is None:
            vector = kept[sentence] = encoder.read("text", [sentence])[0]
        return vector.clone()

    # ------------------------------------------------------------------ adapters
    def generate_state_dict(
        self,
        text: str | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        on_unknown: OnUnknown = "warn",
        strength: float = 1.0,
        **task: Unpack[TaskInputs],
    ) -> dict[str, Tensor]:
        """Generate the tensors of one adapter; no base model is needed.

        Args:
            text (`str`, *optional*): What the adapter is for, e.g. `"detect sofas"`.
            temperature (`float`, defaults to 1.0): See [`~ICMGenerator.sample`].
            generator (`torch.Generator`, *optional*): Source of z.
            on_unknown (`str`, defaults to `"warn"`): What a request gets that is less familiar than the generator's threshold: `"warn"` the
                adapter of the nearest task and a warning, `"base"` an adapter that does nothing, `"raise"` an error; `"shrink"` scales
                every adapter by what its reading is worth ([`Reading.worth`]). Taken as it is: a `task_vector`, and whatever
                [`~ICMGenerator.can_read`] is false of.
            strength (`float`, defaults to 1.0): Factor on dW = B A: 0 is the base, 1 the adapter as generated.
            **task: `examples`, `images` or `task_vector`: see [`~ICMGenerator.task_vector`].

        Returns:
            `dict[str, Tensor]`: Keys and shapes of the layout, on the CPU, as `peft.set_peft_model_state_dict` takes them.

        Raises:
            `ValueError`: If the input is not what the encoder reads, temperature, generator, on_unknown or strength is none, the adapter is
                not finite, or the request is unknown and `on_unknown` is `"raise"` ([`UnknownTaskError`]).
        """
        return self._generate(text, temperature, generator, on_unknown, strength, task)[0]

    def _generate(
        self,
        text: str | None,
        temperature: float,
        generator: torch.Generator | None,
        on_unknown: str,
        strength: float,
        task: TaskInputs,
    ) -> tuple[dict[str, Tensor], float]:
        """The tensors of one adapter, and by what its dW was multiplied."""
        check_request(on_unknown, strength)
        if isinstance(generator, Sequence):
            raise ValueError(f"generator={generator!r} must be one torch.Generator: one adapter is generated.")
        condition = self.task_vector(text, **task)
        if task.get("task_vector") is None:
            condition, strength = self._answer(condition, text, on_unknown, strength, **task)
        return self._tensors(self._draw(condition, 1, generator, temperature), strength), strength

    @torch.inference_mode(False)  # as attach's _fill, whose parameters these tensors become
    @torch.no_grad()
    def _tensors(self, drawn: tuple[Tensor, Tensor], strength: float) -> dict[str, Tensor]:
        """The one adapter of what `_draw` gave for it: its tensors are decoded in turn, and it is never whole beside them."""
        layout, sizes, device, first = self.layout, self.layout.sizes, self.statistics.mean.device, 0
        write = self._writer(*drawn)
        found: dict[str, Tensor] = {}
        for group in groups(sizes):
            count = sum(sizes[group])
            part = write(first, torch.empty(1, count, device=device))[0]
            if not all_finite(part, layout.torch_dtype):
                raise ValueError(f"The generated adapter holds NaN or infinite values in {layout.dtype}: lower the temperature.")
            own = {"copy": count > sizes[group.start]}  # each tensor in memory of its own
            parts = (values.to("cpu", layout.torch_dtype, **own) for values in part.split(sizes[group]))
            named = zip(layout.keys[group], layout.shapes[group], parts, strict=True)
            found |= scaled({key: values.view(shape) for key, shape, values in named}, strength)
            first += count
        return found

    def generate_adapter(
        self,
        text: str | None = None,
        base_model: str | os.PathLike[str] | PreTrainedModel | PeftModel | None = None,
        *,
        adapter_name: str = "default",
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        on_unknown: OnUnknown = "warn",
        strength: float = 1.0,
        is_trainable: bool = False,
        base_model_kwargs: Mapping[str, Any] | None = None,
        **task: Unpack[TaskInputs],
    ) -> PeftModel:
        """Generate one adapter and put it onto its base model.

        Args:
            text (`str`, *optional*): What the adapter is for, e.g. `"detect sofas"`.
            base_model (`str`, `Path`, `PreTrainedModel` or `PeftModel`, *optional*): `None` loads the base that the generator was
                trained for, once; every call gives a model of its own on the same memory, until something is written to (a merge gets
                its own copy of what it changes). An id or folder is loaded. A `PreTrainedModel` is wrapped in place. On a `PeftModel`
                the named adapter is added, or swapped where it is there.
            adapter_name (`str`, defaults to `"default"`): Name of the adapter.
            temperature (`float`, defaults to 1.0): Standard deviation of z.
            generator (`torch.Generator`, *optional*): Source of z, for a seed.
            on_unknown (`str`, defaults to `"warn"`): What a request gets that is less familiar than the generator's threshold: `"warn"` the
                adapter of the nearest task and a warning, `"base"` an adapter that does nothing, `"raise"` an error; `"shrink"` scales
                every adapter by what its reading is worth ([`Reading.worth`]). Taken as it is: a `task_vector`, and whatever
                [`~ICMGenerator.can_read`] is false of.
            strength (`float`, defaults to 1.0): Factor on dW = B A: 0 is the base, 1 the adapter as generated.
            is_trainable (`bool`, defaults to `False`): Leave the adapter trainable and in train mode.
            base_model_kwargs (`Mapping`, *optional*): For the base's `from_pretrained` (`dtype`, `device_map`, ...).
            **task: `examples`, `images` or `task_vector`: see [`~ICMGenerator.task_vector`].

        Returns:
            `PeftModel`: A native one, in eval mode unless `is_trainable`.

        Raises:
            `ValueError`: If the input is not what the encoder reads, the base does not fit the layout, or the request is unknown and
                `on_unknown` is `"raise"` ([`UnknownTaskError`]).
        """
        check_name(adapter_name, self.layout)
        state_dict, factor = self._generate(text, temperature, generator, on_unknown, strength, task)
        model = self._base_for(base_model, base_model_kwargs)
        facts = self._facts(text, temperature, generator, factor, task.get("images"))
        options: Any = {"adapter_name": adapter_name, "is_trainable": is_trainable, "provenance": facts}
        return attach(model, self.layout, state_dict, **options, copy=False)

    def generate_adapters(
        self,
        texts: Sequence[str],
        base_model: str | os.PathLike[str] | PreTrainedModel | PeftModel | None = None,
        *,
        adapter_names: Sequence[str] | None = None,
        temperature: float = 1.0,
        generator: Generators = None,
        on_unknown: OnUnknown = "warn",
        strength: float = 1.0,
        is_trainable: bool = False,
        base_model_kwargs: Mapping[str, Any] | None = None,
    ) -> PeftModel:
        """Generate many named adapters onto one model; the first is active.

        Args:
            texts (`Sequence[str]`): One sentence for each adapter.
            base_model: See [`~ICMGenerator.generate_adapter`].
            adapter_names (`Sequence[str]`, *optional*): Their names; by default the words of the text, joined by `_`.
            temperature (`float`, defaults to 1.0): Standard deviation of z.
            generator (`torch.Generator` or a list of them, *optional*): One for all, or one for each adapter.
            on_unknown (`str`, defaults to `"warn"`): For each of them: see [`~ICMGenerator.generate_adapter`].
            strength (`float`, defaults to 1.0): Factor on dW of all of them.
            is_trainable (`bool`, defaults to `False`): Leave the adapters trainable.
            base_model_kwargs (`Mapping`, *optional*): For the base's `from_pretrained`.

        Returns:
            `PeftModel`: The model that carries all of them.

        Raises:
            `ValueError`: If `texts` is empty or a string, the names are not as many as the texts and all different, or one of them can't
                be attached; the model has none of the new ones then.
        """
        if isinstance(texts, str) or not texts:
            raise ValueError(f"texts={texts!r} must be a non-empty list of sentences.")
        if isinstance(adapter_names, str):
            raise ValueError(f"adapter_names={adapter_names!r} must be a list of names.")
        names = [check_name(name, self.layout) for name in adapter_names or map(_words, texts)]
        if len(names) != len(texts) or len(set(names)) != len(names):
            raise ValueError(f"Expected {len(texts)} different adapter names, found {names}.")
        check_request(on_unknown, strength)
        vectors, strengths = zip(*[self._answer(self.task_vector(text), text, on_unknown, strength) for text in texts], strict=True)
        drawn = zip(*(rows.split(1) for rows in self._draw(torch.stack(vectors), 1, generator, temperature)), strict=True)
        model = self._base_for(base_model, base_model_kwargs)
        generators = generator if isinstance(generator, Sequence) else [generator] * len(names)
        with unchanged_on_failure(model):
            for name, text, own, source, factor in zip(names, texts, drawn, generators, strengths, strict=True):
                model = attach(
                    model,
                    self.layout,
                    self._tensors(own, factor),
                    adapter_name=name,
                    is_trainable=is_trainable,
                    provenance=self._facts(text, temperature, source, factor),
                    copy=False,
                )
        assert isinstance(model, PeftModel)
        model.set_adapter(names[0], inference_mode=not is_trainable)
        return model

    def _facts(
        self,
        text: str | None,
        temperature: float,
        generator: torch.Generator | None,
        strength: float,
        images: Sequence[Picture] | None = None,
    ) -> dict[str, Any]:
        return {
            "generator": self._source.get("name"),
            "text": text,
            "images": len(images) if images is not None else None,
            "seed": generator.initial_seed() if generator is not None else None,
            "temperature": temperature,
            "strength": strength if strength != 1 else None,  # of an adapter as it was decoded nothing is said
        }


def _words(text: str) -> str:
    """The words of a text, joined by `_`, as the name of an adapter."""
    words = re.sub(r"\W+", "_", str(text)).strip("_").encode()
    return words[:MAX_NAME_BYTES].decode(errors="ignore")
