"""The command line: what people type, right and wrong."""

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError

import pytest
import torch
from hub_server import TOKEN
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_training import tiny_collection
from tiny import TEXTS, generator, llama, tokenizer
from transformers import AutoModelForCausalLM

from peft_icm import AdapterCollection, CollectingArguments, ICMConfig, ICMGenerator, ICMTrainingArguments, bundled_generator
from peft_icm.bundled import bundled_encoder, bundled_folder
from peft_icm.cli import VERBS, main, parse
from peft_icm.conditioning import ClipEncoder
from peft_icm.conditioning.phrasings import FRAMES
from peft_icm.tasks import load_tasks

SENTENCE = "continue a Shakespeare play"


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a tiny base, tasks of real text, and what `collect` makes of them."""
    folder = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    llama(vocab_size=len(tokenizer()), max_position_embeddings=128).save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    (folder / "tasks").mkdir()
    entries = []
    for name, text in zip(("sonnet", "novel", "genesis"), TEXTS, strict=True):
        (folder / "tasks" / f"{name}.train.txt").write_text(text)
        (folder / "tasks" / f"{name}.test.txt").write_text(text[::-1][:90])
        entry = {
            "name": name,
            "descriptions": [f"write a {name}", f"{name}, please"],
            "unseen_descriptions": [f"something like a {name}"],
        }
        entries.append({**entry, "train": f"{name}.train.txt", "test": f"{name}.test.txt"})
    (folder / "tasks" / "tasks.json").write_text(json.dumps({"tasks": entries}))
    arguments = ["collect", folder / "base", "--tasks", folder / "tasks", "-o", folder / "collection", "--epochs", 6, "--snapshots", 5,
                 "--block-size", 32, "--learning-rate", 0.01, "--json"]  # fmt: skip
    assert run(*arguments) == 0
    return folder


class TestGenerate:
    def test_writes_a_peft_folder(self, tmp_path, capsys):
        assert run("generate", "bundled:text", SENTENCE, "-o", tmp_path / "a", "--json") == 0
        result = json.loads(capsys.readouterr().out)
        assert result["adapter"] == str(tmp_path / "a") and result["text"] == SENTENCE and result["seed"] == 0
        assert {file.name for file in (tmp_path / "a").iterdir()} == {
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        base = AutoModelForCausalLM.from_pretrained(result["base_model"])
        assert isinstance(PeftModel.from_pretrained(base, tmp_path / "a"), PeftModel)

    def test_the_seed_decides(self, tmp_path):
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            assert run("generate", "bundled:text", SENTENCE, "-o", tmp_path / name, "--seed", seed) == 0
        a, b, c = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "abc")
        assert all(torch.equal(a[key], b[key]) for key in a) and any(not torch.equal(a[key], c[key]) for key in a)

    def test_another_base_of_the_same_shape(self, tmp_path, capsys):
        base = AutoModelForCausalLM.from_pretrained(Path(bundled_generator("text")) / "base_model")
        with torch.no_grad():
            base.get_input_embeddings().weight.mul_(1.5)
        base.save_pretrained(tmp_path / "other")
        arguments = ["generate", "bundled:text", SENTENCE, "-o", tmp_path / "a", "--base-model", tmp_path / "other", "--json"]
        assert run(*arguments) == 0
        assert json.loads(capsys.readouterr().out)["base_model"] == str(tmp_path / "other")
        config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(tmp_path / "other")

    def test_a_text_before_and_after_options(self, tmp_path):
        Image.new("RGB", (40, 30), (200, 30, 40)).save(tmp_path / "red.png")
        image = ["--image", tmp_path / "red.png"]
        for name, said in (("before", [SENTENCE, *image]), ("after", [*image, SENTENCE])):
            assert run("generate", "bundled:text", *said, "-o", tmp_path / name) == 0
        a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
        assert all(torch.equal(a[key], b[key]) for key in a)

    def test_pictures_alone_and_beside_a_text(self, tmp_path):
        pictures = []
        for name, colour in (("red", (200, 30, 40)), ("blue", (20, 30, 220))):
            Image.new("RGB", (40, 30), colour).save(tmp_path / f"{name}.png")
            pictures += ["--image", tmp_path / f"{name}.png"]
        for name, said in (("text", [SENTENCE]), ("both", [SENTENCE, *pictures]), ("pictures", pictures)):
            assert run("generate", "bundled:text", *said, "-o", tmp_path / name) == 0
        found = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("text", "both", "pictures")]
        assert all(any(not torch.equal(a[key], b[key]) for key in a) for a, b in pairwise(found))


class TestWrong:
    """Exit code 2, one line that says what to do, nothing written."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["generate", "bundled:text", "", "-o", "OUT"], "must be a non-empty sentence"),
            (["generate", "bundled:text", "-o", "OUT"], "encoder reads, text= and/or images=, or task_vector= alone; found none of them"),
            (
                ["generate", "bundled:text", "--example", "x", "-o", "OUT"],
                "encoder reads, text= and/or images=, or task_vector= alone; found examples=",
            ),
            (["generate", "bundled:text", "--image", "EMPTY", "-o", "OUT"], "is no picture that can be opened"),
            (["generate", "bundled:encoder", SENTENCE, "-o", "OUT"], "no bundled generator 'encoder': choose one of"),
            (["generate", "bundled:nope", SENTENCE, "-o", "OUT"], "no bundled generator 'nope': choose one of detection, text"),
            (["generate", "bundled:text", SENTENCE, "-o", "OUT", "--temperature", "-1"], "temperature=-1.0 must be a finite number >= 0"),
            (["generate", "org/misspelt", SENTENCE, "-o", "OUT"], "org/misspelt"),
            (["generate", "no/such/folder", SENTENCE, "-o", "OUT"], "no/such/folder"),
            (["generate", "bundled:text", SENTENCE, "-o", "OUT", "--base-model", "BASE"], "expected"),
            (["collect", "BASE", "--tasks", "EMPTY", "-o", "OUT"], "needs a tasks.json"),
            (["collect", "BASE", "--tasks", "TASKS", "-o", "OUT", "--rank", "0"], "rank"),
            (["collect", "BASE", "--tasks", "TASKS", "-o", "OUT", "--shard", "5/2"], "shard='5/2' must be 'i/n'"),
            (["train", "EMPTY", "-o", "OUT"], "no adapter collection"),
            (
                ["train", "COLLECTION", "-o", "OUT", "--encoder", "bert:x"],
                "KIND:CHECKPOINT with KIND one of clip, hidden_state, sentence",
            ),
            (["evaluate", "bundled:text", "--tasks", "EMPTY", "--collection", "COLLECTION"], "needs a tasks.json"),
            (["push", "EMPTY", "org/name"], "holds no generator, no adapter and no collection"),
        ],
    )
    def test_is_one_line(self, work, hub, tmp_path, capsys, arguments, message):
        (tmp_path / "empty").mkdir()
        places = {
            "OUT": tmp_path / "out",
            "EMPTY": tmp_path / "empty",
            "BASE": work / "base",
            "TASKS": work / "tasks",
            "COLLECTION": work / "collection",
        }
        assert run(*(places.get(argument, argument) for argument in arguments)) == 2
        errors = capsys.readouterr().err.strip().splitlines()
        assert errors[-1].startswith("peft-icm: error: ") and message in errors[-1]
        assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())

    def test_a_truncated_generator(self, tmp_path, capsys):
        ICMGenerator.from_pretrained(bundled_generator("text")).save_pretrained(tmp_path / "g")
        file = tmp_path / "g" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])
        assert run("generate", tmp_path / "g", SENTENCE, "-o", tmp_path / "out") == 2
        assert "model.safetensors" in capsys.readouterr().err and not (tmp_path / "out").exists()

    def test_an_unknown_verb_and_a_missing_option(self, capsys):
        for arguments in (["dance"], ["generate", "bundled:text", SENTENCE]):
            with pytest.raises(SystemExit) as stop:
                main(arguments)
            assert stop.value.code == 2

    def test_no_token(self, work, hub, capsys):
        assert run("push", work / "collection", "org/loras") == 2
        assert "401" in capsys.readouterr().err


