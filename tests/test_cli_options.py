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


def test_options_are_called_as_in_transformers_and_trl():
    args = parse(
        ["train", "c", "--output_dir", "o", "--per_device_train_batch_size=7", "--num_train_epochs", "3", "--report_to", "tensorboard"]
    )
    assert (args.output, args.per_device_train_batch_size, args.num_train_epochs, args.report_to) == ("o", 7, 3.0, ["tensorboard"])
    assert parse(["train", "c", "-o", "o", "--batch-size", "7", "--epochs", "3"]).per_device_train_batch_size == 7
    assert parse(["read", "g", "a_b --c_d"]).text == "a_b --c_d"  # values stay as they are


@pytest.mark.parametrize("place", [["--debug", "read", "g", "t"], ["read", "--debug", "g", "t"]])
def test_debug_stands_before_or_behind_the_verb(place):
    assert parse(place).debug and not parse(["read", "g", "t"]).debug


def test_bash_completes_verbs_and_options(tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "peft-icm.bash"
    script.write_text(capsys.readouterr().out)

    def complete(*words):
        line = " ".join(words)
        code = (
            f"source {script}; COMP_WORDS=({' '.join(word or chr(39) * 2 for word in words)}); COMP_CWORD={len(words) - 1};"
            f" COMP_LINE='{line}'; _shtab_peft_icm {words[0]} '{words[-1]}' '{words[-2]}'; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        )
        return subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=60).stdout.split()

    assert complete("peft-icm", "gen") == ["generate"]
    assert complete("peft-icm", "generate", "--on-unk") == ["--on-unknown"]
    assert set(complete("peft-icm", "train", "--objective", "")) == {"reconstruction", "task"}


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


@pytest.mark.parametrize("number", ["-1", str(2**32), str(2**70), "x"])
@pytest.mark.parametrize("command", [["generate", "bundled:text", "x"], ["collect", "b", "--tasks", "t"], ["adapt", "g", "--tasks", "t"]])
def test_a_seed_that_is_none(command, number, capsys):
    with pytest.raises(SystemExit):
        parse([*command, "-o", "out", f"--seed={number}"])
    assert "argument --seed: " in capsys.readouterr().err.splitlines()[-1]


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
