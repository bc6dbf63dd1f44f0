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
from ..adapters.base import check_bare
from .generation import AdapterMixin
from .networks import DirectNetwork
from .requests import TaskInputs

FOLDS, FOLD_BATCH = 4, 8  # parts of the examples that are left out in turn, to tell when to stop; examples in their steps
STRENGTHS = (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)


class AdaptingMixin(AdapterMixin):
    """The side of [`ICMGenerator`] that learns from a user's examples."""

    network: Any

    def adapt(
        self,
        text: str | None = None,
        base_model: str | os.PathLike[str] | PreTrainedModel | PeftModel | None = None,
        *,
        labelled: Sequence[Mapping[str, Tensor]] | None = None,
        steps: int = 60,
        learning_rate: float = 3e-3,
        prior_weight: float | None = None,
        seed: int = 0,
        progress: bool = False,
        adapter_name: str = "default",
        is_trainable: bool = False,
        **task: Unpack[TaskInputs],
    ) -> PeftModel:
        """Generate an adapter and let it learn from a few labelled examples, with the generator as the prior.

        The generated adapter is the start and the mean of the prior, the spread of the adapters of other tasks its standard deviation. A
        part of the examples is left out in turn, to tell when to stop, and the start is kept where no step is better on what was left out.

        Args:
            text (`str`, *optional*): What the adapter is for.
            base_model: See [`~ICMGenerator.generate_adapter`].
            labelled (`Sequence[Mapping[str, Tensor]]`, *optional*): At least two examples as the base takes them, with `labels`: what a
                task's `train_dataset(processor)` returns. Without any, this is [`~ICMGenerator.generate_adapter`].
            steps (`int`, defaults to 60): Steps of 16 examples, at the most.
            learning_rate (`float`, defaults to 3e-3): Peak.
            prior_weight (`float`, *optional*): Of the prior; by default the generator's own, `network.prior_strength`, which
                [`~ICMGenerator.fit_prior`] fits.
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
            return self.generate_adapter(text, base_model, generator=draw, adapter_name=adapter_name, is_trainable=is_trainable, **task)
        if len(labelled) < 2:
            raise ValueError(f"labelled= has {len(labelled)} examples: two at least are needed, to learn from one and tell by the other.")
        fitted = self._prior_weight()
        weight = fitted if prior_weight is None else prior_weight
        if not weight >= 0 or steps < 1:
            raise ValueError(f"prior_weight={weight} must not be negative, and steps={steps} at least 1.")
        base = self._lent_base(base_model)
        start = self.sample(self.task_vector(text, **task), temperature=0.0)[0].detach()
        from .prior_fit import Run, fit_runs  # the Trainer, which generating alone needs not

        examples = [labelled[index] for index in range(len(labelled))]
        sees = "image" in base.input_modalities
        for index, example in enumerate(examples):
            if ("pixel_values" in example) != sees and not (sees and "images" not in self.encoder.accepts):
                raise ValueError(
                    f"labelled[{index}] has {', '.join(example)}, and a {type(base).__name__} reads"
                    f" {'pictures' if sees else 'text alone'}: make it with its own processor."
                )
        part = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)) % FOLDS
        folds = [
            Run(torch.nonzero(part != fold)[:, 0].tolist(), torch.nonzero(part == fold)[:, 0].tolist(), weight, batch=FOLD_BATCH)
            for fold in range(min(FOLDS, len(examples)))
        ]
        everything = Run(list(range(len(examples))), [], weight)
        options: Any = {"steps": steps, "learning_rate": learning_rate, "seed": seed, "progress": progress}
        nats, adapters = fit_runs(self, base, start, examples, [*folds, everything], **options)
        adapter = adapters[nats.sum(1).argmin()]
        facts = {**self._facts(text, 0.0, None, 1.0, task.get("images")), "examples": len(labelled), "seed": seed}
        state_dict = self.layout.unflatten(adapter.cpu())
        return attach(base, self.layout, state_dict, adapter_name=adapter_name, is_trainable=is_trainable, provenance=facts)

    def fit_prior(
        self,
        held_out: Sequence[tuple[Tensor, Sequence[Mapping[str, Tensor]], Sequence[Mapping[str, Tensor]]]],
        base_model: str | os.PathLike[str] | PreTrainedModel | None = None,
        *,
        counts: Sequence[int] = (4, 16, 64),
        strengths: Sequence[float] = STRENGTHS,
        steps: int = 60,
        learning_rate: float = 3e-3,
        seed: int = 0,
        progress: bool = False,
    ) -> dict[float, float]:
        """Fit the weight that [`~ICMGenerator.adapt`] gives the generator as a prior, on tasks that nothing was trained on.

        For each task an adapter is fitted to the first so many of its examples under each weight, all steps of it, and scored on others.
        The weight whose adapters gain most is kept in `network.prior_strength`.

        Args:
            held_out (`Sequence[tuple[Tensor, Sequence[Mapping], Sequence[Mapping]]]`): Of each task its task vector `[d]`, the labelled
                examples that are learnt from, and those that tell: as far from the former as what users ask of an adapter is from their
                examples, of other documents for instance.
            base_model: See [`~ICMGenerator.generate_adapter`].
            counts (`Sequence[int]`, defaults to `(4, 16, 64)`): Examples that are learnt from.
            strengths (`Sequence[float]`): Weights to choose from; by default from 10 to 3000.
            steps, learning_rate, seed, progress: See [`~ICMGenerator.adapt`].

        Returns:
            `dict[float, float]`: Of each weight the gain over the generated adapter, in nats per example, the mean over tasks and counts.

        Raises:
            `ValueError`: As [`~ICMGenerator.adapt`], or if a task has too few examples.
        """
        self._prior_weight()
        base = self._lent_base(base_model)
        from .prior_fit import Run, fit_runs

        gains = []
        for vector, examples, others in held_out:
            if len(examples) < max(counts) or not len(others):
                raise ValueError(f"A task has {len(examples)} examples and {len(others)} others: {max(counts)} and 1 are needed.")
            start = self.sample(vector, temperature=0.0)[0].detach()
            rows = [part[index] for part in (examples, others) for index in range(len(part))]
            left_out = list(range(len(examples), len(rows)))
            for count in counts:
                runs = [Run(list(range(count)), left_out, strength) for strength in strengths]
                options: Any = {"steps": steps, "learning_rate": learning_rate, "seed": seed, "progress": progress}
                nats, _ = fit_runs(self, base, start, rows, runs, **options)
                gains.append((nats[0] - nats[-1]) / len(runs[0].left_out))
        mean = torch.stack(gains).mean(0)
        self.network.prior_strength.fill_(strengths[int(mean.argmax())])
        return dict(zip(strengths, mean.tolist(), strict=True))

    def _prior_weight(self) -> float:
        if not isinstance(self.network, DirectNetwork) or not self.network.spread.any():
            raise ValueError("This generator was not trained with objective='task': it has no prior for examples. Fine-tune its adapters.")
        return float(self.network.prior_strength)

    def _lent_base(self, base_model: Any) -> Any:
        """The base that examples are read with: without adapters, and as it is."""
        model = self._base_for(base_model, None)
        check_bare(model)
        return model.requires_grad_(False).eval()
