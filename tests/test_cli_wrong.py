"""What goes wrong on the command line: exit code 2 and one line that says what to do; of a bug, the traceback."""

import errno
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from pickle import UnpicklingError

import pytest
import torch
from command_line import SENTENCE, run
from hub_server import TOKEN
from huggingface_hub.errors import HTTPError, StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from test_training import tiny_collection
from tiny import generator
from tqdm import tqdm

from peft_icm import ICMGenerator, bundled_generator
from peft_icm.cli import main
from peft_icm.cli_verbs import GENERATOR, check_folder

TASK = ["train", "--objective", "task", "--tasks", "TASKS", "-o", "OUT", "--base-model"]


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
            (["generate", "bundled:nope", SENTENCE, "-o", "OUT"], "no bundled generator 'nope': choose one of detection, open, text"),
            (["generate", "bundled:text", SENTENCE, "-o", "OUT", "--temperature", "-1"], "temperature=-1.0 must be a finite number >= 0"),
            (["generate", "bundled:text", SENTENCE, "-o", "OUT", "--strength", "-1"], "strength=-1.0 must be a finite number >= 0"),
            (["generate", "bundled:text", SENTENCE, "-o", "OUT", "--strength", "nan"], "strength=nan must be a finite number >= 0"),
            (["generate", "org/misspelt", SENTENCE, "-o", "OUT"], "org/misspelt"),
            (["generate", "no/such/folder", SENTENCE, "-o", "OUT"], "no/such/folder"),
            (["generate", "bundled:text", SENTENCE, "-o", "OUT", "--base-model", "BASE"], "expected"),
            (["generate", "BASE", SENTENCE, "-o", "OUT"], "holds no generator: its config.json is missing, or has no layout"),
            (["generate", "bundled:text", SENTENCE, "-o", "OUT", "--base-model", "/no/where"], "The base model '/no/where' is neither an"),
            (["generate", "bundled:text", SENTENCE, "-o", "OUT", "--base-model", "EMPTY"], "The base model "),
            (["collect", "/no/where", "--tasks", "TASKS", "-o", "OUT"], "The base model '/no/where' is neither an existing folder nor"),
            (["collect", "EMPTY", "--tasks", "TASKS", "-o", "OUT"], "The base model "),
            ([*TASK, "/no/where", "--encoder", "statistics:BASE"], "The base model '/no/where' is neither an existing folder nor"),
            ([*TASK, "EMPTY", "--encoder", "statistics:BASE"], "The base model "),
            ([*TASK, "BASE", "--encoder", "statistics:BASE", "--batch-size", "0"], "per_device_train_batch_size=0 must be at least 1"),
            (
                ["collect", "BASE", "--tasks", "TASKS", "-o", "OUT", "--block-size", "32", "--target-modules", "input_layernorm"],
                "A LoRA of r=2 on 'input_layernorm' does not fit a LlamaForCausalLM: ",
            ),
            (
                [*TASK, "BASE", "--encoder", "statistics:BASE", "--block-size", "32", "--target-modules", "nosuch"],
                "A LoRA of r=2 on 'nosuch' does not fit a LlamaForCausalLM: ",
            ),
            (["collect", "BASE", "--tasks", "EMPTY", "-o", "OUT"], "needs a tasks.json"),
            (["collect", "BASE", "--tasks", "TASKS", "-o", "OUT", "--rank", "0"], "rank"),
            (["push", "COLLECTION", "org/x", "--launcher", "ray"], "--launcher ray is where --with-report is made"),
            (
                ["evaluate", "bundled:text", "--tasks", "EMPTY", "--collection", "COLLECTION", "--slurm-time", "0"],
                "slurm_time=0 must be at",
            ),
            (["collect", "BASE", "--tasks", "TASKS", "-o", "OUT", "--ray-address", "h:1"], "ray_address='h:1' goes with launcher='ray'"),
            (["train", "EMPTY", "-o", "OUT"], "no adapter collection"),
            (
                ["train", "COLLECTION", "-o", "OUT", "--encoder", "bert:x"],
                "KIND:CHECKPOINT with KIND one of clip, hidden_state, joined, sentence, statistics",
            ),
            (["evaluate", "bundled:text", "--tasks", "EMPTY", "--collection", "COLLECTION"], "needs a tasks.json"),
            (["evaluate", "bundled:text", "--tasks", "TASKS", "--collection", "COLLECTION"], "has another layout than the generator: "),
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
        places["statistics:BASE"] = f"statistics:{work / 'base'}"
        assert run(*(places.get(argument, argument) for argument in arguments)) == 2
        errors = capsys.readouterr().err.strip().splitlines()
        assert errors[-1].startswith("peft-icm: error: ") and message in errors[-1]
        assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())

    def test_a_sentence_of_ten_thousand_characters_is_not_told_whole(self, tmp_path, capsys):
        for on_unknown, code in (("warn", 0), ("raise", 2)):
            assert run("generate", "bundled:text", "write " * 1700, "-o", tmp_path / "out", "--on-unknown", on_unknown) == code
            assert len(capsys.readouterr().err) < 500

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


