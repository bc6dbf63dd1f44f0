"""What a server does with a generator: a sentence becomes an adapter inside a model that runs already."""

from __future__ import annotations

from typing import Unpack

import torch
from transformers import PreTrainedModel

from ..adapters.load_into import load_into
from ..unknown import OnUnknown
from .generation import AdapterMixin
from .requests import TaskInputs


class ServingMixin(AdapterMixin):
    """The side of [`ICMGenerator`] that feeds models which others built."""

    def load_into(
        self,
        model: PreTrainedModel,
        text: str | None = None,
        *,
        adapter_name: str = "default",
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        on_unknown: OnUnknown = "warn",
        strength: float = 1.0,
        **task: Unpack[TaskInputs],
    ) -> None:
        """Generate one adapter and put it into a plain transformers model, without a file; the model stays of its class.

        The first call injects the adapter (transformers' `load_adapter`). Each further one with the same name writes new values in its
        place: a model that was compiled after the first call is not compiled again. The base is frozen, and the model left in eval mode.

        Args:
            model (`PreTrainedModel`): The base. Of a compiled model, the one that was compiled.
            text (`str`, *optional*): What the adapter is for, e.g. `"detect sofas"`.
            adapter_name (`str`, defaults to `"default"`): Name of the adapter, which becomes the active one.
            temperature (`float`, defaults to 1.0): Standard deviation of z.
            generator (`torch.Generator`, *optional*): Source of z, for a seed.
            on_unknown (`str`, defaults to `"warn"`): See [`~ICMGenerator.generate_adapter`].
            strength (`float`, defaults to 1.0): Factor on dW = B A: 0 is the base, 1 the adapter as generated.
            **task: `examples`, `images` or `task_vector`: see [`~ICMGenerator.task_vector`].

        Raises:
            `ValueError`: If the input is not what the encoder reads, the request is unknown and `on_unknown` is `"raise"`
                ([`UnknownTaskError`]), the model does not fit the layout, or what was asked for would do nothing in it: its adapters are
                disabled, or the values are not there after the load. The model is as it was then.

        Example:

        ```python
        >>> from transformers import AutoModelForCausalLM
        >>> from peft_icm import ICMGenerator, bundled_generator
        >>> generator = ICMGenerator.from_pretrained(bundled_generator("text"))
        >>> model = AutoModelForCausalLM.from_pretrained(f"{bundled_generator('text')}/base_model")
        >>> generator.load_into(model, "continue a Shakespeare play")
        >>> generator.load_into(model, "the King James Bible")  # the same name: new values in its place
        >>> type(model).__name__, list(model.peft_config)
        ('LlamaForCausalLM', ['default'])

        ```
        """
        state_dict = self._generate(text, temperature, generator, on_unknown, strength, task)[0]
        load_into(model, self.layout, state_dict, adapter_name=adapter_name)