class TestPushWithReport:
    """What cannot be reported on is refused before anything is pushed."""

    def refused(self, hub, capsys, folder, collection):
        assert run("push", folder, "org/tiny", "--token", TOKEN, "--with-report", collection) == 2
        assert not hub.repos
        return capsys.readouterr().err

    def test_what_is_no_generator(self, work, hub, tmp_path, capsys):
        (tmp_path / "adapter_config.json").write_text("{}")
        for folder, held in ((work / "collection", "a collection"), (tmp_path, "an adapter")):
            assert f"--with-report is for generators, {folder} holds {held}" in self.refused(hub, capsys, folder, work / "collection")

    def test_a_collection_that_does_not_fit(self, work, hub, tmp_path, capsys):
        generator().save_pretrained(tmp_path / "g")
        assert "another layout than the generator: lora_alpha: expected 8, found 4" in self.refused(
            hub, capsys, tmp_path / "g", work / "collection"
        )
        collection = tiny_collection()
        collection.encoder = {"kind": "clip", "sha256": "1" * 64}
        collection.save_pretrained(tmp_path / "c")
        assert f"by the encoder of sha256 {'1' * 12}" in self.refused(hub, capsys, tmp_path / "g", tmp_path / "c")
        collection.task_vectors, collection.encoder = {}, None
        collection.save_pretrained(tmp_path / "c")
        assert "no task vectors for 'task0'" in self.refused(hub, capsys, tmp_path / "g", tmp_path / "c")
        assert "is neither a folder nor a dataset repo" in self.refused(hub, capsys, tmp_path / "g", "org/none")


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