def test_push_in_a_dtype_that_is_none(work, hub, tmp_path, capsys):
    generator().save_pretrained(tmp_path / "g")
    for folder, dtype, said in (
        (work / "collection", "int8", f"--dtype is for generators, {work / 'collection'} holds a collection"),
        (tmp_path / "g", "int4", "dtype='int4' is none that a generator is saved in: choose one of float32, bfloat16, float16, int8"),
    ):
        assert run("push", folder, "org/tiny", "--token", TOKEN, "--dtype", dtype) == 2
        assert said in capsys.readouterr().err and not hub.repos


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

    @pytest.mark.parametrize("verb", ["generate", "gather"])
    def test_the_folder_that_it_lies_in_must_be_writable_too(self, tmp_path, capsys, monkeypatch, verb):
        (tmp_path / "mine").mkdir()
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
        assert run(verb, "bundled:text", *[SENTENCE] * (verb == "generate"), "-o", tmp_path / "mine") == 2
        assert f"{tmp_path} is no folder that you may write to" in capsys.readouterr().err

    def test_of_a_report(self, work, tmp_path, capsys):
        for output in (tmp_path, tmp_path / "none" / "report.json", tmp_path / "report.png"):
            arguments = ["bundled:text", "--tasks", work / "tasks", "--collection", work / "collection"]
            assert run("evaluate", *arguments, "-o", output) == 2
            assert f"--output {output} must be a JSON file in a folder that exists" in capsys.readouterr().err
        assert not (tmp_path / "report.png").exists()


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
            HTTPError("timed out"),
            torch.OutOfMemoryError("CUDA out of memory.\n Tried to allocate 2 GiB"),
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

    @pytest.mark.parametrize(
        "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SafetensorError("I/O error: No space left on device (os error 28)")]
    )
    def test_a_full_disk(self, tmp_path, capsys, monkeypatch, error):
        def fail(*_, **__):
            raise error

        monkeypatch.setattr("peft_icm.generator.modeling_icm.ICMGenerator.from_pretrained", fail)
        assert run("generate", "bundled:text", SENTENCE, "-o", tmp_path / "a") == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("peft-icm: error: The disk is full (") and f"make room for {tmp_path / 'a'} and in " in line

    @pytest.mark.parametrize("words", [os.strerror(errno.ENOSPC), os.strerror(errno.ENOMEM)])
    def test_words_of_a_request_are_no_fault_of_the_machine(self, tmp_path, capsys, words):
        assert run("generate", "bundled:text", words, "-o", tmp_path / "a", "--on-unknown", "raise") == 2
        assert "is none of this generator's tasks" in capsys.readouterr().err

    @pytest.mark.parametrize("size", [2**62, 2**55])
    def test_too_little_memory(self, tmp_path, capsys, monkeypatch, size):
        def fail(*_, **__):
            return bytearray(size) if size == 2**62 else torch.empty(size, dtype=torch.uint8)

        monkeypatch.setattr("peft_icm.generator.modeling_icm.ICMGenerator.from_pretrained", fail)
        assert run("generate", "bundled:text", SENTENCE, "-o", tmp_path / "a") == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("peft-icm: error: There is too little memory (")

    @pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt()])
    def test_is_a_line_of_its_own_below_a_progress_bar(self, tmp_path, capsys, monkeypatch, error):
        def fail(*_, **__):
            for _ in tqdm(range(2), file=sys.stderr):
                raise error

        monkeypatch.setattr("peft_icm.generator.modeling_icm.ICMGenerator.from_pretrained", fail)
        assert run("generate", "bundled:text", SENTENCE, "-o", tmp_path / "a") in (2, 130)
        assert capsys.readouterr().err.replace("\r", "\n").splitlines()[-1].startswith("peft-icm: ")

    @pytest.mark.parametrize("bug", [KeyError("bug"), RuntimeError("bug"), TypeError("bug"), AssertionError("bug")])
    def test_a_bug_is_a_traceback(self, tmp_path, monkeypatch, bug):
        def fail(*_, **__):
            raise bug

        monkeypatch.setattr("peft_icm.generator.modeling_icm.ICMGenerator.from_pretrained", fail)
        with pytest.raises(type(bug), match="bug"):
            run("generate", "bundled:text", SENTENCE, "-o", tmp_path / "a")

    def test_of_the_hub_are_one_line(self, work, hub, tmp_path, capsys):
        hub.trouble = {"/api": (500, "")}
        assert run("generate", "org/generator", SENTENCE, "-o", tmp_path / "a") == 2
        said = "peft-icm: error: org/generator could not be read, the Hub answered 500: try again later.\n"
        assert capsys.readouterr().err == said
        assert run("push", work / "collection", "org/loras", "--token", TOKEN) == 2
        assert capsys.readouterr().err == "peft-icm: error: org/loras was not pushed, the Hub answered 500: try again later.\n"

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_signals(self, tmp_path, monkeypatch, number, code):
        monkeypatch.setattr("peft_icm.generator.modeling_icm.ICMGenerator.from_pretrained", lambda *_, **__: signal.raise_signal(number))
        handlers = signal.getsignal(signal.SIGTERM), signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            assert run("generate", "bundled:text", SENTENCE, "-o", tmp_path / "a") == code
        finally:
            signal.signal(signal.SIGINT, handlers[1])
        assert signal.getsignal(signal.SIGTERM) == handlers[0]


@pytest.mark.skipif(not Path("/dev/shm").is_mount(), reason="no other disk")
class TestOutputFolder:
    def test_the_folder_one_stands_in_and_a_link_to_another_disk(self, tmp_path, monkeypatch):
        (tmp_path / "empty").mkdir()
        monkeypatch.chdir(tmp_path / "empty")
        check_folder(".", GENERATOR)
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            (tmp_path / "link").symlink_to(folder)
            check_folder(str(tmp_path / "link"), GENERATOR)

    def test_a_mount_point_is_written_into_and_not_replaced(self, tmp_path):
        (tmp_path / "link").symlink_to("/dev/shm")
        with tempfile.NamedTemporaryFile(dir="/dev/shm") as mark:
            for output in ("/dev/shm", str(tmp_path / "link")):
                with pytest.raises(ValueError, match=f"--output {output} is a mount point"):
                    check_folder(output, Path(mark.name).name)
                check_folder(output, Path(mark.name).name, replaced=False)
