"""`objective="reconstruction"`: the snapshots of a collection are the targets (Eqs. 2-9)."""

from __future__ import annotations

import copy
import functools
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import EvalPrediction, Trainer
from transformers.trainer_utils import EvalLoopOutput

from ..adapters.collection import AdapterCollection
from ..adapters.snapshots import SnapshotMatrix, TaskSnapshots
from ..conditioning import TaskEncoder
from ..conditioning.spelling import words_of
from ..generator.configuration_icm import ICMConfig
from ..generator.modeling_icm import ICMGenerator
from ..generator.networks import PrincipalNetwork
from .arguments import ICMTrainingArguments
from .conditions import Conditions, training_conditions
from .episodes import EpisodeDataset, EpisodeSampler, held_out_mask
from .reading import indices, threshold_facts
from .reporting import Bars

logger = logging.getLogger(__name__)

COLLAPSED = 0.1  # nats of held-out KL below which z carries nothing


class Reconstruction:
    """What [`ICMTrainer`] does with a collection: episodes of snapshots, Eq. 8, and errors on held-out snapshots.

    Args:
        model ([`ICMGenerator`] or [`ICMConfig`]): What to train; a config builds a new generator.
        args ([`ICMTrainingArguments`]): Of the training.
        collection (`AdapterCollection`): With task vectors.
        encoder (`TaskEncoder`, *optional*): Of the task vectors.

    Raises:
        `ValueError`: If the collection has no task vectors or holds a value that is not finite, or the model has another layout.
    """

    label_names = ("variance",)
    data_collator = None

    def __init__(
        self, model: ICMGenerator | ICMConfig, args: ICMTrainingArguments, collection: AdapterCollection, encoder: TaskEncoder | None
    ):
        collection.__post_init__()  # its checks: tensors in memory may have been changed in place since it was made
        missing = [task for task in collection.tasks if task not in collection.task_vectors]
        if missing:
            raise ValueError(f"The collection has no task vectors for {missing[0]!r}: call collection.encode(encoder) first.")
        self.collection, self.args = collection, args
        self.reading: dict[str, Any] = (model.config.training or {}).get("reading", {}) if isinstance(model, ICMGenerator) else {}
        reads = not isinstance(model, ICMGenerator) and condition_space(model, collection) != "none"
        conditions = training_conditions(collection, encoder, args.phrasings, args.seed, threshold=reads)
        vectors = conditions.rows
        train, test = _split(collection, args)
        fitted = not isinstance(model, ICMGenerator)
        if not isinstance(model, ICMGenerator):
            model = new_generator(collection, model, encoder, args.seed)
            self.reading = fit(model, train, conditions)
        if model.layout.fingerprint != collection.layout.fingerprint:
            raise ValueError(
                f"The generator's layout is {model.layout.fingerprint}, the collection's {collection.layout.fingerprint}: they must be"
                " one. Build a new generator from the collection."
            )
        self.generator = model
        self.train_vectors = torch.stack([part.mean(0) for part in vectors])
        batch, size = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps, model.config.latent_size
        space = copy.deepcopy(model.space)  # samples are made on the CPU, wherever the generator is
        if space is not None:
            space.cpu()
        self.projects = isinstance(model.network, PrincipalNetwork)
        episodes = functools.partial(
            EpisodeDataset,
            args=args,
            latent_size=size,
            batch_size=batch,
            space=space,
            name="coordinates" if self.projects else "parameters",
        )
        self.train_dataset, self.eval_dataset = episodes(train.parts, vectors), None
        self.sources = [(self.train_dataset, train)]
        if len(test):
            # The mean of what is trained on: of a principal subspace that was fitted just now, its centre.
            center = model.network.center if fitted and self.projects else model.normalized(train).average()
            variances = [block.sub_(center).square_().mean(1) for _, block in model.normalized(test).rows("variance")]
            self.eval_dataset = episodes(test.parts, vectors, variances=_by_task(test, torch.cat(variances)))
            self.sources.append((self.eval_dataset, test))
        self._project()
        if self.eval_dataset is None and args.eval_strategy != "no":
            logger.warning("No snapshot is held out (held_out=%g, one snapshot for each task?): nothing is evaluated.", args.held_out)
        self._parts: dict[str, tuple[Tensor, int]] = {}  # sums since the last log, and of how many steps

    def evaluated(self, dataset: EpisodeDataset) -> EpisodeDataset:
        """What an evaluation reads of a data set: its snapshots, once."""
        return dataset

    def sampler(self, dataset: Any, evaluate: bool = False) -> EpisodeSampler:
        """The order of the episodes."""
        return EpisodeSampler(dataset, evaluate)

    def _project(self) -> None:
        """Where there is a subspace, put coordinates in the place of snapshots: no step depends on P then."""
        if self.projects:
            for dataset, matrix in self.sources:
                dataset.snapshots = _by_task(matrix, self.generator.project(matrix))
            self.projected_on = self._some_columns()

    def _some_columns(self) -> Tensor:
        """Of the subspace: those of another one are others."""
        return self.generator.network.basis[:, :: max(1, self.generator.layout.numel // 64)].cpu().clone()

    def begin(self) -> None:
        """Project again if the checkpoint that was loaded has another subspace, as one of another machine may."""
        if self.projects and not torch.equal(self._some_columns(), self.projected_on):
            self._project()

    def refresh(self) -> None:
        """Recompute the (task vector, latent) pairs of the context from the training snapshots."""
        parts = (part[:] for part in self.train_dataset.snapshots)  # those on disk are read task by task
        self.generator.remember(parts, self.train_vectors, projected=self.projects)

    def loss(self, trainer: Trainer, model: torch.nn.Module, inputs: dict[str, Any], num_items: Any) -> tuple[Tensor, Any]:
        """Eq. 8 with the scheduled KL weight; keeps its two terms for the log."""
        outputs = model(**{name: value for name, value in inputs.items() if name != "variance"})
        warmup = self.args.kl_warmup_ratio * trainer.state.max_steps
        ramp = min(1.0, trainer.state.global_step / warmup) if warmup and model.training else 1.0
        loss = outputs.reconstruction_loss + ramp * self.generator.config.kl_weight * outputs.kl_loss
        if model.training:
            for name, value in (("kl", outputs.kl_loss), ("mse", outputs.squared_error.mean())):
                total, count = self._parts.get(name, (torch.zeros_like(outputs.kl_loss), 0))
                self._parts[name] = (total + value.detach(), count + 1)
        return loss, outputs

    def logged(self) -> dict[str, float]:
        """The mean KL (nats) and squared error since the last log."""
        means = {name: round(float(total / count), 4) for name, (total, count) in self._parts.items()}
        self._parts.clear()
        return means

    def end(self) -> None:
        """The steps since the last log are no part of the next run."""
        self._parts.clear()

    def predict(self, trainer: Trainer, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any, Tensor]:
        """Errors of each held-out snapshot from the posterior, the prior and z = 0."""
        loss, outputs = self.loss(trainer, model, inputs, None)
        noise, variance = inputs["noise"], inputs["variance"]
        adapters = {name: inputs[name] for name in ("parameters", "coordinates") if name in inputs}
        errors = [self.generator.squared_error(z, inputs["condition"], **adapters) for z in (noise, torch.zeros_like(noise))]
        kl = 0.5 * (outputs.latent_mean.square() + outputs.latent_logvar.exp() - 1 - outputs.latent_logvar).sum(1)
        return loss.detach(), (outputs.squared_error, *errors, kl, variance, outputs.latent_mean), variance

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Means over the held-out snapshots; a collapsed posterior is warned of."""
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

    def bars(self, dataset: EpisodeDataset, found: EvalLoopOutput) -> Bars:
        """The variance explained of each task that has held-out snapshots, from the posterior, the prior and z = 0."""
        sizes = [len(part) for part in dataset.snapshots]
        mse, prior, zero, _, variance, _ = (torch.as_tensor(part).split(sizes) for part in found.predictions)
        tasks = [task for task, size in enumerate(sizes) if size]
        kinds = {"posterior": mse, "z ~ N(0, I)": prior, "z = 0": zero}
        explained = {kind: torch.stack([1 - rows[task].mean() / variance[task].mean() for task in tasks]) for kind, rows in kinds.items()}
        return [self.collection.tasks[task] for task in tasks], explained, "variance explained"

    def facts(self, metrics: dict[str, float]) -> dict[str, Any]:
        """What the card says of the data and of what was measured on it."""
        titles = [("variance_explained", "variance explained"), ("kl", "KL divergence (nats)")]
        return {
            "snapshots": len(self.train_dataset),
            "held_out_snapshots": len(self.eval_dataset) if self.eval_dataset is not None else 0,
            "collection": self.collection.metadata,
            "reading": self.reading,
            "metrics": [
                {"type": name, "name": title, "value": round(metrics[f"eval_{name}"], 4), "dataset": "held-out snapshots"}
                for name, title in titles
                if metrics
            ],
        }


def _split(collection: AdapterCollection, args: ICMTrainingArguments) -> tuple[SnapshotMatrix, SnapshotMatrix]:
    """Snapshots to train on, and those held out; of what lies on disk none is read yet."""
    parts: tuple[list[TaskSnapshots], list[TaskSnapshots]] = ([], [])
    for task in collection.tasks:
        held = held_out_mask(len(collection.rows(task)), args.held_out)
        for rows, mask in zip(parts, (~held, held), strict=True):
            rows.append(TaskSnapshots(collection.snapshots, task, mask.nonzero()[:, 0].tolist(), collection.layout))
    bound, bars = args.max_memory_bytes, args.process_index == 0 and not args.disable_tqdm
    return tuple(SnapshotMatrix(rows, collection.layout.numel, bound, progress=bars) for rows in parts)  # type: ignore[return-value]


def _by_task(matrix: SnapshotMatrix, rows: Tensor) -> tuple[Tensor, ...]:
    """What was computed of each row, task by task."""
    return rows.split([len(part) for part in matrix.parts])


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
        "words": words_of(text for texts in collection.descriptions.values() for text in texts),
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


def fit(generator: ICMGenerator, parameters: Tensor | SnapshotMatrix, conditions: Conditions) -> dict[str, Any]:
    """Estimate everything about a new generator that is not trained, the threshold of what it knows among it.

    Args:
        generator ([`ICMGenerator`]): With fresh weights.
        parameters (`Tensor` or [`SnapshotMatrix`]): `[N, P]` training snapshots of all tasks.
        conditions ([`Conditions`]): Their task vectors.

    Returns:
        `dict[str, Any]`: Of the threshold, for the card; empty where none is fitted.
    """
    rows, tasks = torch.cat(conditions.rows), indices(conditions.rows)
    generator.fit(parameters, rows, tasks)
    if generator.reader is None or generator.space is None:
        logger.warning("condition_space is 'none' or there is one task: no threshold is fitted, the generator takes any request for known.")
        return {}
    held = torch.cat(conditions.held_out)
    if not len(held):
        logger.warning("No task vector is held out (fewer than five of each task, no encoder that reads text): no threshold is fitted.")
    generator.reader.fit(generator.space, rows, tasks, held, indices(conditions.held_out), conditions.foreign)
    if not len(held):
        return {}
    known, foreign = (generator.reader(generator.space, part)[1] for part in (held, conditions.foreign))
    return threshold_facts(generator.reader, known, foreign)
