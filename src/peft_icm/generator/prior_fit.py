"""The fit of adapters to a few examples, under the generator as their prior."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
BATCH = 16  # examples in a step
EVALUATIONS = 12  # in the course of a run


@dataclass(frozen=True)
class Run:
    """One of the adapters that are fitted at once.

    Args:
        seen (`list[int]`): The examples that it is trained on.
        left_out (`list[int]`): Those that tell how good it is.
        weight (`float`): Of its prior.
        batch (`int`): Examples in a step, where it has as many.
    """

    seen: list[int]
    left_out: list[int]
    weight: float
    batch: int = BATCH


class PriorFit(nn.Module):
    r"""Adapters `w_r = w_0 + d_r` of several runs, each trained on its own part of the examples.

    The loss of a run with n examples is the base's nats per token and the prior's `weight / 2n mean(d^2 / sigma^2)`. The mean is over
    numbers, so that one weight serves adapters of any size.

    Args:
        base (`PreTrainedModel`): That the examples are for; lent, and in eval mode.
        lora ([`PerSampleLora`]): On it.
        start (`Tensor`): `[P]`, w_0: what the generator gives, and the mean of the prior.
        deviations (`Tensor`): `[P]`: how far adapters of tasks lie apart, the prior's sigma where it is not floored.
        runs (`Sequence[Run]`): What is fitted.
    """

    start: Tensor
    sigma: Tensor
    counts: Tensor
    weights: Tensor

    def __init__(self, base: Any, lora: PerSampleLora, start: Tensor, deviations: Tensor, runs: Sequence[Run]):
        super().__init__()
        self._lent = (base, lora)  # a tuple, so that they are no submodules
        buffers = {
            "start": start.float(),
            "sigma": deviations.clamp(min=FLOOR * float(deviations.square().mean().sqrt())),
            "counts": torch.tensor([float(len(run.seen)) for run in runs]),
            "weights": torch.tensor([run.weight for run in runs]),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value)
        self.change = nn.Parameter(torch.zeros(len(runs), len(start)))

    def forward(self, run: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        """`{"loss", "nats", "tokens"}` of a batch of examples, each under the adapter of its run `[B]`."""
        base, lora = self._lent
        lora.use(self.start + self.change[run])
        nats, tokens = example_losses(base, inputs)
        if not nats.detach().isfinite().all():
            raise ValueError("The loss of a labelled example is not finite: lower learning_rate, or look for NaN in the examples.")
        each = torch.zeros(len(self.counts), device=nats.device)
        fit = each.index_add(0, run, nats) / each.index_add(0, run, tokens.float()).clamp(min=1)
        away = (self.change / self.sigma).square().mean(1)
        return {"loss": (fit + self.weights * away / (2 * self.counts)).sum(), "nats": nats.detach(), "tokens": tokens}


class RunExamples(Dataset[dict[str, Tensor]]):
    """Pairs of a run and an example, as a list says."""

    def __init__(self, examples: Sequence[Mapping[str, Tensor]], pairs: Sequence[tuple[int, int]]):
        self.examples, self.pairs = examples, pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        run, example = self.pairs[index]
        return {**self.examples[example], "run": torch.tensor(run)}


class KeepAdapters(TrainerCallback):
    """Keeps, at each evaluation, the nats of what each run left out, and the adapter of the last run."""

    def __init__(self, fit: PriorFit):
        self.fit = fit
        self.nats: list[list[float]] = []
        self.adapters: list[Tensor] = []

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called after each evaluation."""
        self.nats.append([kwargs["metrics"][f"eval_{run}"] for run in range(len(self.fit.counts))])
        self.adapters.append((self.fit.start + self.fit.change[-1]).detach().cpu())


def fit_runs(
    generator: Any,
    base: Any,
    start: Tensor,
    examples: Sequence[Mapping[str, Tensor]],
    runs: Sequence[Run],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    progress: bool,
) -> tuple[Tensor, Tensor]:
    """Fit adapters to examples, all of them in one batch.

    Args:
        generator ([`ICMGenerator`]): Of a `"direct"` network.
        base (`PreTrainedModel`): Lent.
        start (`Tensor`): `[P]`, what the generator gives.
        examples (`Sequence[dict[str, Tensor]]`): As the base takes them.
        runs (`Sequence[Run]`): What is fitted.
        steps (`int`): Of each run.
        learning_rate (`float`): Peak.
        seed (`int`): Of the order of the examples.
        progress (`bool`): Show a progress bar.

    Returns:
        `tuple[Tensor, Tensor]`: At the start and after each twelfth of the steps the nats of what each run left out, `[E, R]`, and the
        adapter of the last run, `[E, P]`.
    """
    draw = torch.Generator().manual_seed(seed)
    sizes = [min(run.batch, len(run.seen)) for run in runs]
    pairs = []
    for _ in range(steps):
        for index, (run, size) in enumerate(zip(runs, sizes, strict=True)):
            pairs += [(index, run.seen[place]) for place in torch.randperm(len(run.seen), generator=draw)[:size]]
    left_out = [(index, example) for index, run in enumerate(runs) for example in run.left_out]
    with PerSampleLora(base, generator.layout) as lora, tempfile.TemporaryDirectory() as scratch:
        _, units = generator.statistics.spread()
        deviations = (generator.network.deviations().detach().float() * units).cpu()
        fit = PriorFit(base, lora, start.cpu(), deviations, runs).to(base.device)
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
            max_grad_norm=0.0,  # the runs share a norm: clipped, one would slow the others down
            seed=seed,
            use_cpu=base.device.type == "cpu",
        )
        optimizer = torch.optim.AdamW(fit.parameters(), lr=learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
        keep = KeepAdapters(fit)
        trainer = _InOrder(
            model=fit,
            args=arguments,
            data_collator=collate,
            train_dataset=RunExamples(examples, pairs),
            eval_dataset=RunExamples(examples, left_out),
            optimizers=(optimizer, schedule),
            compute_metrics=functools.partial(_nats, len(runs)),
            callbacks=[keep],
        )
        trainer.remove_callback(PrinterCallback)
        if not progress:
            trainer.remove_callback(ProgressCallback)
        trainer.evaluate()
        trainer.train()
    return torch.tensor(keep.nats), torch.stack(keep.adapters)


class _InOrder(Trainer):
    """The pairs are in their order already: each step has as many of every fold."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)  # type: ignore[arg-type]

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> tuple[Any, Any, Any]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            outputs = model(**inputs)
        return outputs["loss"], outputs["nats"], inputs["run"]


def _nats(runs: int, prediction: Any) -> dict[str, float]:
    nats = torch.zeros(runs).index_add(0, torch.as_tensor(prediction.label_ids), torch.as_tensor(prediction.predictions))
    return {str(run): float(value) for run, value in enumerate(nats)}
