"""`objective="task"`: the base reads examples of the tasks under the generated adapters, and its loss trains the generator."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import AutoConfig, AutoProcessor, EvalPrediction, PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput

from ..adapters.base import add_lora, base_class, check_bare, opening_base
from ..adapters.examples import collate, example_losses
from ..adapters.layout import AdapterLayout
from ..adapters.per_sample import PerSampleLora
from ..conditioning import TaskEncoder
from ..conditioning.spelling import words_of
from ..generator.configuration_icm import ICMConfig
from ..generator.modeling_icm import ICMGenerator
from ..generator.networks import DirectNetwork
from ..tasks.fields import numbered_examples
from .arguments import ICMTrainingArguments
from .conditions import task_conditions
from .episodes import seeded
from .reading import fit_text_reader
from .reporting import Bars
from .sharding import shard

EVALUATED = 16  # examples of each task that nothing is trained on

Key = tuple[int, int, int]  # epoch, position in the epoch, task


class TaskEpisodes(Dataset[dict[str, Tensor]]):
    """Examples of tasks, each with a condition of its task, as a function of (seed, epoch, position) alone.

    Args:
        names (`list[str]`): Of the tasks.
        datasets (`list[Dataset]`): Examples of each task: dicts of tensors as the base takes them, with `labels`.
        vectors (`list[list[Tensor]]`): Of each task its task vectors `[m, d]`, one tensor for each thing that can be given: sentences,
            pictures, examples.
        args ([`ICMTrainingArguments`]): Seed, handful, noise, dropout.
        generator ([`ICMGenerator`]): Its latent size and what its condition space takes for noise.
        encoder (`TaskEncoder`): How it averages.
    """

    def __init__(
        self,
        names: list[str],
        datasets: list[Any],
        vectors: list[list[Tensor]],
        args: ICMTrainingArguments,
        generator: ICMGenerator,
        encoder: TaskEncoder,
    ):
        self.names, self.datasets, self.vectors, self.args, self.encoder = names, datasets, vectors, args, encoder
        self.latent_size, self.no_condition = generator.config.latent_size, generator.no_condition.cpu()
        # Copies: samples are made on the CPU, wherever the generator is.
        self.space, self.deviation = copy.deepcopy(generator.space), generator.statistics.condition_std.cpu()
        if self.space is not None:
            self.space.cpu()
        self.batch = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps

    def __len__(self) -> int:
        return -(-len(self.datasets) // self.batch) * self.batch

    def __getitem__(self, key: Key) -> dict[str, Tensor]:
        epoch, position, task = key
        draw = seeded(self.args.seed, epoch, "task", position)
        noise = torch.randn(self.latent_size, generator=draw)
        groups = self.vectors[task]
        # Each thing that can be given alone, or all of them: the generator learns to do with what there is.
        chosen = int(torch.randint(len(groups) + (len(groups) > 1), (), generator=draw))
        rows = []
        for group in groups if chosen == len(groups) else [groups[chosen]]:
            handful = int(torch.randint(1, self.args.max_handful + 1, (), generator=draw)) if epoch >= 0 else self.args.max_handful
            rows.append(group[torch.randperm(len(group), generator=draw)[:handful]])
        condition = self.encoder.average(torch.cat(rows))
        example = int(torch.randint(len(self.datasets[task]), (), generator=draw)) if epoch >= 0 else position % len(self.datasets[task])
        if epoch >= 0:
            wording = torch.randn(condition.shape, generator=draw)
            wording = self.space.colour(wording) if self.space is not None else wording * self.deviation * (condition != 0)
            condition = condition + self.args.condition_noise * wording
            if torch.rand((), generator=draw) < self.args.condition_dropout:
                condition = self.no_condition
        return {**self.datasets[task][example], "condition": condition, "noise": noise, "task": torch.tensor(task)}

    def fingerprint(self) -> str:
        """Hex digest over examples and task vectors."""
        digest = hashlib.sha256()
        for dataset, groups in zip(self.datasets, self.vectors, strict=True):
            digest.update(dataset.fingerprint().encode())
            for group in groups:
                digest.update(group.numpy().tobytes())
        return digest.hexdigest()


class TaskRound(Dataset[dict[str, Tensor]]):
    """What an evaluation reads of tasks: 16 examples of each in turn, at epoch -1.

    A data set of its own: of several processes, only as many results are kept as it is long.

    Args:
        episodes ([`TaskEpisodes`]): Of the tasks.
    """

    def __init__(self, episodes: TaskEpisodes):
        self.episodes = episodes

    def __len__(self) -> int:
        return len(self.episodes.datasets) * EVALUATED

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return self.episodes[-1, position, position // EVALUATED]


class TaskSampler(Sampler[Key]):
    """The task is drawn first: tasks in a fresh random order, round after round, in whole batches."""

    def __init__(self, dataset: TaskEpisodes):
        self.dataset, self.epoch = dataset, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Key]:
        count = len(self.dataset.datasets)
        draw = seeded(self.dataset.args.seed, self.epoch, "tasks")
        rounds = -(-len(self) // count)
        tasks = torch.cat([torch.randperm(count, generator=draw) for _ in range(rounds)])
        yield from ((self.epoch, position, int(tasks[position])) for position in range(len(self)))


class ThroughTask:
    """What [`ICMTrainer`] does with tasks and a base.

    Args:
        model ([`ICMGenerator`] or [`ICMConfig`], *optional*): What to train; a config, or nothing, builds a new `"direct"` generator.
        args ([`ICMTrainingArguments`]): Of the training.
        tasks (`Sequence[Task]`): What is trained on.
        eval_tasks (`Sequence[Task]`): Tasks that nothing is trained on.
        base_model (`str`, `Path` or `PreTrainedModel`): The base; a model is lent, and frozen.
        lora_config (`LoraConfig`, *optional*): Of the adapters of a new generator.
        encoder (`TaskEncoder`): Of the task vectors.
        processor (*optional*): Of the base.

    Raises:
        `ValueError`: If the base carries adapters or does not fit the generator's layout, a target of it is no linear layer, a task is of
            another modality than the encoder and the base, its data set is a stream, or two tasks have one name.
    """

    label_names = ("labels",)
    data_collator = staticmethod(collate)

    def __init__(
        self,
        model: ICMGenerator | ICMConfig | None,
        args: ICMTrainingArguments,
        tasks: Sequence[Any],
        eval_tasks: Sequence[Any],
        base_model: str | os.PathLike[str] | PreTrainedModel,
        lora_config: LoraConfig | None,
        encoder: TaskEncoder,
        processor: Any,
    ):
        self.args, self.tasks = args, list(tasks)
        names = [task.name for task in (*tasks, *eval_tasks)]
        if len(set(names)) < len(names):
            raise ValueError(f"Tasks need different names, held-out ones too, found {sorted(names)}.")
        self.base: Any = base_model if isinstance(base_model, torch.nn.Module) else _load(str(base_model))
        check_bare(self.base)
        with opening_base(str(self.base.name_or_path)):
            processor = processor or AutoProcessor.from_pretrained(self.base.name_or_path, trust_remote_code=False)
        examples = [numbered_examples(task, processor, **args.dataset_kwargs) for task in (*tasks, *eval_tasks)]
        conditions = task_conditions([*tasks, *eval_tasks], encoder, args.phrasings, args.seed)
        vectors, unseen = conditions[: len(self.tasks)], conditions[len(self.tasks) :]
        self.reading: dict[str, Any]
        if isinstance(model, ICMGenerator):
            self.generator, self.reading = model, (model.config.training or {}).get("reading", {})
        else:
            self.generator = new_task_generator(model or ICMConfig(), self.base, lora_config, encoder, self.tasks, vectors, args.seed)
            reader, sentences = self.generator.text_reader, [task.descriptions for task in self.tasks]
            said = [groups[0] for groups in vectors]  # of what can be given, text stands first
            self.reading = fit_text_reader(reader, encoder, sentences, said, args.seed) if reader is not None else {}
        self.generator.encoder = encoder
        self.lora = PerSampleLora(self.base, self.generator.layout)
        self.base.requires_grad_(False).eval()
        if args.gradient_checkpointing:
            self.base.gradient_checkpointing_enable({"use_reentrant": False})
            self.base.train()  # in eval mode nothing is computed again
            # The generator's own layers are no burden. One switch, by its older and its newer name.
            args.gradient_checkpointing = args.activation_checkpointing = False
        if args.fsdp:
            shard(self.base, args)
        self.base.to(args.device)  # type: ignore[arg-type]

        def episodes(found: Sequence[Any], examples: list[Any], conditions: list[list[Tensor]]) -> TaskEpisodes:
            return TaskEpisodes([task.name for task in found], examples, conditions, args, self.generator, encoder)

        count = len(self.tasks)
        self.means = torch.stack([encoder.average(torch.cat(groups)) for groups in vectors])
        self.train_dataset = episodes(self.tasks, examples[:count], vectors)
        self.eval_dataset = {"unseen": episodes(eval_tasks, examples[count:], unseen)} if eval_tasks else None

    def evaluated(self, dataset: TaskEpisodes) -> TaskRound:
        """What an evaluation reads of a data set."""
        return TaskRound(dataset)

    def sampler(self, dataset: Any, evaluate: bool = False) -> Sampler[Any]:
        """The order of the tasks."""
        return SequentialSampler(dataset) if evaluate else TaskSampler(dataset)

    def refresh(self) -> None:
        """Measure how far the adapters of the tasks lie from each other; pairs of a context are those of a collection."""
        if isinstance(self.generator.network, DirectNetwork):
            noise = torch.randn(len(self.means), self.generator.config.latent_size, generator=seeded(self.args.seed, "spread"))
            self.generator.network.measure(noise.to(self.generator.device), self.generator.normalize_condition(self.means))

    def begin(self) -> None:
        """Nothing to do before the first step."""

    def logged(self) -> dict[str, float]:
        """Nothing beside the loss."""
        return {}

    def end(self) -> None:
        """The base is lent: without the adapters of the last batch."""
        self.lora.use(None)

    def loss(self, trainer: Trainer, model: torch.nn.Module, inputs: dict[str, Any], num_items: Any) -> tuple[Tensor, Any]:
        """Nats per token over the whole batch, those of other processes and accumulated steps included."""
        inputs = dict(inputs)
        condition, noise, task = inputs.pop("condition"), inputs.pop("noise"), inputs.pop("task")
        outputs = model(condition=condition, noise=noise)
        nats, tokens = self.score(outputs.reconstruction, inputs)
        wrong = ~nats.detach().isfinite()
        if wrong.any():
            name = self.tasks[int(task[wrong][0])].name
            raise ValueError(
                f"The loss is not finite at step {trainer.state.global_step + 1}, on an example of task {name!r}: lower the learning rate."
                " The last checkpoint is as it was."
            )
        if num_items is None:
            return nats.sum() / tokens.sum(), outputs
        return nats.sum() / num_items * trainer.accelerator.num_processes, outputs  # gradients are averaged over processes

    def score(self, adapters: Tensor | None, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Summed nats `[B]` and targets `[B]` of each example under its adapter `[B, P]`; without any, under the base."""
        self.lora.use(adapters)
        return example_losses(self.base, inputs)

    def predict(self, trainer: Trainer, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any, Tensor]:
        """Nats of each example under its task's adapter, without a condition, and under the base."""
        inputs = dict(inputs)
        condition, noise, _ = inputs.pop("condition"), inputs.pop("noise"), inputs.pop("task")
        own, tokens = self.score(self.generator(condition=condition, noise=noise).reconstruction, inputs)
        nothing = self.generator.no_condition.to(condition.device)[None]
        shared, _ = self.score(self.generator(condition=nothing, noise=torch.zeros_like(noise[:1])).reconstruction, inputs)
        base, _ = self.score(None, inputs)
        return own.sum() / tokens.sum(), (own, shared, base), tokens

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Nats per token of all held-out examples."""
        tokens = torch.as_tensor(prediction.label_ids).sum()
        own, shared, base = (float(torch.as_tensor(part).sum() / tokens) for part in prediction.predictions)
        return {"loss": own, "shared_loss": shared, "base_loss": base, "gain": shared - own}

    def bars(self, dataset: TaskRound, found: EvalLoopOutput) -> Bars:
        """What each task's adapter, and the one without a condition, gain over the base."""
        parts = (*found.predictions, found.label_ids)
        own, shared, base, tokens = (torch.as_tensor(part).view(-1, EVALUATED).sum(1) for part in parts)
        gains = {"own condition": (base - own) / tokens, "no condition": (base - shared) / tokens}
        return dataset.episodes.names, gains, "gain over the base (nats per token)"

    def facts(self, metrics: dict[str, float]) -> dict[str, Any]:
        """What the card says of the data and of what was measured on it."""
        titles = [
            ("loss", "loss on unseen tasks (nats per token)"),
            ("shared_loss", "the same without a condition"),
            ("base_loss", "the same of the base"),
        ]
        return {
            "tasks": len(self.tasks),
            "reading": self.reading,
            "metrics": [
                {
                    "type": name,
                    "name": title,
                    "value": round(metrics[f"eval_unseen_{name}"], 4),
                    "dataset": "unseen tasks",
                }
                for name, title in titles
                if metrics
            ],
        }


