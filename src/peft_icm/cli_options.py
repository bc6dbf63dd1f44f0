"""The options of each verb of the command line.

No default is written twice: options that are fields of a dataclass or parameters of a function read theirs from there. transformers'
HfArgumentParser would do no more and could do less: it cannot read ICMConfig (annotations that a strict config inherits do not resolve)
nor parameters of a function, and shows every field of TrainingArguments, those that the verb decides too.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from typing import Any

from .unknown import ON_UNKNOWN


def seed(text: str) -> int:
    """What transformers takes for a seed: a whole number from 0 to 2^32 - 1; of others torch and numpy say less."""
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number from 0 to 2^32 - 1")
    return number


def demo_options(p: argparse.ArgumentParser) -> None:
    """Options of `peft-icm demo`."""
    p.add_argument("--task", choices=["text", "detection"], default="text", help="text: a Llama; detection: Florence-2, pictures")
    p.add_argument("--full", action="store_true", help="score all tasks, seeds and controls; takes minutes")
    p.add_argument("-o", "--output", "--output-dir", default="peft-icm-demo", help="folder for the adapter and the report")


def collect_options(p: argparse.ArgumentParser) -> None:
    """Options of `peft-icm collect`; imports torch for the defaults."""
    from .collecting import CollectingArguments

    p.add_argument("base_model", help="Hub id or folder of the base model")
    p.add_argument("--tasks", required=True, help="folder with tasks.json and its texts or annotated images")
    p.add_argument("-o", "--output", "--output-dir", required=True, help="folder or URL of the collection; progress is kept in OUTPUT.work")
    _lora_options(p)
    p.add_argument("--blocks-per-epoch", type=int, help="blocks or images in an epoch, drawn anew in each; by default all")
    own = _fields(p, CollectingArguments)
    own("--epochs", "num_train_epochs", "epochs for each task")
    own("--snapshots", "num_snapshots", "K: keep the LoRA of each of the last K epochs")
    own("--learning-rate", "learning_rate", "peak learning rate")
    own("--lr-scheduler-type", "lr_scheduler_type", "schedule")
    own("--batch-size", "per_device_train_batch_size", "blocks in a batch")
    own("--dtype", "dtype", "dtype of the frozen base")
    own("--seed", "seed", "one seed of A and B for all tasks", type=seed)
    own("--num-workers", "num_workers", "deprecated: --launcher ray", type=int)
    own("--shard", "shard", "deprecated, without effect", type=str)
    _launcher_options(p, "tasks are trained")
    _example_options(p)


def _launcher_options(p: argparse.ArgumentParser, done: str) -> None:
    from .launching.arguments import LAUNCHERS, LaunchArguments

    own = _fields(p, LaunchArguments)
    own(
        "--launcher",
        "launcher",
        f"where {done}: in this process, on Ray, or as SLURM jobs of submitit; a private base needs HF_TOKEN set there",
        choices=LAUNCHERS,
    )
    own(
        "--ray-address",
        "ray_address",
        "host:port of a Ray cluster, as head:6379; by default RAY_ADDRESS, else this machine's processes",
        type=str,
    )
    own("--cpus-per-task", "cpus_per_task", "ray, submitit: cores of each task")
    own("--gpus-per-task", "gpus_per_task", "ray, submitit: GPUs of each task; with ray a share too, and 1 if there are any", type=float)
    own("--slurm-partition", "slurm_partition", "submitit: partition of the jobs", type=str)
    own("--slurm-time", "slurm_time", "submitit: minutes after which SLURM may end a job")


def _lora_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--rank", type=int, default=2, help="r of the LoRA")
    p.add_argument("--lora-alpha", type=int, default=4, help="alpha of the LoRA")
    p.add_argument("--target-modules", nargs="+", default=["q_proj", "v_proj"], help="module names, or all-linear")


def _example_options(p: argparse.ArgumentParser) -> None:
    from .tasks.detection import DetectionTask
    from .tasks.language_modeling import LanguageModelingTask

    _fields(p, LanguageModelingTask.train_dataset)("--block-size", "block_size", "tokens in a block, or the most of an example")
    p.add_argument(
        "--packing", action=argparse.BooleanOptionalAction, help="examples one after the other in blocks; by default texts, no completions"
    )
    own = _fields(p, DetectionTask.train_dataset)
    own("--location-step", "location_step", "detection: write so many of Florence-2's location bins as one")
    own("--negatives", "negatives", "detection: images without the class for each image with it")


def train_options(p: argparse.ArgumentParser) -> None:
    """Options of `peft-icm train`; imports torch for the defaults."""
    from .generator.condition_space import SPACES
    from .generator.configuration_icm import ARCHITECTURES, ICMConfig
    from .training.arguments import OBJECTIVES, ICMTrainingArguments

    p.add_argument("collection", nargs="?", help="folder or Hub id of an adapter collection; none with --objective task")
    p.add_argument("-o", "--output", "--output-dir", required=True, help="folder of the generator; checkpoints are kept in OUTPUT.work")
    p.add_argument(
        "--tasks", help="folder of tasks: what --objective task learns; else of detection tasks, whose pictures the encoder sees too"
    )
    p.add_argument("--base-model", help="--objective task: Hub id or folder of the base")
    p.add_argument("--eval-tasks", help="--objective task: folder of tasks that nothing is trained on, to be scored on")
    _lora_options(p)
    _example_options(p)
    p.add_argument("--pictures", type=int, default=64, help="pictures of each of those tasks")
    p.add_argument(
        "--encoder", help="bundled:text or KIND:CHECKPOINT, e.g. sentence:org/name; by default the collection's own, or bundled:text"
    )
    own = _fields(p, ICMConfig)
    own("--architecture", "architecture", "network of the CVAE", choices=ARCHITECTURES)
    own("--latent-size", "latent_size", "size of z")
    own("--hidden-size", "hidden_size", "width of the hidden layers")
    own("--num-components", "num_components", "dimensions of the principal subspace; by default from the tasks and P", type=int)
    own("--basis-dtype", "basis_dtype", "int8: the principal subspace in 8 bits from the start", type=str, choices=("int8",))
    own("--num-conv-layers", "num_conv_layers", "convolutions of the paper's architecture")
    own("--kl-weight", "kl_weight", "weight of the KL term")
    own("--condition-space", "condition_space", "how task vectors are projected; by default lda", type=str, choices=SPACES)
    p.add_argument("--no-context", action="store_true", help="no attention over the pairs of other tasks")
    own = _fields(p, ICMTrainingArguments)
    own("--epochs", "num_train_epochs", "epochs", type=float)
    own("--batch-size", "per_device_train_batch_size", "snapshots in a batch")
    own("--learning-rate", "learning_rate", "peak learning rate")
    own("--objective", "objective", "reconstruction: of a collection's LoRAs; task: through the loss of the tasks", choices=OBJECTIVES)
    own("--max-steps", "max_steps", "steps in the place of epochs")
    own("--report-to", "report_to", "where the log goes too: tensorboard, trackio, wandb, all, none", type=str, nargs="+")
    own("--max-handful", "max_handful", "sentences, pictures or examples in a condition, at the most")
    own("--condition-noise", "condition_noise", "noise on a condition")
    own("--phrasings", "phrasings", "sentences that each task should have; one with fewer gets phrasings of those it has; 0 for none")
    own("--max-memory-bytes", "max_memory_bytes", "memory for the snapshots that are read at a time")
    p.add_argument("--seed", type=seed, default=0, help="seed of weights and episodes")
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT.work")
    _token(p)


def _token(p: argparse.ArgumentParser) -> None:
    p.add_argument("--token", help="access token; by default the stored one")


def _fields(p: argparse.ArgumentParser, source: Callable[..., Any]) -> Callable[..., None]:
    """Adds options whose defaults are those of a dataclass's fields or a function's parameters."""
    defaults = p.get_default("fields") or {}

    def add(option: str, name: str, about: str, **kwargs: Any) -> None:
        default = getattr(source, name) if isinstance(source, type) else inspect.signature(source).parameters[name].default
        own = f"--{name.replace('_', '-')}"  # so that a command for transformers' or trl's Trainer reads as it is
        p.add_argument(*dict.fromkeys((option, own)), dest=name, default=default, help=about, **{"type": type(default), **kwargs})
        defaults.setdefault(source, []).append(name)

    p.set_defaults(fields=defaults)
    return add


def chosen(args: argparse.Namespace, source: type) -> dict[str, Any]:
    """The values of the options that are fields of a dataclass."""
    return {name: getattr(args, name) for name in args.fields[source]}


def _request_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("generator", help="Hub id or folder of a generator; bundled:text and bundled:detection are the bundled ones")
    p.add_argument("text", nargs="?", help="what the adapter is for")
    p.add_argument("--example", action="append", help="an example of the task instead of a text; may be repeated")
    p.add_argument("--image", metavar="FILE", action="append", help="a picture of the task, alone or beside a text; may be repeated")
    p.add_argument("--revision", help="revision of the generator's repo")
    _token(p)


def read_options(p: argparse.ArgumentParser) -> None:
    """Options of `peft-icm read`."""
    _request_options(p)
    p.add_argument("--top", type=int, default=10, help="tasks that are shown")


def generate_options(p: argparse.ArgumentParser) -> None:
    """Options of `peft-icm generate`."""
    _request_options(p)
    p.add_argument("-o", "--output", "--output-dir", required=True, help="folder of the adapter")
    p.add_argument(
        "--on-unknown",
        choices=ON_UNKNOWN,
        default="warn",
        help="of a request that is none of its tasks: warn, shrink the adapter by what the reading is worth, leave the base, or refuse",
    )
    p.add_argument("--strength", type=float, default=1.0, help="factor on dW: 0 is the base")
    p.add_argument("--base-model", help="Hub id or folder of the base; by default the generator's own")
    p.add_argument("--seed", type=seed, default=0, help="seed of z")
    p.add_argument("--temperature", type=float, default=1.0, help="standard deviation of z")


def adapt_options(p: argparse.ArgumentParser) -> None:
    """Options of `peft-icm adapt`; imports torch for the defaults."""
    from .generator.adapting import AdaptingMixin

    p.add_argument("generator", help="Hub id or folder of a generator that was trained with --objective task")
    p.add_argument("--tasks", required=True, help="folder with tasks.json and its annotated images or texts: the labelled examples")
    p.add_argument("-o", "--output", "--output-dir", required=True, help="folder of the adapters, one in a folder of its own for each task")
    p.add_argument("--base-model", help="Hub id or folder of the base; by default the generator's own")
    p.add_argument("--pictures", type=int, default=8, help="detection: cut-outs of a class's objects that are shown to the generator")
    own = _fields(p, AdaptingMixin.adapt)
    own("--steps", "steps", "steps of 16 examples, at the most")
    own("--learning-rate", "learning_rate", "peak learning rate")
    own("--seed", "seed", "of the order of the examples", type=seed)
    _example_options(p)
    _token(p)


def app_options(p: argparse.ArgumentParser) -> None:
    """Options of `peft-icm app`."""
    p.add_argument("generator", help="Hub id or folder of a generator; bundled:text and bundled:detection are the bundled ones")
    p.add_argument("--base-model", help="Hub id or folder of the base; by default the generator's own")
    p.add_argument("--share", action="store_true", help="give the page a public address, through gradio's servers")
    p.add_argument("--revision", help="revision of the generator's repo")
    _token(p)


def evaluate_options(p: argparse.ArgumentParser) -> None:
    """Options of `peft-icm evaluate`."""
    p.add_argument("generator", help="Hub id or folder of a generator; bundled:text and bundled:detection are the bundled ones")
    p.add_argument("--tasks", required=True, help="folder with tasks.json and held-out texts or annotated images")
    p.add_argument("--collection", required=True, help="collection whose last snapshots are the own LoRAs")
    p.add_argument("--seeds", type=seed, nargs="+", help="seeds of z, by default 0 1 2; with --requests one, by default 0")
    p.add_argument("--batch-size", type=int, default=16, help="windows or pictures in a forward pass")
    p.add_argument(
        "--requests",
        metavar="FILE",
        help='score these sentences instead: JSON of the form {"known": {"task": ["a sentence"]}, "unknown": ["a sentence"]}',
    )
    p.add_argument(
        "--metric",
        action="append",
        default=[],
        help="of the answers to prompts, beside exact match: a metric of evaluate, whose code is run; may be repeated",
    )
    _launcher_options(p, "tasks are scored")
    _token(p)
    p.add_argument("-o", "--output", help="JSON file of the report; a plot is drawn beside it")


def completion_options(p: argparse.ArgumentParser) -> None:
    """Options of `peft-icm completion`."""
    p.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="whose script is printed")


def push_options(p: argparse.ArgumentParser) -> None:
    """Options of `peft-icm push`."""
    p.add_argument("folder", help="folder of a generator, an adapter or a collection")
    p.add_argument("repo_id", help="org/name")
    p.add_argument("--with-report", metavar="COLLECTION", help="tell in a generator's card how near it is to these LoRAs")
    p.add_argument("--with-requests", metavar="FILE", help="tell in a generator's card what evaluate --requests ... -o FILE found")
    p.add_argument("--picture", metavar="FILE", help="show a picture in a generator's card, such as demo.png of peft-icm demo")
    p.add_argument("--dtype", help="push a generator in float32, bfloat16, float16 or int8; by default as it is")
    p.add_argument("--with-base-model", action="store_true", help="push a base model that is a local folder too")
    p.add_argument("--private", action="store_true", help="create a private repo")
    p.add_argument("--revision", help="branch")
    p.add_argument("--create-pr", action="store_true", help="open a pull request")
    _launcher_options(p, "the report of --with-report is made")
    _token(p)
