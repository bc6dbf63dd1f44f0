"""The command line, `peft-icm VERB`: its verbs, their arguments, and what is said of errors."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from tempfile import gettempdir
from typing import Any, NoReturn

from . import __version__, cli_data, cli_options, cli_tasks, cli_verbs

VERBS: dict[str, tuple[Callable[[argparse.Namespace], dict[str, Any]], Callable[[argparse.ArgumentParser], None]]] = {
    "demo": (cli_verbs.demo, cli_options.demo_options),
    "tasks": (cli_data.tasks, cli_data.tasks_options),
    "gather": (cli_data.gather, cli_data.gather_options),
    "collect": (cli_data.collect, cli_options.collect_options),
    "train": (cli_tasks.train, cli_options.train_options),
    "read": (cli_verbs.read, cli_options.read_options),
    "generate": (cli_verbs.generate, cli_options.generate_options),
    "adapt": (cli_tasks.adapt, cli_options.adapt_options),
    "evaluate": (cli_verbs.evaluate, cli_options.evaluate_options),
    "app": (cli_verbs.app, cli_options.app_options),
    "push": (cli_verbs.push, cli_options.push_options),
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments; only the options of the verb that is called are built, as those of some import torch.

    Args:
        argv (`Sequence[str]`, *optional*): By default `sys.argv[1:]`.
    """
    verbs = "\n".join(f"  {name:12}{run.__doc__}" for name, (run, _) in VERBS.items())
    top = argparse.ArgumentParser(
        prog="peft-icm",
        description=f"A sentence in, a native PEFT adapter out.\n\nverbs:\n{verbs}",
        epilog="peft-icm VERB --help tells the options of a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _top_options(top)
    top.add_argument("verb", choices=VERBS, metavar="VERB", help="what to do")
    top.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    first = top.parse_args(argv)
    p = argparse.ArgumentParser(prog=f"peft-icm {first.verb}", **_about(first.verb))
    _verb_options(p, first.verb)
    p.set_defaults(debug=first.debug)
    end = first.rest.index("--") if "--" in first.rest else len(first.rest)  # what comes after it is no option
    return p.parse_intermixed_args([*map(_dashes, first.rest[:end]), *first.rest[end:]])


def completion(args: argparse.Namespace) -> dict[str, Any]:
    """Print the completion script of a shell: eval "$(peft-icm completion bash)"."""
    import shtab

    top = argparse.ArgumentParser(prog="peft-icm")
    _top_options(top)
    verbs = top.add_subparsers()
    for name, (run, _) in VERBS.items():
        p = verbs.add_parser(name, help=run.__doc__, **_about(name))
        _verb_options(p, name)
        for action in p._actions:
            if action.nargs != 0 and not action.choices and action.type in (None, str):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    script = shtab.complete(top, args.shell)
    cli_verbs.say(args, script)
    return {"shell": args.shell, "script": script}


VERBS["completion"] = (completion, cli_options.completion_options)


def _top_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--version", action="version", version=__version__)
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _about(verb: str) -> dict[str, Any]:
    return {"description": VERBS[verb][0].__doc__, "formatter_class": argparse.ArgumentDefaultsHelpFormatter}


def _verb_options(p: argparse.ArgumentParser, verb: str) -> None:
    run, options = VERBS[verb]
    p.add_argument("--json", action="store_true", help="print JSON on stdout and nothing else")
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options(p)
    p.set_defaults(run=run)


def _dashes(word: str) -> str:
    """`--learning_rate=1e-3`, as transformers and trl write it, is `--learning-rate=1e-3`."""
    option, equals, value = word.partition("=")
    return f"{option.replace('_', '-')}{equals}{value}" if word.startswith("--") else word


class _Terminated(KeyboardInterrupt):
    """SIGTERM: ends what Ctrl-C ends."""


def _terminate(*_: Any) -> NoReturn:
    raise _Terminated


def _errors_of_users() -> tuple[type[Exception], ...]:
    """What a person can cause, and no bug: everything that libraries raise for files and answers that are wrong, and too little memory."""
    from pickle import UnpicklingError

    from huggingface_hub.errors import HTTPError, StrictDataclassError
    from PIL.Image import DecompressionBombError
    from safetensors import SafetensorError

    known = (ValueError, OSError, HTTPError, StrictDataclassError, SafetensorError, DecompressionBombError, UnpicklingError)
    torch = sys.modules.get("torch")  # what was wrong before it was imported is told without it
    return (*known, torch.OutOfMemoryError) if torch else known


def _is(error: BaseException | None, *numbers: int) -> bool:
    """Whether an error, or what it was raised from, is one of the system's; torch and safetensors tell those in its words alone."""
    from safetensors import SafetensorError

    while error is not None:
        said = str(error) if isinstance(error, (RuntimeError, SafetensorError)) else ""
        if getattr(error, "errno", None) in numbers or any(os.strerror(number) in said for number in numbers):
            return True
        error = error.__cause__
    return False


def _tell(line: str) -> None:
    """A line on stderr, the last and on its own: what was stopped left its progress bars open there."""
    from tqdm import tqdm

    for bar in list(tqdm._instances):
        bar.close()
    print(f"peft-icm: {line}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv (`Sequence[str]`, *optional*): By default `sys.argv[1:]`.

    Returns:
        `int`: Exit code: 0, 2 for bad input (one line on stderr), 130 for Ctrl-C, 143 for SIGTERM.
    """
    args = parse(argv)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    warnings.filterwarnings("ignore", message=".*(shares its weight|tie_word_embeddings)")  # no verb merges
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # peft reads it
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        result = args.run(args)
    except KeyboardInterrupt as stop:
        _tell("stopped; what was finished is kept.")
        return 143 if isinstance(stop, _Terminated) else 130
    except Exception as error:
        said = " ".join(str(error).split())
        memory = isinstance(error, MemoryError) or _is(error, errno.ENOMEM)
        if args.debug or not (memory or isinstance(error, _errors_of_users())):
            raise
        if memory:
            said = f"There is too little memory ({said or 'MemoryError'}): take smaller batches, a smaller model or another machine."
        elif _is(error, errno.ENOSPC, errno.EDQUOT):
            output = f"for {args.output} and " if getattr(args, "output", None) else ""
            said = f"The disk is full ({said}): make room {output}in {gettempdir()}, and run it again; what was finished is kept."
        _tell(f"error: {said}")
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)
    if args.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
