"""Few examples, the generator as the prior: from a generated adapter to one that has seen examples too."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Unpack

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..adapters.attach import attach
from ..adapters.examples import collate, example_losses
from ..adapters.per_sample import PerSampleLora
from .generation import AdapterMixin
from .networks import DirectNetwork
from .requests import TaskInputs

FLOOR = 0.05  # of the root mean square of the deviations: no number is held for good
CONDITION_RATE = 10.0  # learning rate of task vector and z, as a multiple of that of the adapter
FOLDS = 4  # parts of the examples that are left out in turn, to tell when to stop
EVALUATIONS = 12  # in the course of a run


class PriorFit(nn.Module):
    r"""Adapters `w_f = decode(z_f, v_f) + d_f` of several folds at once, each trained on the examples outside its own.

    The loss of a fold with n examples is the base's nats per token and the prior's

    `weight / 2n (mean(d^2 / sigma^2) + mean((v - v_0)^2) + mean(z^2))`,

    with sigma the spread of generated adapters ([`DirectNetwork.deviations`], floored), v_0 the normalised task vector that was asked for.
    The means are over numbers, so that one weight serves adapters of any size.

    Args:
        generator ([`ICMGenerator`]): Of a `"direct"` network.
        base (`PreTrainedModel`): That the examples are for; lent, and in eval mode.
        lora ([`PerSampleLora`]): On it.
        condition (`Tensor`): `[d]` task vector.
        counts (`Tensor`): `[F]` examples that each fold is trained on.
        weight (`float`): Of the prior.
    """

    start: Tensor
    sigma: Tensor
    counts: Tensor

    def __init__(self, generator: Any, base: Any, lora: PerSampleLora, condition: Tensor, counts: Tensor, weight: float):
        super().__init__()
        self._lent = (generator, base, lora)  # a tuple, so that they are no submodules
        folds = len(counts)
        with torch.no_grad():
            start = generator.normalize_condition(condition[None]).float()
            _, units = generator.statistics.spread()
            deviations = generator.network.deviations().float() * units
        sigma = deviations.clamp(min=FLOOR * float(deviations.square().mean().sqrt()))
        for name, value in (("start", start), ("sigma", sigma), ("counts", counts.float())):
            self.register_buffer(name, value)
        self.condition = nn.Parameter(start.repeat(folds, 1))
        self.latent = nn.Parameter(torch.zeros(folds, generator.config.latent_size))
        self.change = nn.Parameter(torch.zeros(folds, generator.layout.numel))
        self.weight = weight

    def adapters(self) -> Tensor:
        """`[F, P]`, in their own units."""
        generator, _, _ = self._lent
        decoded = generator.network.decode(self.latent, self.condition)
        return generator.statistics.denormalize(decoded) + self.change

    def forward(self, fold: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        """`{"loss", "nats", "tokens"}` of a batch of examples, each under the adapter of its fold `[B]`."""
        _, base, lora = self._lent
        lora.use(self.adapters()[fold])
        nats, tokens = example_losses(base, inputs)
        each = torch.zeros(len(self.counts), device=nats.device)
        fit = each.index_add(0, fold, nats) / each.index_add(0, fold, tokens.float()).clamp(min=1)
        away = (self.change / self.sigma).square().mean(1) + (self.condition - self.start).square().mean(1) + self.latent.square().mean(1)
        loss = (fit + self.weight * away / (2 * self.counts)).sum()
        return {"loss": loss, "nats": nats.detach(), "tokens": tokens}


class FoldExamples(Dataset[dict[str, Tensor]]):
    """Pairs of a fold and an example, as a list says."""

    def __init__(self, examples: Sequence[Mapping[str, Tensor]], pairs: Sequence[tuple[int, int]]):
        self.examples, self.pairs = examples, pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        fold, example = self.pairs[index]
        return {**self.examples[example], "fold": torch.tensor(fold)}


class KeepAdapters(TrainerCallback):
    """Keeps, at each evaluation, the loss on what the folds left out and the adapter that saw everything."""

    def __init__(self, fit: PriorFit):
        self.fit = fit
        self.losses: list[float] = []
        self.adapters: list[Tensor] = []

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called after each evaluation."""
        self.losses.append(kwargs["metrics"]["eval_nats_per_token"])
        self.adapters.append(self.fit.adapters()[-1].detach().clone())


