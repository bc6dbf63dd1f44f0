"""The command line: peft-icm demo | collect | train | generate | evaluate | push."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig
from transformers import AutoProcessor, PrinterCallback

from . import __version__
from .adapters.collection import AdapterCollection
from .adapters.saving import push_adapter, save_adapter
from .bundled import bundled_encoder, bundled_generator
from .collecting import CollectingArguments, collect
from .conditioning import ENCODERS, ClipEncoder, TaskEncoder
from .demo.run import SENTENCES, run_demo
from .evaluation.detection import DetectionEvaluation, evaluate_detection
from .evaluation.memorisation import memorisation_report
from .evaluation.text import Evaluation, evaluate_generator
from .generator.configuration_icm import ARCHITECTURES, ICMConfig
from .generator.modeling_icm import ICMGenerator
from .tasks import load_tasks
from .tasks.annotated_images import crops
from .tasks.detection import DetectionTask
from .training.arguments import ICMTrainingArguments
from .training.trainer import ICMTrainer

BUNDLED = "bundled:"


def _generator(name: str, **kwargs: Any) -> ICMGenerator:
    """`bundled:text`, a folder or a Hub id."""
    name = bundled_generator(name.removeprefix(BUNDLED)) if name.startswith(BUNDLED) else name
    return ICMGenerator.from_pretrained(name, **kwargs)


def _encoder(name: str) -> TaskEncoder:
    """`bundled:text`, or `kind:checkpoint`."""
    if name == f"{BUNDLED}text":
        return ClipEncoder.from_pretrained(bundled_encoder())
    kind, _, checkpoint = name.partition(":")
    if kind not in ENCODERS or not checkpoint:
        raise ValueError(f"--encoder {name!r} must be bundled:text or KIND:CHECKPOINT with KIND one of {', '.join(sorted(ENCODERS))}.")
    return ENCODERS[kind].from_pretrained(checkpoint)


# ---------------------------------------------------------------------- verbs; each returns what --json prints
def demo(args: argparse.Namespace) -> dict[str, Any]:
    """Bundled generator, bundled text or pictures: a sentence becomes an adapter."""
    return run_demo(args.output, args.task, quiet=args.json)


def collect_(args: argparse.Namespace) -> dict[str, Any]:
    """One LoRA per task; a second start goes on where the first was stopped."""
    tasks = load_tasks(args.tasks)
    detection = isinstance(tasks[0], DetectionTask)
    targets = args.target_modules[0] if args.target_modules == ["all-linear"] else args.target_modules
    # PEFT knows no task type for a vision-language model: any other breaks AutoPeftModel and names the wrong pipeline on the card.
    lora = LoraConfig(r=args.rank, lora_alpha=args.lora_alpha, target_modules=targets, task_type=None if detection else "CAUSAL_LM")
    pictures = {"location_step": args.location_step, "negatives": args.negatives, "images_per_epoch": args.blocks_per_epoch}
    texts = {"block_size": args.block_size, "blocks_per_epoch": args.blocks_per_epoch}
    recipe = CollectingArguments(
        output_dir=f"{args.output}.work",
        num_train_epochs=args.epochs,
        num_snapshots=args.snapshots,
        learning_rate=args.learning_rate,
        lr_scheduler_type=args.lr_scheduler_type,
        per_device_train_batch_size=args.batch_size,
        dtype=args.dtype,
        dataset_kwargs=pictures if detection else texts,
        seed=args.seed,
        num_workers=args.num_workers,
        shard=args.shard,
    )
    collection = collect(args.base_model, tasks, lora, recipe)
    if collection is None:
        _say(args, f"This shard is done; other tasks are not finished yet. Run again with the same {args.output} to gather them.")
        return {"finished": False, "collection": None}
    collection.save_pretrained(args.output)
    _say(args, f"{len(collection.tasks)} tasks, P = {collection.layout.numel:,}: {args.output}")
    return {"finished": True, "collection": args.output, "tasks": collection.tasks, "numel": collection.layout.numel}


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train a generator on a collection."""
    collection = AdapterCollection.from_pretrained(args.collection)
    encoder = _encoder(args.encoder)
    tasks = load_tasks(args.tasks) if args.tasks else []
    pictures = {task.name: crops(task.train_images, task.label, args.pictures) for task in tasks if isinstance(task, DetectionTask)}
    collection.encode(encoder, images=pictures)
    config = ICMConfig(
        architecture=args.architecture,
        latent_size=args.latent_size,
        hidden_size=args.hidden_size,
        num_components=args.num_components,
        num_conv_layers=args.num_conv_layers,
        kl_weight=args.kl_weight,
        context=not args.no_context,
    )
    training_args = ICMTrainingArguments(
        output_dir=f"{args.output}.work",
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        seed=args.seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        logging_strategy="epoch",
        disable_tqdm=args.json,
    )
    trainer = ICMTrainer(collection, config, training_args, encoder=encoder)
    if args.json:
        trainer.remove_callback(PrinterCallback)  # it prints the log on stdout
    # trainer_state.json is written last: a checkpoint without it was cut short
    complete = [file.parent for file in Path(f"{args.output}.work").glob("checkpoint-*/trainer_state.json")]
    last = max(complete, key=lambda folder: int(folder.name.split("-")[1]), default=None) if args.resume else None
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    trainer.generator.save_pretrained(args.output)
    training = trainer.generator.config.training or {}
    figures = {metric["type"]: metric["value"] for metric in training["metrics"]}
    _say(args, f"{args.output}: " + ", ".join(f"{name} {value}" for name, value in figures.items()))
    return {"generator": args.output, **figures}