def test_generate_imports_only_what_it_uses(tmp_path):
    arguments = ["generate", "bundled:text", SENTENCE, "-o", str(tmp_path / "a")]
    unused = {"datasets", "diffusers", "pycocotools", "matplotlib", "sklearn", "evaluate", "transformers.trainer"}
    code = f"import sys\nfrom peft_icm.cli import main\nassert main({arguments!r}) == 0\nprint('unused:', *({unused!r} & set(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert finished.stdout.splitlines()[-1] == "unused:", finished.stdout + finished.stderr


class TestOutput:
    """Looked at before the work: a file, a folder of something else, or one that nobody may write to."""

    @pytest.mark.parametrize("verb", ["demo", "collect", "train", "generate"])
    @pytest.mark.parametrize("kind", ["file", "link", "folder", "below a file"])
    def test_is_refused_first(self, work, tmp_path, capsys, monkeypatch, verb, kind):
        output = tmp_path / "out"
        if kind == "file":
            output.write_text("mine")
        elif kind == "link":
            output.symlink_to(tmp_path / "nowhere")
        elif kind == "folder":
            output.mkdir()
            (output / "mine").write_text("mine")
        else:
            (tmp_path / "file").write_text("mine")
            output = tmp_path / "file" / "out"
        before = sorted(tmp_path.rglob("*"))
        arguments = {
            "demo": [],
            "collect": [work / "base", "--tasks", work / "tasks"],
            "train": [work / "collection"],
            "generate": ["bundled:text", SENTENCE],
        }[verb]
        assert run(verb, *arguments, "-o", output) == 2
        errors = capsys.readouterr().err.strip().splitlines()
        assert len(errors) == 1 and f"--output {output}" in errors[0]
        assert sorted(tmp_path.rglob("*")) == before

    def test_an_older_adapter_is_replaced_and_an_empty_folder_filled(self, tmp_path):
        (tmp_path / "a").mkdir()
        for _ in range(2):
            assert run("generate", "bundled:text", SENTENCE, "-o", tmp_path / "a") == 0

    def test_of_a_report(self, work, tmp_path, capsys):
        for output in (tmp_path, tmp_path / "none" / "report.json"):
            arguments = ["bundled:text", "--tasks", work / "tasks", "--collection", work / "collection"]
            assert run("evaluate", *arguments, "-o", output) == 2
            assert f"--output {output} must be a JSON file in a folder that exists" in capsys.readouterr().err


