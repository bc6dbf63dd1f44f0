"""The verbs of tasks without LoRAs: training through their loss, and adapting to a few examples."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from . import cli_verbs
from .cli_options import chosen
from .disk import replacing_file

ADAPTERS = "adapters.json"  # what tells a folder of adapters


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train a generator on a collection, or through the loss of tasks."""
    if args.objective != "task":
        return cli_verbs.train(args)
    if args.collection or not args.tasks or not args.base_model or not args.encoder:
        raise ValueError("--objective task needs --tasks, --base-model and --encoder, such as statistics:BASE, and no collection.")
    cli_verbs.check_folder(args.output, cli_verbs.GENERATOR)
    from peft import LoraConfig

    from .generator.configuration_icm import ICMConfig
    from .tasks import load_tasks
    from .tasks.detection import DetectionTask
    from .training.recipe import check_recipe, training_recipe
    from .training.trainer import ICMTrainer

    tasks = load_tasks(args.tasks)
    targets = args.target_modules[0] if args.target_modules == ["all-linear"] else args.target_modules
    detection = isinstance(tasks[0], DetectionTask)
    training_args = cli_verbs.training_arguments(args, dataset_kwargs=example_options(args, detection))
    config = ICMConfig(**{**chosen(args, ICMConfig), "architecture": "direct"})
    trainer = ICMTrainer(
        config,
        training_args,
        encoder=cli_verbs.load_encoder(args.encoder, args.token),
        tasks=tasks,
        eval_tasks=load_tasks(args.eval_tasks) if args.eval_tasks else (),
        base_model=args.base_model,
        lora_config=LoraConfig(
            r=args.rank, lora_alpha=args.lora_alpha, target_modules=targets, task_type=None if detection else "CAUSAL_LM"
        ),
    )
    data = trainer.objective.train_dataset.fingerprint()  # type: ignore[union-attr]
    check_recipe(f"{args.output}.work", training_recipe(data, config, training_args), resume=args.resume)
    return cli_verbs.run_training(trainer, args)


def adapt(args: argparse.Namespace) -> dict[str, Any]:
    """Few labelled examples and a generator become an adapter for each task."""
    cli_verbs.check_folder(args.output, ADAPTERS, replaced=False)
    with cli_verbs.importing():
        from .adapters.base import opening_base
        from .adapters.saving import save_adapter
        from .generator import modeling_icm  # noqa: F401
    from transformers import AutoProcessor

    from .tasks import load_tasks
    from .tasks.annotated_images import crops
    from .tasks.detection import DetectionTask
    from .tasks.fields import numbered_examples
    from .training.conditions import EXCERPTS, excerpts

    generator = cli_verbs.load_generator(args.generator, token=args.token)
    tasks = load_tasks(args.tasks)
    detection = isinstance(tasks[0], DetectionTask)
    name = str(args.base_model or generator.load_base().name_or_path)
    with opening_base(name):
        processor = AutoProcessor.from_pretrained(name, token=args.token)
    examples: dict[str, Any] = {}
    for task in tasks:  # all of them, before the first is learnt from
        examples[task.name] = numbered_examples(task, processor, **example_options(args, detection))
        if len(examples[task.name]) < 2:
            raise ValueError(
                f"Task {task.name!r} of {args.tasks} gives one example (of text, one block): give two at least, to learn from one and"
                " tell by the other."
            )
    folders = {}
    for task in tasks:
        given: dict[str, Any] = {}
        if isinstance(task, DetectionTask):
            given["images"] = crops(task.train_images, task.label, args.pictures)
        elif "examples" in generator.encoder.accepts:
            given["examples"] = excerpts(task.train_texts, EXCERPTS)
        else:  # of a task that nothing was trained on, words say less than pictures and examples, and beside them they mislead
            given["text"] = task.descriptions[0]
        model = generator.adapt(
            base_model=args.base_model,
            labelled=examples[task.name],
            steps=args.steps,
            learning_rate=args.learning_rate,
            seed=args.seed,
            progress=not args.json,
            **given,
        )
        folders[task.name] = str(save_adapter(model, Path(args.output) / task.name).resolve())
        with replacing_file(Path(args.output) / ADAPTERS) as temporary:  # with each: stopped, it can be started again
            temporary.write_text(json.dumps(folders, indent=1), encoding="utf-8")
        cli_verbs.say(args, f"{task.name}: {folders[task.name]}")
    return {"adapters": folders}


def example_options(args: argparse.Namespace, detection: bool) -> dict[str, Any]:
    """Of the options of a task's examples those of its kind."""
    if detection:
        return {"location_step": args.location_step, "negatives": args.negatives}
    return {"block_size": args.block_size, **cli_verbs.packing(args)}