def generate(args: argparse.Namespace) -> dict[str, Any]:
    """A sentence (or examples, or pictures) becomes a PEFT folder."""
    generator = _generator(args.generator, revision=args.revision, token=args.token)
    model = generator.generate_adapter(
        args.text,
        args.base_model,
        examples=args.example,
        images=args.image,
        temperature=args.temperature,
        generator=torch.Generator().manual_seed(args.seed),
    )
    folder = save_adapter(model, args.output)
    _say(args, f"{folder}: {generator.layout.numel:,} numbers for {model.peft_config['default'].base_model_name_or_path}")
    base = model.peft_config["default"].base_model_name_or_path
    return {
        "adapter": str(folder.resolve()),
        "base_model": base,
        "text": args.text,
        "seed": args.seed,
        "numel": generator.layout.numel,
    }


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Score a generator on held-out text or pictures against each task's own LoRA."""
    generator = _generator(args.generator)
    collection = AdapterCollection.from_pretrained(args.collection)
    processor = AutoProcessor.from_pretrained(generator.load_base().name_or_path)
    own = {task: collection.final(task) for task in collection.tasks}
    tasks: Any = load_tasks(args.tasks)
    options = {"seeds": args.seeds, "batch_size": args.batch_size}
    report: Evaluation | DetectionEvaluation
    if isinstance(tasks[0], DetectionTask):
        report = evaluate_detection(generator, processor, tasks, own, **options)
    else:
        report = evaluate_generator(generator, processor, tasks, own, **options)
    result = report.to_dict()
    if args.output:
        temporary = Path(f"{args.output}.part")
        temporary.write_text(json.dumps(result, indent=1))
        os.replace(temporary, args.output)
        report.plot(Path(args.output).with_suffix(".png"))
    _say(args, report.table())
    return result