def fit_examples(
    generator: Any,
    base: Any,
    condition: Tensor,
    examples: Sequence[Mapping[str, Tensor]],
    *,
    steps: int,
    learning_rate: float,
    prior_weight: float,
    seed: int,
    progress: bool,
) -> tuple[Tensor, list[float]]:
    """An adapter from a task vector and examples.

    The examples are left out in four parts in turn, or one by one where there are fewer; all folds, and one that sees everything, are
    trained together. What the folds do on what they have not seen tells when to stop; not to start is among the choices.

    Args:
        generator ([`ICMGenerator`]): Of a `"direct"` network.
        base (`PreTrainedModel`): Lent.
        condition (`Tensor`): `[d]` task vector.
        examples (`Sequence[dict[str, Tensor]]`): At least two, as the base takes them.
        steps (`int`): At the most.
        learning_rate (`float`): Of the adapter.
        prior_weight (`float`): See [`PriorFit`].
        seed (`int`): Of the order of the examples.
        progress (`bool`): Show a progress bar.

    Returns:
        `tuple[Tensor, list[float]]`: The adapter `[P]`, and the nats per token of what was left out, at the start and after each twelfth
        of the steps.
    """
    count = len(examples)
    folds = min(count, FOLDS)
    draw = torch.Generator().manual_seed(seed)
    part = torch.randperm(count, generator=draw) % folds
    seen = [torch.nonzero(part != fold)[:, 0] for fold in range(folds)] + [torch.arange(count)]
    batch = min(16, count)
    pairs = []
    for _ in range(steps):
        for fold, own in enumerate(seen):
            pairs += [(fold, int(own[index])) for index in torch.randint(len(own), (batch,), generator=draw)]
    left_out = [(int(part[example]), example) for example in range(count)]
    with PerSampleLora(base, generator.layout) as lora, tempfile.TemporaryDirectory() as scratch, _frozen(generator.network):
        counts = torch.tensor([len(own) for own in seen])
        fit = PriorFit(generator, base, lora, condition, counts, prior_weight).to(base.device)
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=batch * len(seen),
            per_device_eval_batch_size=64,
            eval_strategy="steps",
            eval_steps=max(1, steps // EVALUATIONS),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            disable_tqdm=not progress,
            max_grad_norm=1.0,
            seed=seed,
            use_cpu=base.device.type == "cpu",
        )
        groups = [
            {"params": [fit.change], "lr": learning_rate},
            {"params": [fit.condition, fit.latent], "lr": CONDITION_RATE * learning_rate},
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
        keep = KeepAdapters(fit)
        trainer = _InOrder(
            model=fit,
            args=arguments,
            data_collator=collate,
            train_dataset=FoldExamples(examples, pairs),
            eval_dataset=FoldExamples(examples, left_out),
            optimizers=(optimizer, schedule),
            compute_metrics=_nats_per_token,
            callbacks=[keep],
        )
        trainer.remove_callback(PrinterCallback)
        if not progress:
            trainer.remove_callback(ProgressCallback)
        trainer.evaluate()
        trainer.train()
    best = min(range(len(keep.losses)), key=keep.losses.__getitem__)
    return keep.adapters[best].cpu(), keep.losses


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Its weights take no gradients meanwhile."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    network.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()


class _InOrder(Trainer):
    """The pairs are in their order already: each step has as many of every fold."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)  # type: ignore[arg-type]

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> tuple[Any, Any, Any]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            outputs = model(**inputs)
        return outputs["loss"], outputs["nats"], outputs["tokens"]


def _nats_per_token(prediction: Any) -> dict[str, float]:
    return {"nats_per_token": float(prediction.predictions.sum() / prediction.label_ids.sum())}


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
        is kept where no step is better. Nothing is there to be tuned for a task: `prior_weight` is the generator's own.

        Args:
            text (`str`, *optional*): What the adapter is for.
            base_model: See [`~ICMGenerator.generate_adapter`].
            labelled (`Sequence[Mapping[str, Tensor]]`, *optional*): At least two examples as the base takes them, with `labels`: what a
                task's `train_dataset(processor)` returns. Without any, this is [`~ICMGenerator.generate_adapter`].
            steps (`int`, defaults to 120): Steps of 16 examples, at the most.
            learning_rate (`float`, defaults to 3e-3): Peak.
            prior_weight (`float`, *optional*): Of the prior; by default that which was fitted on tasks left out of the training.
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