class TestErrors:
    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.ENOSPC, "No space left on device"),
            SafetensorError("I/O error:\n File too large"),
            Image.DecompressionBombError("too many pixels"),
            UnpicklingError("no pickle"),
            StrictDataclassError("field\n  wrong"),
            json.JSONDecodeError("Expecting value", "", 0),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_of_libraries_are_one_line_and_debug_shows_where(self, tmp_path, capsys, monkeypatch, error):
        def fail(*_, **__):
            raise error

        monkeypatch.setattr("peft_icm.generator.modeling_icm.ICMGenerator.from_pretrained", fail)
        arguments = ["generate", "bundled:text", SENTENCE, "-o", tmp_path / "a"]
        assert run(*arguments) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("peft-icm: error: ")
        for shown in (["--debug", *arguments], [*arguments, "--debug"]):
            with pytest.raises(type(error)) as raised:
                run(*shown)
            assert raised.value is error

    def test_a_bug_is_a_traceback(self, tmp_path, monkeypatch):
        monkeypatch.setattr("peft_icm.generator.modeling_icm.ICMGenerator.from_pretrained", lambda *_, **__: {}["bug"])
        with pytest.raises(KeyError, match="bug"):
            run("generate", "bundled:text", SENTENCE, "-o", tmp_path / "a")

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_signals(self, tmp_path, monkeypatch, number, code):
        monkeypatch.setattr("peft_icm.generator.modeling_icm.ICMGenerator.from_pretrained", lambda *_, **__: signal.raise_signal(number))
        handlers = signal.getsignal(signal.SIGTERM), signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            assert run("generate", "bundled:text", SENTENCE, "-o", tmp_path / "a") == code
        finally:
            signal.signal(signal.SIGINT, handlers[1])
        assert signal.getsignal(signal.SIGTERM) == handlers[0]


class TestTaskVectors:
    """`train` keeps those that a collection brings, unless it is told otherwise."""

    @pytest.fixture
    def collection(self, work, tmp_path):
        collection = AdapterCollection.from_pretrained(work / "collection")
        encoder = ClipEncoder.from_pretrained(bundled_encoder())
        collection.encode(encoder)
        collection.task_vectors = {task: vectors + 0.25 for task, vectors in collection.task_vectors.items()}
        collection.save_pretrained(tmp_path / "c")
        return collection

    def center(self, folder):
        return ICMGenerator.from_pretrained(folder).statistics.condition_mean

    def test_are_kept_and_it_says_so(self, collection, tmp_path, capsys):
        assert run("train", tmp_path / "c", "-o", tmp_path / "g", "--epochs", 1) == 0
        assert "Task vectors: the collection's own, by the clip encoder" in capsys.readouterr().out
        own = torch.cat(list(collection.task_vectors.values())).mean(0)
        torch.testing.assert_close(self.center(tmp_path / "g"), own, rtol=1e-4, atol=1e-5)

    def test_make_way_for_an_encoder_that_is_asked_for(self, collection, tmp_path, capsys):
        collection.encoder["sha256"] = "1" * 64
        collection.save_pretrained(tmp_path / "c")
        arguments = ["train", tmp_path / "c", "-o", tmp_path / "g", "--epochs", 1]
        assert run(*arguments) == 2  # the collection's own cannot be had, and no other is taken in its place
        capsys.readouterr()
        assert run(*arguments, "--encoder", "bundled:text") == 0
        assert "Task vectors in the place of the collection's own: by the clip encoder" in capsys.readouterr().out
        tampered = torch.cat(list(collection.task_vectors.values())).mean(0)
        assert (self.center(tmp_path / "g") - tampered).abs().min() > 0.1


