"""The fit of an adapter to a few examples, under the generator as its prior."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..adapters.examples import collate, example_losses
from ..adapters.per_sample import PerSampleLora

FLOOR = 0.05  # of the root mean square of the deviations: no number is held for good
CONDITION_RATE = 10.0  # learning rate of task vector and z, as a multiple of that of the adapter
FOLDS = 4  # parts of the examples that are left out in turn, to tell when to stop
BATCH = 16  # examples in a step; of those that only tell when to stop half as many
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
        decoded = generator.network.decode(self.latent.to(generator.dtype), self.condition.to(generator.dtype))
        return generator.statistics.denormalize(decoded) + self.change

    def forward(self, fold: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        """`{"loss", "nats", "tokens"}` of a batch of examples, each under the adapter of its fold `[B]`."""
        _, base, lora = self._lent
        lora.use(self.adapters()[fold])
        nats, tokens = example_losses(base, inputs)
        if not nats.detach().isfinite().all():
            raise ValueError("The loss of a labelled example is not finite: lower learning_rate, or look for NaN in the examples.")
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
    sizes = [min(BATCH if fold == folds else BATCH // 2, len(own)) for fold, own in enumerate(seen)]
    pairs = []
    for _ in range(steps):
        for fold, own in enumerate(seen):
            pairs += [(fold, int(own[index])) for index in torch.randperm(len(own), generator=draw)[: sizes[fold]]]
    left_out = [(int(part[example]), example) for example in range(count)]
    with PerSampleLora(base, generator.layout) as lora, tempfile.TemporaryDirectory() as scratch, _frozen(generator.network):
        counts = torch.tensor([len(own) for own in seen])
        fit = PriorFit(generator, base, lora, condition, counts, prior_weight).to(base.device)
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=sum(sizes),
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