def new_task_generator(
    config: ICMConfig,
    base: PreTrainedModel,
    lora_config: LoraConfig | None,
    encoder: TaskEncoder,
    tasks: Sequence[Any],
    vectors: list[list[Tensor]],
    seed: int,
) -> ICMGenerator:
    """A `"direct"` generator with fresh weights, whose adapters start as peft starts a LoRA: they change nothing.

    Args:
        config ([`ICMConfig`]): Sizes; architecture, layout, encoder and tasks are filled in.
        base (`PreTrainedModel`): Lent.
        lora_config (`LoraConfig`): Of the adapters.
        encoder (`TaskEncoder`): Travels with the generator when its checkpoint is a local folder.
        tasks (`Sequence[Task]`): Their names and first sentences go into the config.
        vectors (`list[list[Tensor]]`): Their task vectors.
        seed (`int`): Of the weights.

    Returns:
        [`ICMGenerator`]

    Raises:
        `ValueError`: If there is no LoRA configuration, or the config has a condition space.
    """
    if config.reads:
        raise ValueError(f"condition_space={config.condition_space!r} is fitted on a collection of LoRAs: objective='task' has none.")
    if lora_config is None:
        raise ValueError("objective='task' needs lora_config=, such as LoraConfig(r=4, target_modules=['q_proj', 'v_proj']).")
    torch.manual_seed(seed)
    model = add_lora(base, lora_config)
    layout = AdapterLayout.from_peft_model(model)
    start = layout.flatten(get_peft_model_state_dict(model, save_embedding_layers=False)).float()
    model.unload()
    named = copy.deepcopy(encoder.config)
    for part in (named, *named.get("parts", {}).values()):
        if Path(part["checkpoint"]).is_dir():
            part["checkpoint"] = named["folder"] = "encoder"
    values = config.to_diff_dict() | {
        "architecture": "direct",
        "layout": layout.to_dict(),
        "encoder": named,
        "condition_dim": encoder.dim,
        "tasks": [{"name": task.name, "description": task.descriptions[0]} for task in tasks],
        "words": words_of(text for task in tasks for text in task.descriptions),
        "context": False,
        "text_reader": "text" in encoder.accepts and len(tasks) > 1,
    }
    generator = ICMGenerator(ICMConfig(**values))
    generator.statistics.fit_conditions(torch.cat([row for groups in vectors for row in groups]))
    generator.network.fit(start[None])
    return generator


def _load(name: str) -> PreTrainedModel:
    with opening_base(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        return base_class(config).from_pretrained(name, use_safetensors=True, trust_remote_code=False)
