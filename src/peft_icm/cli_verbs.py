"""The verbs of the command line; each returns what --json prints.

What is heavy is imported by the verb that needs it, so that help and wrong options need not wait for torch.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli_options import chosen
from .launching.arguments import LaunchArguments
from .remote import is_url
from .unknown import UnknownTaskWarning

if TYPE_CHECKING:
    from .adapters.collection import AdapterCollection
    from .conditioning import TaskEncoder
    from .generator.modeling_icm import ICMGenerator
    from .training.arguments import ICMTrainingArguments
    from .training.trainer import ICMTrainer

BUNDLED = "bundled:"
ADAPTER, COLLECTION, GENERATOR = "adapter_config.json", "collection.json", "config.json"  # what tells a folder of each kind


@contextmanager
def importing() -> Iterator[None]:
    """Import torch and what is on it without the garbage collector: all of it stays, and searching it takes a third of a short run."""
    if "torch" in sys.modules or not gc.isenabled():  # main() was called by a program with objects, or an opinion, of its own
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def load_generator(name: str, **kwargs: Any) -> ICMGenerator:
    """`bundled:text`, a folder or a Hub id."""
    from .bundled import bundled_generator
    from .generator.modeling_icm import ICMGenerator

    name = bundled_generator(name.removeprefix(BUNDLED)) if name.startswith(BUNDLED) else name
    return ICMGenerator.from_pretrained(name, **kwargs)


def load_encoder(name: str, token: str | None) -> TaskEncoder:
    """`bundled:text`, `kind:checkpoint`, or side by side `text=bundled:text,images=statistics:BASE`."""
    from .bundled import bundled_encoder
    from .conditioning import ENCODERS, ClipEncoder, JoinedEncoder

    if "=" in name.partition(":")[0]:
        parts = dict(part.partition("=")[::2] for part in name.split(","))
        return JoinedEncoder({argument: load_encoder(part, token) for argument, part in parts.items()})
    if name == f"{BUNDLED}text":
        return ClipEncoder.from_pretrained(bundled_encoder())
    kind, _, checkpoint = name.partition(":")
    if kind not in ENCODERS or not checkpoint:
        raise ValueError(f"--encoder {name!r} must be bundled:text or KIND:CHECKPOINT with KIND one of {', '.join(sorted(ENCODERS))}.")
    return ENCODERS[kind].from_pretrained(checkpoint, token=token)


def check_folder(output: str, mark: str, replaced: bool = True) -> None:
    """Refuse before the work what could not be written after it: `output` is new, empty, or an older folder of the same kind, which is
    replaced in one step or written into.
    """
    if is_url(output):
        raise ValueError(f"--output {output} is a URL, and only collect writes to one: choose a folder.")
    folder = Path(output)
    if folder.is_dir():
        if any(folder.iterdir()) and not (folder / mark).is_file():
            raise ValueError(f"--output {output} holds files of something else (no {mark}): choose a new or an empty folder.")
        if replaced and folder.resolve().is_mount():
            raise ValueError(f"--output {output} is a mount point, which cannot be replaced in one step: choose a folder in it.")
    elif os.path.lexists(folder):
        raise ValueError(f"--output {output} is no folder: choose a new or an empty folder.")
    _check_writable(folder, replaced)


def _check_writable(path: Path, replaced: bool = True) -> None:
    """What is there, and the folder that it lies in: what is new is written beside it and swapped in, unless it is written into."""
    target = path.resolve()
    beside = next(parent for parent in target.parents if parent.exists())
    for there in [target] * target.exists() + [beside] * (replaced or not target.exists()):
        if not (there.is_dir() or there == target) or not os.access(there, os.W_OK):
            raise OSError(f"--output {path} cannot be written: {there} is no folder that you may write to.")


# ---------------------------------------------------------------------- verbs
def demo(args: argparse.Namespace) -> dict[str, Any]:
    """Bundled generator, bundled text or pictures: a sentence becomes an adapter."""
    check_folder(args.output, "adapter/adapter_config.json", replaced=False)
    with importing():
        from .demo.run import run_demo

    return run_demo(args.output, args.task, full=args.full, quiet=args.json)


def packing(args: argparse.Namespace) -> dict[str, bool]:
    """`--packing` or `--no-packing`, where it was given: what was collected without either goes on without."""
    return {} if args.packing is None else {"packing": args.packing}


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train a generator on a collection."""
    check_folder(args.output, GENERATOR)
    from .adapters.collection import AdapterCollection
    from .generator.configuration_icm import ICMConfig
    from .training.recipe import check_recipe, collection_sha256, training_recipe
    from .training.trainer import ICMTrainer

    if args.collection is None:
        raise ValueError("COLLECTION is missing: name a folder or a Hub id, or train on tasks with --objective task.")
    collection = AdapterCollection.from_pretrained(args.collection, token=args.token)
    encoder = _encode(args, collection)
    training_args = training_arguments(args)
    config = ICMConfig(context=not args.no_context, **chosen(args, ICMConfig))
    check_recipe(f"{args.output}.work", training_recipe(collection_sha256(collection), config, training_args), resume=args.resume)
    trainer = ICMTrainer(config, training_args, collection=collection, encoder=encoder)
    return run_training(trainer, args)


