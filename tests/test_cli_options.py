"""The options of the command line: their defaults, and how little is imported for them."""

import subprocess
import sys

import pytest
from command_line import SENTENCE

from peft_icm import CollectingArguments, ICMConfig, ICMTrainingArguments
from peft_icm.cli import VERBS, main, parse
from peft_icm.cli_tasks import example_options


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_tells_defaults(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "(default: " in out and "--json" in out


def test_defaults_are_those_of_the_dataclasses(monkeypatch):
    monkeypatch.setattr(CollectingArguments, "num_snapshots", 17)
    monkeypatch.setattr(ICMConfig, "hidden_size", 99)
    monkeypatch.setattr(ICMTrainingArguments, "per_device_train_batch_size", 5)
    assert parse(["collect", "base", "--tasks", "t", "-o", "o"]).num_snapshots == 17
    args = parse(["train", "c", "-o", "o"])
    assert args.hidden_size == 99 and args.per_device_train_batch_size == 5


@pytest.mark.parametrize(("said", "packing"), [([], {}), (["--packing"], {"packing": True}), (["--no-packing"], {"packing": False})])
def test_packing_is_told_only_where_it_was_given(said, packing):
    """What was collected before there was the option goes on: its recipe has no such field."""
    args = parse(["adapt", "g", "--tasks", "t", "-o", "o", *said])
    assert example_options(args, detection=False) == {"block_size": 256, **packing}
    assert "packing" not in example_options(args, detection=True)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["--nonsense"], ["dance"], ["generate", "--help"], ["demo", "--nonsense"]]
)
def test_help_and_wrong_options_import_nothing_heavy(arguments):
    code = (
        "import sys\nfrom peft_icm.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit: pass\n"
        "print('heavy:', *({'torch', 'transformers', 'peft', 'numpy', 'huggingface_hub'} & set(sys.modules)))"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert finished.stdout.splitlines()[-1] == "heavy:", finished.stdout + finished.stderr


def test_a_wrong_output_is_told_before_torch_is_imported():
    code = "import sys\nfrom peft_icm.cli import main\nprint(main(['generate', 'x', 'y', '-o', '/dev/null']), 'torch' in sys.modules)"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert finished.stdout == "2 False\n" and "--output /dev/null is no folder" in finished.stderr


def test_generate_imports_only_what_it_uses(tmp_path):
    arguments = ["generate", "bundled:text", SENTENCE, "-o", str(tmp_path / "a")]
    unused = {"datasets", "diffusers", "pycocotools", "matplotlib", "sklearn", "evaluate", "transformers.trainer"}
    code = f"import sys\nfrom peft_icm.cli import main\nassert main({arguments!r}) == 0\nprint('unused:', *({unused!r} & set(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert finished.stdout.splitlines()[-1] == "unused:", finished.stdout + finished.stderr