def push(args: argparse.Namespace) -> dict[str, Any]:
    """Push a generator, a generated adapter or a collection to the Hub, with its card."""
    folder = Path(args.folder)
    options = {"private": args.private or None, "revision": args.revision, "create_pr": args.create_pr, "token": args.token}
    other = {"collection.json": "a collection", "adapter_config.json": "an adapter"}
    held = next((what for name, what in other.items() if (folder / name).is_file()), None)
    if args.with_report and held:
        raise ValueError(f"--with-report is for generators, {folder} holds {held}: push it without.")
    if (folder / "collection.json").is_file():
        info = AdapterCollection.from_pretrained(folder).push_to_hub(args.repo_id, **options)
    elif (folder / "adapter_config.json").is_file():
        info = push_adapter(folder, args.repo_id, **options)
    elif (folder / "config.json").is_file():
        generator = ICMGenerator.from_pretrained(folder)
        report = _memorisation(generator, args.with_report, args.token) if args.with_report else None
        info = generator.push_to_hub(args.repo_id, report=report, **options)
    else:
        raise ValueError(f"{folder} holds no generator, no adapter and no collection.")
    _say(args, str(info.commit_url))
    return {"repo_id": args.repo_id, "commit": info.oid, "url": str(info.commit_url)}


def _memorisation(generator: ICMGenerator, name: str, token: str | None) -> dict[str, Any]:
    """The report from a collection; one that `collect` wrote has no task vectors, the generator's own encoder makes them."""
    collection = AdapterCollection.from_pretrained(name, token=token)
    if not collection.task_vectors and generator.config.encoder:
        collection.encode(generator.encoder)
    return memorisation_report(generator, collection)


def _say(args: argparse.Namespace, line: str) -> None:
    if not args.json:
        print(line)


