"""ICMTrainingArguments and ICMTrainer: in-context meta-learning of a generator on transformers' Trainer.

The procedure, where the paper only names it: an *episode* is a batch that goes round all tasks. Each of its samples is one snapshot of
its task, with a condition that is drawn anew - the mean of a random handful of the task's phrasings or examples - and with a context of
(task vector, latent) pairs from which, in half of the episodes, the task's own pair is hidden.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EvalPrediction,
    IntervalStrategy,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..adapters.collection import AdapterCollection
from ..collecting.folder import make_folder
from ..conditioning import TaskEncoder
from ..generator.configuration_icm import ICMConfig
from ..generator.modeling_icm import ICMGenerator
from ..hub.cards import generator_card
from ..hub.files import CARD, marked
from .arguments import ICMTrainingArguments
from .conditions import Conditions, training_conditions
from .episodes import EpisodeDataset, EpisodeSampler, held_out_mask
from .recipe import keep_others_out, let_others_in

logger = logging.getLogger(__name__)


COLLAPSED = 0.1  # nats of held-out KL below which z carries nothing


class RefreshContext(TrainerCallback):
    """Recomputes the context's pairs before the first step of every epoch and once at the end."""

    def __init__(self, trainer: ICMTrainer):
        self.trainer = trainer

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refresh at the first step of an epoch; a run resumed in mid-epoch has its pairs in the checkpoint."""
        steps = max(1, state.max_steps // max(1, round(state.num_train_epochs)))
        if state.global_step % steps == 0:
            self.trainer.refresh_context()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave the generator with the pairs of its final weights."""
        self.trainer.refresh_context()


def _or_the_order_of_0_1_0(init: Callable[..., None]) -> Callable[..., None]:
    """An `__init__` that takes collection, model, args, encoder in the order of 0.1.0 too, with a warning."""

    @functools.wraps(init)
    def either(self: Any, *args: Any, **kwargs: Any) -> None:
        if not (args and isinstance(args[0], AdapterCollection)):
            return init(self, *args, **kwargs)
        warnings.warn(
            "ICMTrainer(collection, model, args) is deprecated, write ICMTrainer(model, args, collection=collection).",
            FutureWarning,
            stacklevel=2,
        )
        init(self, **dict(zip(("collection", "model", "args", "encoder"), args, strict=False)), **kwargs)

    return either


