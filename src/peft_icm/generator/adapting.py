"""Few examples, the generator as the prior: from a generated adapter to one that has seen examples too."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from ..adapters.attach import attach
from .generation import AdapterMixin
from .networks import DirectNetwork
from .requests import TaskInputs


class AdaptingMixin(AdapterMixin):
    """The side of [`ICMGenerator`] that learns from a user's examples."""

    network: Any

    def adapt(
        self,
        text: str | None = None,
        base_model: str | os.PathLike[str] | PreTrainedModel | PeftModel | None = None,
        *,
        labelled: Sequence[Mapping[str, Tensor]] | None = None,
        steps: int = 120,
        learning_rate: float = 3e-3,
        prior_weight: float | None = None,
        seed: int = 0,
        progress: bool = False,
        adapter_name: str = "default",
        is_trainable: bool = False,
        **task: Unpack[TaskInputs],
    ) -> PeftModel:
        """Generate an adapter and let it learn from a few labelled examples, with the generator as the prior.

        The generated adapter is the start and the mean of the prior, the spread of the adapters of other tasks its standard deviation; task
        vector, z and adapter are fitted to the examples together. A part of them is left out in turn, to tell when to stop, and the start
        is kept where no step is better on what was left out.

        Args:
            text (`str`, *optional*): What the adapter is for.
            base_model: See [`~ICMGenerator.generate_adapter`].
            labelled (`Sequence[Mapping[str, Tensor]]`, *optional*): At least two examples as the base takes them, with `labels`: what a
                task's `train_dataset(processor)` returns. Without any, this is [`~ICMGenerator.generate_adapter`].
            steps (`int`, defaults to 120): Steps of 16 examples, at the most.
            learning_rate (`float`, defaults to 3e-3): Peak.
            prior_weight (`float`, *optional*): Of the prior; by default the generator's own, `network.prior_strength`: 1, as long as nobody
                has fitted it on tasks that were left out of the training.
            seed (`int`, defaults to 0): Of z without examples, and of the order of the examples.
            progress (`bool`, defaults to `False`): Show a progress bar.
            adapter_name (`str`, defaults to `"default"`): Name of the adapter.
            is_trainable (`bool`, defaults to `False`): Leave the adapter trainable and in train mode.
            **task: `examples`, `images` or `task_vector`: see [`~ICMGenerator.task_vector`].

        Returns:
            `PeftModel`: As that of [`~ICMGenerator.generate_adapter`].

        Raises:
            `ValueError`: If there is one example, or one without labels or of another modality, the generator was not trained with
                `objective="task"`, the base carries adapters or does not fit, or a loss is not finite.
        """
        if labelled is None:
            draw = torch.Generator().manual_seed(seed)
            options: Any = {"adapter_name": adapter_name, "is_trainable": is_trainable, **task}
            return self.generate_adapter(text, base_model, generator=draw, **options)
        if not isinstance(self.network, DirectNetwork) or not self.network.spread.any():
            raise ValueError("This generator was not trained with objective='task': it has no prior for examples. Fine-tune its adapters.")
        if len(labelled) < 2:
            raise ValueError(f"labelled= has {len(labelled)} examples: two at least are needed, to learn from one and tell by the other.")
        weight = float(self.network.prior_strength) if prior_weight is None else prior_weight
        if not weight >= 0 or steps < 1:
            raise ValueError(f"prior_weight={weight} must not be negative, and steps={steps} at least 1.")
        model = self._base_for(base_model, None)
        if isinstance(model, PeftModel):
            raise ValueError("base_model carries adapters, merged ones perhaps: pass the base itself, its examples are read without any.")
        condition = self.task_vector(text, **task)
        base: Any = model.requires_grad_(False).eval()
        from .prior_fit import fit_examples  # the Trainer, which generating alone needs not

        adapter, _ = fit_examples(
            self,
            base,
            condition,
            [labelled[index] for index in range(len(labelled))],
            steps=steps,
            learning_rate=learning_rate,
            prior_weight=weight,
            seed=seed,
            progress=progress,
        )
        facts = {**self._facts(text, 0.0, None, 1.0, task.get("images")), "examples": len(labelled), "seed": seed}
        state_dict = self.layout.unflatten(self._finite(adapter[None])[0])
        return attach(base, self.layout, state_dict, adapter_name=adapter_name, is_trainable=is_trainable, provenance=facts)