def training_arguments(args: argparse.Namespace, **more: Any) -> ICMTrainingArguments:
    """What `peft-icm train` was told, for the Trainer."""
    from .training.arguments import ICMTrainingArguments

    often = "steps" if args.max_steps > 0 else "epoch"
    return ICMTrainingArguments(
        output_dir=f"{args.output}.work",
        lr_scheduler_type="cosine",
        seed=args.seed,
        eval_strategy=often,
        save_strategy=often,
        eval_steps=max(1, args.max_steps // 10),
        save_steps=max(1, args.max_steps // 10),
        logging_steps=max(1, args.max_steps // 50),
        save_total_limit=1,
        logging_strategy=often,
        disable_tqdm=args.json,
        **{**chosen(args, ICMTrainingArguments), **more},
    )


def run_training(trainer: ICMTrainer, args: argparse.Namespace) -> dict[str, Any]:
    """Train, from the last checkpoint with `--resume`, and save."""
    from transformers import PrinterCallback

    if args.json:
        trainer.remove_callback(PrinterCallback)  # it prints the log on stdout
    # trainer_state.json is written last: a checkpoint without it was cut short
    complete = Path(f"{args.output}.work").glob("checkpoint-*/trainer_state.json")
    steps = {file.parent.name.removeprefix("checkpoint-"): file.parent for file in complete} if args.resume else {}
    last = max((step for step in steps if step.isdigit()), key=int, default=None)
    trainer.train(resume_from_checkpoint=str(steps[last]) if last else None)
    trainer.generator.save_pretrained(args.output)
    training = trainer.generator.config.training or {}
    figures = {metric["type"]: metric["value"] for metric in training["metrics"]}
    say(args, f"{args.output}: " + ", ".join(f"{name} {value}" for name, value in figures.items()))
    return {"generator": args.output, **figures}


def _encode(args: argparse.Namespace, collection: AdapterCollection) -> TaskEncoder:
    """The encoder: --encoder, else the collection's own, else the bundled one. Vectors that are of it already are kept."""
    from .conditioning import load_task_encoder
    from .tasks import load_tasks
    from .tasks.annotated_images import crops
    from .tasks.detection import DetectionTask

    own = collection.encoder
    if own and not args.encoder:
        encoder = load_task_encoder(own, from_hub=not Path(args.collection).is_dir(), token=args.token)
    else:
        encoder = load_encoder(args.encoder or f"{BUNDLED}text", args.token)
    tasks = load_tasks(args.tasks) if args.tasks else []
    pictures = {task.name: crops(task.train_images, task.label, args.pictures) for task in tasks if isinstance(task, DetectionTask)}
    had = set(collection.task_vectors) == set(collection.tasks)
    if had and own and own["sha256"] == encoder.config["sha256"] and not pictures:
        say(args, f"Task vectors: the collection's own, by the {encoder.kind} encoder {encoder.config['checkpoint']}.")
        return encoder
    collection.encode(encoder, images=pictures)
    instead = " in the place of the collection's own" if had else ""
    say(args, f"Task vectors{instead}: by the {encoder.kind} encoder {encoder.config['checkpoint']}.")
    return encoder


def generate(args: argparse.Namespace) -> dict[str, Any]:
    """A sentence (or examples, or pictures) becomes a PEFT folder."""
    check_folder(args.output, ADAPTER)
    with importing():
        import torch

        from .adapters.saving import save_adapter
        from .generator import modeling_icm  # noqa: F401

    generator = load_generator(args.generator, revision=args.revision, token=args.token)
    heard = _hear(args, generator) if generator.can_read(args.text, examples=args.example, images=args.image) else None
    with one_line_warnings():
        model = generator.generate_adapter(
            args.text,
            args.base_model,
            examples=args.example,
            images=args.image,
            temperature=args.temperature,
            generator=torch.Generator().manual_seed(args.seed),
            on_unknown=args.on_unknown,
            strength=args.strength,
        )
    folder = save_adapter(model, args.output)
    base = model.peft_config["default"].base_model_name_or_path
    say(args, f"{folder}: {generator.layout.numel:,} numbers for {base}")
    numel = generator.layout.numel
    facts = {"adapter": str(folder.resolve()), "base_model": base, "text": args.text, "seed": args.seed, "numel": numel}
    return {**facts, "heard": heard}


def read(args: argparse.Namespace) -> dict[str, Any]:
    """Tell which task a generator hears in a request, and whether it knows it."""
    with importing():
        from .generator import modeling_icm  # noqa: F401

    generator = load_generator(args.generator, revision=args.revision, token=args.token)
    heard = _hear(args, generator)
    for name, probability in list(heard["tasks"].items())[: args.top]:
        say(args, f"{name:24} {probability:5.2f} {'#' * round(40 * probability)}")
    if len(heard["tasks"]) > args.top:
        say(args, f"... and {len(heard['tasks']) - args.top} more tasks (--top)")
    threshold = heard["threshold"]
    if threshold is None:
        say(args, "This generator has no threshold: it takes any request for known.")
    else:
        say(args, f"{'familiarity':24} {heard['familiarity']:5.2f} {'#' * round(40 * heard['familiarity'])}")
        say(args, f"{'threshold':24} {threshold:5.2f} {'#' * round(40 * threshold)}  {'known' if heard['known'] else 'unknown'}")
    return heard


def _hear(args: argparse.Namespace, generator: ICMGenerator) -> dict[str, Any]:
    """What `read` returns of a request, after one line that says it."""
    reading = generator.read(args.text, examples=args.example, images=args.image)
    say(args, f"{reading}: {reading.description}")
    return {**asdict(reading), "task": reading.task, "known": reading.known, "confidence": reading.confidence, "worth": reading.worth}


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """An unknown task, and what is deprecated, in one line, without the place in the code. Other warnings are left alone."""
    with warnings.catch_warnings():
        plain = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **kwargs: Any) -> None:
            if issubclass(category, UnknownTaskWarning | FutureWarning):
                print(f"peft-icm: warning: {message}", file=sys.stderr)
            else:
                plain(message, category, *where, **kwargs)

        warnings.showwarning = show
        yield


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Score a generator on held-out text or pictures against each task's own LoRA."""
    if args.output:
        file = Path(args.output)
        if file.is_dir() or file.suffix.lower() == ".png" or not file.absolute().parent.is_dir():
            raise ValueError(f"--output {file} must be a JSON file in a folder that exists; a plot is drawn beside it as .png.")
        _check_writable(file)
    if args.requests and len(args.seeds or [0]) > 1:
        raise ValueError(f"--seeds {' '.join(map(str, args.seeds))}: --requests are scored with one seed of z, pass one.")
    launching = LaunchArguments(**chosen(args, LaunchArguments))
    from transformers import AutoProcessor

    from .adapters.base import opening_base
    from .adapters.collection import AdapterCollection
    from .disk import replacing_file
    from .evaluation.detection import DetectionEvaluation, evaluate_detection
    from .evaluation.memorisation import check_layout
    from .evaluation.requests import evaluate_requests, load_requests
    from .evaluation.text import Evaluation, evaluate_generator
    from .tasks import load_tasks
    from .tasks.detection import DetectionTask

    generator = load_generator(args.generator, token=args.token)
    collection = AdapterCollection.from_pretrained(args.collection, token=args.token)
    tasks: Any = load_tasks(args.tasks)
    check_layout(generator, collection)
    name = str(generator.load_base().name_or_path)
    with opening_base(name):
        processor = AutoProcessor.from_pretrained(name, token=args.token)
    own = {task: collection.final(task) for task in collection.tasks}
    options = {"batch_size": args.batch_size, "launching": launching}
    seeds = {"seeds": args.seeds} if args.seeds else {}
    report: Any
    kind: Any = DetectionEvaluation if isinstance(tasks[0], DetectionTask) else Evaluation
    if args.metric and (args.requests or kind is DetectionEvaluation):
        raise ValueError(f"--metric {args.metric[0]} is of the answers to prompts: it goes with language tasks, and without --requests.")
    if args.requests:
        known, unknown = load_requests(args.requests, [task.name for task in tasks])
        some = [task for task in tasks if task.name in known]
        seed = (args.seeds or [0])[0]
        report = evaluate_requests(kind, generator, processor, some, own, known, unknown, seed=seed, **options)
    elif kind is DetectionEvaluation:
        report = evaluate_detection(generator, processor, tasks, own, **seeds, **options)
    else:
        report = evaluate_generator(generator, processor, tasks, own, metrics=args.metric, **seeds, **options)
    result = report.to_dict()
    if args.output:
        with replacing_file(file) as new:
            new.write_text(json.dumps(result, indent=1))
        report.plot(file.with_suffix(".png"))
    say(args, report.table())
    return result


def app(args: argparse.Namespace) -> dict[str, Any]:
    """A page in the browser: a sentence, what is heard, base and adapted model side by side."""
    if find_spec("gradio") is None:
        raise OSError("The page needs gradio, which is not installed: pip install 'peft-icm[app]'.")
    from .app.page import serve
    from .app.serving import Service

    generator = load_generator(args.generator, revision=args.revision, token=args.token)
    serve(Service(generator, args.base_model, args.token), share=args.share, say=partial(print, file=sys.stderr, flush=True))
    return {}


def push(args: argparse.Namespace) -> dict[str, Any]:
    """Push a generator, a generated adapter or a collection to the Hub, with its card."""
    folder = Path(args.folder)
    held = next((mark for mark in (COLLECTION, ADAPTER, GENERATOR) if (folder / mark).is_file()), None)
    what = {COLLECTION: "a collection", ADAPTER: "an adapter"}
    if held is None:
        raise ValueError(f"{folder} holds no generator, no adapter and no collection.")
    only = {"--with-report": args.with_report, "--with-requests": args.with_requests, "--picture": args.picture, "--dtype": args.dtype}
    for option, value in only.items():
        if value and held in what:
            raise ValueError(f"{option} is for generators, {folder} holds {what[held]}: push it without.")
    if args.with_base_model and held == COLLECTION:
        raise ValueError(f"--with-base-model is for generators and adapters, {folder} holds a collection: push it without.")
    launching = LaunchArguments(**chosen(args, LaunchArguments))
    if launching.launcher != "local" and not args.with_report:
        raise ValueError(f"--launcher {launching.launcher} is where --with-report is made: pass a COLLECTION to it, or push without.")
    options = {"private": args.private or None, "revision": args.revision, "create_pr": args.create_pr, "token": args.token}
    from .adapters.collection import AdapterCollection
    from .adapters.saving import push_adapter

    if held == COLLECTION:
        info = AdapterCollection.from_pretrained(folder).push_to_hub(args.repo_id, **options)
    elif held == ADAPTER:
        info = push_adapter(folder, args.repo_id, with_base_model=args.with_base_model, **options)
    else:
        generator = load_generator(str(folder), token=args.token)
        report = _memorisation(generator, args.with_report, launching, args.token) if args.with_report else None
        if args.with_requests:
            from .evaluation.requests import card_facts

            generator.config.training = {**(generator.config.training or {}), "requests": card_facts(args.with_requests, generator)}
        also = {"report": report, "picture": args.picture, "dtype": args.dtype, "with_base_model": args.with_base_model}
        info = generator.push_to_hub(args.repo_id, **also, **options)
    say(args, str(info.commit_url))
    return {"repo_id": args.repo_id, "commit": info.oid, "url": str(info.commit_url)}


def _memorisation(generator: ICMGenerator, name: str, launching: LaunchArguments, token: str | None) -> dict[str, Any]:
    """The report from a collection; one that `collect` wrote has no task vectors, the generator's own encoder makes them."""
    from .adapters.collection import AdapterCollection
    from .evaluation.memorisation import memorisation_report

    collection = AdapterCollection.from_pretrained(name, token=token)
    if not collection.task_vectors and generator.config.encoder:
        collection.encode(generator.encoder)
    return memorisation_report(generator, collection, launching=launching)


def say(args: argparse.Namespace, line: str) -> None:
    """Print a line, where there is no --json."""
    if not args.json:
        print(line, flush=True)