class ICMTrainer(Trainer):
    """Trains an [`ICMGenerator`] on an [`AdapterCollection`].

    Logs, on held-out snapshots: `eval_kl` (nats), `eval_active_units` (latent dimensions whose posterior mean has a variance above
    0.01, Burda et al. 2016), `eval_mse` (from the posterior), `eval_prior_mse` (z ~ N(0, I)), `eval_zero_mse` (z = 0), all in pooled,
    normalised units, and `eval_variance_explained`.

    Args:
        model ([`ICMGenerator`] or [`ICMConfig`], *optional*): What to train. A config, or nothing, builds a new generator, whose
            layout, encoder and tasks are those of the collection and whose statistics are estimated from it.
        args ([`ICMTrainingArguments`], *optional*): Defaults where not given.
        collection (`AdapterCollection`): With task vectors.
        encoder (`TaskEncoder`, *optional*): The encoder of the task vectors; saved with the generator if it is a local one.
        **kwargs: For transformers' `Trainer`.

    Raises:
        `ValueError`: If the collection has no task vectors or holds a value that is not finite, or the model has another layout.
        `OSError`: If `args.output_dir` is a file.
    """

    @_or_the_order_of_0_1_0
    def __init__(
        self,
        model: ICMGenerator | ICMConfig | None = None,
        args: ICMTrainingArguments | None = None,
        collection: AdapterCollection | None = None,
        encoder: TaskEncoder | None = None,
        **kwargs: Any,
    ):
        if collection is None:
            raise ValueError("ICMTrainer needs collection=, an AdapterCollection with task vectors.")
        args = args or ICMTrainingArguments()
        make_folder(args.output_dir or ".", "output_dir")
        collection.__post_init__()  # its checks: tensors may have been changed in place since it was made
        missing = [task for task in collection.tasks if task not in collection.task_vectors]
        if missing:
            raise ValueError(f"The collection has no task vectors for {missing[0]!r}: call collection.encode(encoder) first.")
        self.collection = collection
        self.reading: dict[str, Any] = (model.config.training or {}).get("reading", {}) if isinstance(model, ICMGenerator) else {}
        snapshots = [collection.snapshots[task].float() for task in collection.tasks]
        new = not isinstance(model, ICMGenerator)
        space = condition_space(model or ICMConfig(), collection) if new else "none"  # type: ignore[arg-type]
        conditions = training_conditions(collection, encoder, args.phrasings, args.seed, threshold=space != "none")
        vectors = conditions.rows
        held = [held_out_mask(len(part), args.held_out) for part in snapshots]
        train = [part[~mask] for part, mask in zip(snapshots, held, strict=True)]
        test = [part[mask] for part, mask in zip(snapshots, held, strict=True)]
        if not isinstance(model, ICMGenerator):
            model = new_generator(collection, model or ICMConfig(), encoder, args.seed)
            self.reading = fit(model, torch.cat(train), conditions)
        if model.layout.fingerprint != collection.layout.fingerprint:
            raise ValueError(
                f"The generator's layout is {model.layout.fingerprint}, the collection's {collection.layout.fingerprint}: they must be"
                " one. Build a new generator from the collection."
            )
        self.generator = model
        self.train_vectors = torch.stack([part.mean(0) for part in vectors])
        center = model.statistics.normalize(torch.cat(train)).mean(0)
        self.center = center
        batch = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
        size = model.config.latent_size
        held_out = any(len(part) for part in test)
        if not held_out and args.eval_strategy != "no":
            logger.warning("No snapshot is held out (held_out=%g, one snapshot for each task?): nothing is evaluated.", args.held_out)
            args.eval_strategy = IntervalStrategy.NO
        super().__init__(
            model=model,
            args=args,
            train_dataset=EpisodeDataset(train, vectors, args, size, batch, model.space),
            eval_dataset=EpisodeDataset(test, vectors, args, size, batch, model.space) if held_out else None,
            compute_metrics=self._metrics,
            **kwargs,
        )
        self.label_names = ["parameters"]
        self.add_callback(RefreshContext(self))
        self._parts: dict[str, tuple[Tensor, int]] = {}  # sums since the last log, and of how many steps

    # ------------------------------------------------------------------ episodes
    def _get_train_sampler(self, train_dataset: Any = None) -> EpisodeSampler:
        dataset: Any = train_dataset or self.train_dataset
        return EpisodeSampler(dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> EpisodeSampler:
        return EpisodeSampler(eval_dataset, evaluate=True)

    def refresh_context(self) -> None:
        """Recompute the (task vector, latent) pairs of the context from the training snapshots."""
        dataset = self.train_dataset
        assert isinstance(dataset, EpisodeDataset)
        self.generator.remember(dataset.snapshots, self.train_vectors)

    # ------------------------------------------------------------------ loss and metrics
    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Eq. 8 with the scheduled KL weight; keeps its two terms for the log."""
        outputs = model(**inputs)
        warmup = self.args.kl_warmup_ratio * self.state.max_steps  # type: ignore[attr-defined]
        ramp = min(1.0, self.state.global_step / warmup) if warmup and model.training else 1.0
        loss = outputs.reconstruction_loss + ramp * self.generator.config.kl_weight * outputs.kl_loss
        if model.training:
            for name, value in (("kl", outputs.kl_loss), ("mse", outputs.squared_error.mean())):
                total, count = self._parts.get(name, (torch.zeros_like(outputs.kl_loss), 0))
                self._parts[name] = (total + value.detach(), count + 1)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean KL (nats) and squared error since the last log."""
        if "loss" in logs:
            logs |= {name: round(float(total / count), 4) for name, (total, count) in self._parts.items()}
            self._parts.clear()
        super().log(logs, start_time)

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Any, Tensor]:
        """Errors of each held-out snapshot from the posterior, the prior and z = 0."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            l = self.generator.statistics.normalize(inputs["parameters"])
            noise = inputs["noise"]

            def error(z: Tensor) -> Tensor:
                decoded = self.generator.decode(z, inputs["condition"])
                return (self.generator.statistics.normalize(decoded) - l).square().mean(1)

            kl = 0.5 * (outputs.latent_mean.square() + outputs.latent_logvar.exp() - 1 - outputs.latent_logvar).sum(1)
            variance = (l - self.center.to(l.device)).square().mean(1)
            errors = (outputs.squared_error, error(noise), error(torch.zeros_like(noise)))
        return loss.detach(), (*errors, kl, variance, outputs.latent_mean), inputs["parameters"][:, 0]

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        mse, prior, zero, kl, variance, mean = (torch.as_tensor(part) for part in prediction.predictions)
        metrics = {
            "mse": float(mse.mean()),
            "prior_mse": float(prior.mean()),
            "zero_mse": float(zero.mean()),
            "kl": float(kl.mean()),
            "active_units": int((mean.var(0, correction=0) > 0.01).sum()),
            "variance_explained": float(1 - mse.mean() / variance.mean()),
        }
        if metrics["kl"] < COLLAPSED:
            logger.warning("The posterior has collapsed: held-out KL is %.4f nats, z is ignored. Lower kl_weight.", metrics["kl"])
        return metrics

    # ------------------------------------------------------------------ the end
    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, then note the facts of the training in the generator's config, for its card.

        Raises:
            `ValueError`: If another process is training into the same `output_dir`.
        """
        if self.is_world_process_zero():
            keep_others_out(self.args.output_dir or ".")
        try:
            output = super().train(*args, **kwargs)
        finally:
            self._parts.clear()  # the steps since the last log are no part of the next run
            let_others_in(self.args.output_dir or ".")
        metrics = self.evaluate() if self.eval_dataset is not None else {}
        self.generator.config.training = {
            "snapshots": len(self.train_dataset),  # type: ignore[arg-type]
            "held_out_snapshots": len(self.eval_dataset) if self.eval_dataset is not None else 0,  # type: ignore[arg-type]
            "epochs": self.state.num_train_epochs,
            "steps": self.state.global_step,
            "seed": self.args.seed,
            "learning_rate": self.args.learning_rate,
            "collection": self.collection.metadata,
            "reading": self.reading,
            "metrics": [
                {"type": name, "name": title, "value": round(metrics[f"eval_{name}"], 4), "dataset": "held-out snapshots"}
                for name, title in [("variance_explained", "variance explained"), ("kl", "KL divergence (nats)")]
                if metrics
            ],
        }
        return output

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card of peft_icm in the place of the Trainer's."""
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir or ".")
            card = generator_card(self.generator.config.to_dict(), repo_id=self.args.hub_model_id or folder.name, folder=folder)
            (folder / CARD).write_text(marked(str(card)), encoding="utf-8")

    def push_to_hub(self, commit_message: str | None = "End of training", **kwargs: Any) -> Any:  # type: ignore[override]
        """Push the generator and its card in one commit; see [`ICMGenerator.push_to_hub`]."""
        if not self.is_world_process_zero():
            return None
        repo_id = self.args.hub_model_id or Path(self.args.output_dir or ".").name
        options = {"private": self.args.hub_private_repo, "token": self.args.hub_token, **kwargs}
        return self.generator.push_to_hub(repo_id, commit_message=commit_message or "End of training", **options)


