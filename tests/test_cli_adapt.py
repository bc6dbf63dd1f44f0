"""`peft-icm adapt`: what is wrong is told before anything is learnt, and what was stopped can be started again."""

import json

import pytest
from command_line import run

from peft_icm.adapters import saving
from peft_icm.bundled import BUNDLES

PICTURES = BUNDLES / "open" / "tasks"


@pytest.fixture(scope="module")
def through(work, tmp_path_factory):
    """A small generator that was trained through the loss of the text tasks."""
    folder = tmp_path_factory.mktemp("through") / "generator"
    sizes = ["--latent-size", 4, "--hidden-size", 16, "--block-size", 32, "--max-steps", 2]
    given = ["--tasks", work / "tasks", "--base-model", work / "base", "--encoder", f"statistics:{work / 'base'}"]
    assert run("train", "--objective", "task", *given, "-o", folder, *sizes, "--json") == 0
    return folder


@pytest.mark.parametrize("verb", ["adapt", "collect"])
@pytest.mark.parametrize("has", ["pictures", "texts"])
def test_tasks_of_another_modality(work, through, tmp_path, capsys, verb, has):
    named, base = ("Task 'panda'", through) if has == "pictures" else ("Task 'sonnet'", "bundled:open")
    if verb == "collect":
        base = work / "base" if has == "pictures" else BUNDLES / "detection" / "generator" / "base_model"
    options = ["--epochs", 1, "--snapshots", 1] if verb == "collect" else []
    tasks = PICTURES if has == "pictures" else work / "tasks"
    assert run(verb, base, "--tasks", tasks, "-o", tmp_path / "out", "--block-size", 32, *options) == 2
    said = capsys.readouterr().err
    assert f"{named} has {has}, the base " in said and "take another base" in said
    assert not (tmp_path / "out").exists()


def test_one_example_of_the_last_task(work, through, tmp_path, capsys):
    (tmp_path / "one.jsonl").write_text('{"prompt": "2 + 2 =", "completion": " 4"}\n')
    tasks = json.loads((work / "tasks" / "tasks.json").read_text())["tasks"]
    first = {**tasks[0], "train": str(work / "tasks" / tasks[0]["train"]), "test": None}
    last = {"name": "sums", "descriptions": ["add numbers"], "train": "one.jsonl", "test": None}
    (tmp_path / "tasks.json").write_text(json.dumps({"tasks": [first, last]}))
    assert run("adapt", through, "--tasks", tmp_path, "-o", tmp_path / "out", "--block-size", 32, "--steps", 1) == 2
    assert f"Task 'sums' of {tmp_path} gives one example (of text, one block): give two at least" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_stopped_it_is_started_again(work, through, tmp_path, capsys, monkeypatch):
    adapt = ["adapt", through, "--tasks", work / "tasks", "-o", tmp_path / "out", "--block-size", 32, "--steps", 1, "--json"]

    def stop(model, folder):
        if folder.name == "novel":
            raise KeyboardInterrupt
        return saved(model, folder)

    saved = saving.save_adapter
    with monkeypatch.context() as patched:
        patched.setattr(saving, "save_adapter", stop)
        assert run(*adapt) == 130
    assert list(json.loads((tmp_path / "out" / "adapters.json").read_text())) == ["sonnet"]
    assert run(*adapt) == 0
    assert list(json.loads((tmp_path / "out" / "adapters.json").read_text())) == ["sonnet", "novel", "genesis"]