# ---------------------------------------------------------------------- arguments
def parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    main = argparse.ArgumentParser(prog="peft-icm", description="A sentence in, a native PEFT adapter out.")
    main.add_argument("--version", action="version", version=__version__)
    verbs = main.add_subparsers(metavar="VERB", required=True)

    def verb(run: Any, name: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=run.__doc__, description=run.__doc__, formatter_class=formatter)
        added.set_defaults(run=run)
        added.add_argument("--json", action="store_true", help="print JSON on stdout and nothing else")
        return added

    p = verb(demo, "demo")
    p.add_argument("--task", choices=list(SENTENCES), default="text", help="text: a Llama and 18 domains; detection: Florence-2, pictures")
    p.add_argument("-o", "--output", default="peft-icm-demo", help="folder for the adapter and the report")

    p = verb(collect_, "collect")
    p.add_argument("base_model", help="Hub id or folder of the base model")
    p.add_argument("--tasks", required=True, help="folder with tasks.json and its texts or annotated images")
    p.add_argument("-o", "--output", required=True, help="folder of the collection; progress is kept in OUTPUT.work")
    p.add_argument("--rank", type=int, default=2, help="r of the LoRA")
    p.add_argument("--lora-alpha", type=int, default=4, help="alpha of the LoRA")
    p.add_argument("--target-modules", nargs="+", default=["q_proj", "v_proj"], help="module names, or all-linear")
    p.add_argument("--epochs", type=int, default=150, help="epochs for each task")
    p.add_argument("--snapshots", type=int, default=50, help="K: keep the LoRA of each of the last K epochs")
    p.add_argument("--learning-rate", type=float, default=1e-3, help="peak learning rate")
    p.add_argument("--lr-scheduler-type", default="constant_with_warmup", help="schedule")
    p.add_argument("--batch-size", type=int, default=8, help="blocks in a batch")
    p.add_argument("--dtype", default="float32", help="dtype of the frozen base")
    p.add_argument("--block-size", type=int, default=256, help="tokens in a block")
    p.add_argument("--blocks-per-epoch", type=int, default=None, help="blocks or images in an epoch, drawn anew in each; by default all")
    p.add_argument("--location-step", type=int, default=1, help="detection: write so many of Florence-2's location bins as one")
    p.add_argument("--negatives", type=float, default=0.0, help="detection: images without the class for each image with it")
    p.add_argument("--seed", type=int, default=0, help="one seed of A and B for all tasks")
    p.add_argument("--num-workers", type=int, default=1, help="processes that the tasks are spread over")
    p.add_argument("--shard", default=None, help="i/n: only the i-th of n parts of the tasks, for array jobs")

    p = verb(train, "train")
    p.add_argument("collection", help="folder or Hub id of an adapter collection")
    p.add_argument("-o", "--output", required=True, help="folder of the generator; checkpoints are kept in OUTPUT.work")
    p.add_argument("--tasks", default=None, help="folder of detection tasks: the encoder also sees pictures of their objects")
    p.add_argument("--pictures", type=int, default=64, help="pictures of each of those tasks")
    p.add_argument("--encoder", default="bundled:text", help="bundled:text or KIND:CHECKPOINT, e.g. sentence:org/name")
    p.add_argument("--architecture", choices=ARCHITECTURES, default="principal", help="network of the CVAE")
    p.add_argument("--latent-size", type=int, default=64, help="size of z")
    p.add_argument("--hidden-size", type=int, default=256, help="width of the hidden layers")
    p.add_argument("--num-components", type=int, default=None, help="dimensions of the principal subspace")
    p.add_argument("--num-conv-layers", type=int, default=12, help="convolutions of the paper's architecture")
    p.add_argument("--kl-weight", type=float, default=0.005, help="weight of the KL term")
    p.add_argument("--no-context", action="store_true", help="no attention over the pairs of other tasks")
    p.add_argument("--epochs", type=int, default=200, help="epochs")
    p.add_argument("--batch-size", type=int, default=36, help="snapshots in a batch")
    p.add_argument("--learning-rate", type=float, default=1e-3, help="peak learning rate")
    p.add_argument("--seed", type=int, default=0, help="seed of weights and episodes")
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT.work")

    p = verb(generate, "generate")
    p.add_argument("generator", help="Hub id or folder of a generator; bundled:text and bundled:detection are the bundled ones")
    p.add_argument("text", nargs="?", help="what the adapter is for")
    p.add_argument("-o", "--output", required=True, help="folder of the adapter")
    p.add_argument("--example", action="append", help="an example of the task instead of a text; may be repeated")
    p.add_argument(
        "--image", metavar="FILE", action="append", help="a picture of the task, instead of a text or beside it; may be repeated"
    )
    p.add_argument("--base-model", default=None, help="Hub id or folder of the base; by default the generator's own")
    p.add_argument("--seed", type=int, default=0, help="seed of z")
    p.add_argument("--temperature", type=float, default=1.0, help="standard deviation of z")
    p.add_argument("--revision", default=None, help="revision of the generator's repo")
    p.add_argument("--token", default=None, help="access token; by default the stored one")

    p = verb(evaluate, "evaluate")
    p.add_argument("generator", help="Hub id or folder of a generator; bundled:text and bundled:detection are the bundled ones")
    p.add_argument("--tasks", required=True, help="folder with tasks.json and held-out texts or annotated images")
    p.add_argument("--collection", required=True, help="collection whose last snapshots are the own LoRAs")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of z")
    p.add_argument("--batch-size", type=int, default=16, help="windows or pictures in a forward pass")
    p.add_argument("-o", "--output", default=None, help="JSON file of the report; a plot is drawn beside it")

    p = verb(push, "push")
    p.add_argument("folder", help="folder of a generator, an adapter or a collection")
    p.add_argument("repo_id", help="org/name")
    p.add_argument("--with-report", metavar="COLLECTION", default=None, help="tell in a generator's card how near it is to these LoRAs")
    p.add_argument("--private", action="store_true", help="create a private repo")
    p.add_argument("--revision", default=None, help="branch")
    p.add_argument("--create-pr", action="store_true", help="open a pull request")
    p.add_argument("--token", default=None, help="access token; by default the stored one")
    return main


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv (`Sequence[str]`, *optional*): By default `sys.argv[1:]`.

    Returns:
        `int`: Exit code: 0, 2 for bad input (one line on stderr), 130 for Ctrl-C.
    """
    args = parser().parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    warnings.filterwarnings("ignore", message=".*(shares its weight|tie_word_embeddings)")  # no verb merges
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # peft reads it
    try:
        result = args.run(args)
    except KeyboardInterrupt:
        print("peft-icm: stopped; what was finished is kept.", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        print(f"peft-icm: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