def new_generator(collection: AdapterCollection, config: ICMConfig, encoder: TaskEncoder | None = None, seed: int = 0) -> ICMGenerator:
    """A generator with fresh weights for the layout, encoder and tasks of a collection.

    Args:
        collection (`AdapterCollection`): With task vectors.
        config ([`ICMConfig`]): Architecture and sizes; layout, encoder and tasks are filled in.
        encoder (`TaskEncoder`, *optional*): Travels with the generator when its checkpoint is a local folder.
        seed (`int`, defaults to 0): Of the weights.

    Returns:
        [`ICMGenerator`]
    """
    values = config.to_diff_dict()
    named = dict(encoder.config if encoder else collection.encoder or {})
    if encoder is not None and Path(encoder.config["checkpoint"]).is_dir():
        named |= {"checkpoint": "encoder", "folder": "encoder"}
    values |= {
        "layout": collection.layout.to_dict(),
        "encoder": named or None,
        "condition_dim": collection.task_vectors[collection.tasks[0]].shape[1],
        "tasks": [{"name": task, "description": (collection.descriptions.get(task) or [""])[0]} for task in collection.tasks],
        "condition_space": condition_space(config, collection),
    }
    torch.manual_seed(seed)
    generator = ICMGenerator(ICMConfig(**values))
    if encoder is not None:
        generator.encoder = encoder
    return generator


def condition_space(config: ICMConfig, collection: AdapterCollection) -> str:
    """The condition space of a new generator: that of its config, else `"lda"`.

    The paper has no projection, and with one task there is nothing to tell apart: `"none"`.

    Args:
        config ([`ICMConfig`]): Of the new generator.
        collection (`AdapterCollection`): That it is trained on.

    Returns:
        `str`
    """
    return config.condition_space or ("lda" if config.architecture != "paper" and len(collection.tasks) > 1 else "none")


def fit(generator: ICMGenerator, parameters: Tensor, conditions: Conditions) -> dict[str, Any]:
    """Estimate everything about a new generator that is not trained, the threshold of what it knows among it.

    Args:
        generator ([`ICMGenerator`]): With fresh weights.
        parameters (`Tensor`): `[N, P]` training snapshots of all tasks.
        conditions ([`Conditions`]): Their task vectors.

    Returns:
        `dict[str, Any]`: Of the threshold, for the card; empty where none is fitted.
    """
    indices = [torch.full((len(part),), index) for index, part in enumerate(conditions.rows)]
    rows, tasks = torch.cat(conditions.rows), torch.cat(indices)
    generator.fit(parameters, rows, tasks)
    if generator.reader is None or generator.space is None:
        logger.warning("condition_space is 'none' or there is one task: no threshold is fitted, the generator takes any request for known.")
        return {}
    held = torch.cat(conditions.held_out)
    if not len(held):
        logger.warning("No task vector is held out (fewer than five of each task, no encoder that reads text): no threshold is fitted.")
    held_tasks = torch.cat([torch.full((len(part),), index) for index, part in enumerate(conditions.held_out)])
    generator.reader.fit(generator.space, rows, tasks, held, held_tasks, conditions.foreign)
    if not len(held):
        return {}
    _, familiarity = generator.reader(generator.space, torch.cat([held, conditions.foreign]))
    known = familiarity >= generator.reader.threshold
    return {
        "familiarity_threshold": round(float(generator.reader.threshold), 4),
        "held_out_phrasings": len(held),
        "held_out_phrasings_read": round(float(known[: len(held)].float().mean()), 4),
        "foreign_requests": len(conditions.foreign),
        "foreign_requests_read": round(float(known[len(held) :].float().mean()), 4) if len(conditions.foreign) else None,
    }