def test_from_base_to_hub(work, hub, token, tmp_path, capsys):
    generator, report = tmp_path / "generator", tmp_path / "report.json"
    capsys.readouterr()
    assert run("train", work / "collection", "-o", generator, "--epochs", 4, "--json") == 0
    assert set(json.loads(capsys.readouterr().out)) == {"generator", "variance_explained", "kl"}
    arguments = [
        "evaluate",
        generator,
        "--tasks",
        work / "tasks",
        "--collection",
        work / "collection",
        "--seeds",
        0,
        "-o",
        report,
        "--json",
    ]
    assert run(*arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(report.read_text())
    columns = {"base", "own", "generated", "unseen_phrasing", "wrong_task", "gibberish"}
    assert {"name", "gain", "share", *columns} == set(printed["tasks"][0])
    assert report.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    arguments = ["push", generator, "org/tiny", "--token", token, "--with-report", work / "collection", "--with-base-model", "--json"]
    assert run(*arguments) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"repo_id", "commit", "url"}
    files = hub.repos["models", "org/tiny"].files()
    assert [row["name"] for row in json.loads(files["memorisation.json"])["tasks"]] == ["sonnet", "novel", "genesis"]
    assert "## Does it memorise?" in files["README.md"].decode()
    assert run("push", work / "collection", "org/loras", "--token", token, "--private") == 0
    assert run("generate", "org/tiny", "write a sonnet", "-o", tmp_path / "sonnet") == 0
    assert run("push", tmp_path / "sonnet", "org/sonnet", "--token", token) == 0
    assert "write a sonnet" in hub.repos["models", "org/sonnet"].files()["README.md"].decode()
    assert hub.repos["datasets", "org/loras"].private


@pytest.mark.slow
def test_ctrl_c_in_mid_training_and_on_again(tmp_path):
    collection = tiny_collection(snapshots=20)
    collection.descriptions = {task: [f"about {task}"] for task in collection.tasks}
    collection.save_pretrained(tmp_path / "c")
    command = [sys.executable, "-m", "peft_icm.cli", "train", str(tmp_path / "c"), "-o", str(tmp_path / "g"), "--epochs", "3000"]
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a test run in the background inherits that it is ignored
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, preexec_fn=listen)
    for _ in range(900):
        if list(tmp_path.glob("g.work/checkpoint-*/trainer_state.json")) or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors[-2000:]
    assert not (tmp_path / "g").exists()
    steps = max(int(folder.name.split("-")[1]) for folder in tmp_path.glob("g.work/checkpoint-*"))
    (tmp_path / "g.work" / f"checkpoint-{steps + 1}").mkdir(exist_ok=True)  # one that was cut short
    resumed = subprocess.run([*command[:-1], str(steps // 2 + 20), "--resume", "--json"], capture_output=True, text=True, timeout=300)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert json.loads(resumed.stdout)["generator"] == str(tmp_path / "g")
    assert ICMGenerator.from_pretrained(tmp_path / "g").config.training["steps"] > 0


@pytest.mark.slow
def test_demo(tmp_path):
    """As people start it: two continuations and a few rows."""
    command = [sys.executable, "-m", "peft_icm.cli", "demo", "--output", str(tmp_path / "demo")]
    finished = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=300)
    assert finished.returncode == 0, finished.stderr[-2000:]
    result = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert result["seeds"] == [0] and 3 <= len(result["tasks"]) <= 6
    for row in result["tasks"]:
        assert row["generated"] < row["base"] and row["generated"] == pytest.approx(row["own"], rel=0.02)
        line = next(line for line in finished.stdout.splitlines() if line.startswith(f"{row['name']} "))
        printed = [float(number) for number in line.split()[1:4]]
        assert printed == pytest.approx([math.exp(row[name]) for name in ("base", "own", "generated")], rel=2e-3)
    texts = load_tasks(bundled_folder("text") / "tasks")
    assert any(text.startswith(result["opening"]) for task in texts for text in task.test_texts)
    base, generated = result["continued"]["base"], result["continued"]["generated"]
    assert base != generated and all(line in finished.stdout for text in (base, generated) for line in text.splitlines())
    assert (tmp_path / "demo" / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_demo_in_full(tmp_path):
    """The whole table, and its figures recomputed from its own rows."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "peft_icm.cli", "demo", "--full", "--json", "--output", str(tmp_path / "demo")]
    finished = subprocess.run(command, capture_output=True, text=True, env=env, timeout=500)
    assert finished.returncode == 0, finished.stderr[-2000:]
    result = json.loads(finished.stdout)
    assert set(result) == {"tasks", "share", "seeds", "seconds", "adapter", "opening", "continued"} and result["seeds"] == [0, 1, 2]
    assert len(result["tasks"]) >= 12
    for name, share in result["share"].items():
        gains = [(row["base"] - row[name], row["base"] - row["own"]) for row in result["tasks"]]
        assert share["mean"] == pytest.approx(sum(a for a, _ in gains) / sum(b for _, b in gains), abs=2e-3)
        assert share["min"] == pytest.approx(min(a / b for a, b in gains), abs=2e-2)
    share = {name: entry["mean"] for name, entry in result["share"].items()}
    assert share["generated"] > 0.95 and share["unseen_phrasing"] > 0.7
    assert share["wrong_task"] <= 0.25 and share["gibberish"] <= 0.25
    assert (tmp_path / "demo" / "demo.png").read_bytes().startswith(b"\x89PNG")
    code = (
        "import sys; sys.modules['peft_icm'] = None\n"
        "from peft import AutoPeftModelForCausalLM\n"
        f"model = AutoPeftModelForCausalLM.from_pretrained({result['adapter']!r})\n"
        "print(sum(p.numel() for n, p in model.named_parameters() if 'lora_' in n))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=200)
    assert loaded.returncode == 0, loaded.stderr[-2000:]
    assert int(loaded.stdout) == ICMGenerator.from_pretrained(bundled_generator("text")).layout.numel


class TestBundle:
    def test_each_domain_is_licensed(self):
        folder = bundled_folder("text")
        names = json.loads((folder / "tasks" / "tasks.json").read_text())["tasks"]
        licences = (folder / "LICENSES.md").read_text()
        assert all(f"| {task['name']} |" in licences for task in names)

    def test_unseen_phrasings_are_unseen(self):
        """At least five for each task, none of them made from a frame or subject of training."""
        examples = json.loads((Path(__file__).parents[1] / "examples" / "build_demo" / "phrasings.json").read_text())
        tasks = json.loads((bundled_folder("text") / "tasks" / "tasks.json").read_text())["tasks"]
        every = {s.lower() for entry in examples["tasks"].values() for s in [*entry["subjects"], entry["description"]]}
        frames = {re.sub(r"\{\w+\}", "{}", frame) for frame in FRAMES} - {"{}"}
        starts = [frame.split("{}") for frame in frames]
        for task in tasks:
            assert len(task["unseen_descriptions"]) >= 5
            for sentence in task["unseen_descriptions"]:
                assert sentence.lower() not in every
                assert not any(sentence.startswith(a) and sentence.endswith(b) for a, b in starts), sentence

    @pytest.mark.parametrize("bundle", ["text", "detection"])
    def test_own_loras_are_of_the_generators_layout(self, bundle):
        own = AdapterCollection.from_pretrained(bundled_folder(bundle) / "own")
        generator = ICMGenerator.from_pretrained(bundled_generator(bundle))
        assert own.layout.fingerprint == generator.layout.fingerprint
        assert own.tasks == [task["name"] for task in generator.config.tasks]
