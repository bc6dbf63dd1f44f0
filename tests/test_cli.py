"""The command line: what people type, and what comes of it."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from command_line import SENTENCE, run
from huggingface_hub import HfApi
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from test_conditioning import sentence
from test_training import tiny_collection
from tiny import generator as tiny
from transformers import AutoModelForCausalLM

from peft_icm import AdapterCollection, ICMGenerator, bundled_generator
from peft_icm.bundled import bundled_encoder
from peft_icm.conditioning import ClipEncoder, SentenceEncoder


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

    def test_a_text_that_begins_with_dashes(self, tmp_path, capsys):
        assert run("generate", "bundled:text", "-o", tmp_path / "a", "--on_unknown", "shrink", "--json", "--", "--the_bible text") == 0
        assert json.loads(capsys.readouterr().out)["text"] == "--the_bible text"

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
        text, both, pictures = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("text", "both", "pictures"))
        assert any(not torch.equal(text[key], pictures[key]) for key in text)
        assert text.keys() == both.keys()  # the same adapter where both surely mean one task


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
        plain = ("--phrasings", 0, "--condition-space", "none")
        assert run("train", tmp_path / "c", "-o", tmp_path / "g", "--epochs", 1, *plain) == 0
        assert "Task vectors: the collection's own, by the clip encoder" in capsys.readouterr().out
        own = torch.cat(list(collection.task_vectors.values())).mean(0)
        torch.testing.assert_close(self.center(tmp_path / "g"), own, rtol=1e-4, atol=1e-5)

    def test_make_way_for_an_encoder_that_is_asked_for(self, collection, tmp_path, capsys):
        collection.encoder["sha256"] = "1" * 64
        collection.save_pretrained(tmp_path / "c")
        plain = ("--phrasings", 0, "--condition-space", "none")
        arguments = ["train", tmp_path / "c", "-o", tmp_path / "g", "--epochs", 1, *plain]
        assert run(*arguments) == 2  # the collection's own cannot be had, and no other is taken in its place
        capsys.readouterr()
        assert run(*arguments, "--encoder", "bundled:text") == 0
        assert "Task vectors in the place of the collection's own: by the clip encoder" in capsys.readouterr().out
        tampered = torch.cat(list(collection.task_vectors.values())).mean(0)
        assert (self.center(tmp_path / "g") - tampered).abs().min() > 0.1


def test_a_generator_of_8_bits_from_the_start(work, tmp_path):
    assert run("train", work / "collection", "-o", tmp_path / "g", "--epochs", 1, "--phrasings", 0, "--basis-dtype", "int8") == 0
    assert load_file(tmp_path / "g" / "model.safetensors")["network.basis"].dtype == torch.int8
    assert run("generate", tmp_path / "g", "write sonnets", "-o", tmp_path / "a") == 0


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


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_push_in_a_dtype(hub, token, tmp_path, dtype):
    tiny().save_pretrained(tmp_path / "g")
    with pytest.warns(UserWarning, match="goes without its base model"):
        assert run("push", tmp_path / "g", f"org/{dtype}", "--token", token, "--dtype", dtype) == 0
    found = ICMGenerator.from_pretrained(f"org/{dtype}", token=token)
    assert found.network.basis.dtype == getattr(torch, dtype)


def test_the_token_reaches_whatever_is_private(work, hub, token, tmp_path, capsys):
    api, kind = HfApi(token=token), hub.lfs_above  # what the cache holds of one Hub is not asked of the next
    base, encoder, generator, loras = (f"org/{name}-{kind}" for name in ("base", "encoder", "generator", "loras"))
    sentence(tmp_path / "encoder")
    for name, folder in ((base, work / "base"), (encoder, tmp_path / "encoder"), (f"{encoder}-other", tmp_path / "encoder")):
        api.create_repo(name, private=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    collection = AdapterCollection.from_pretrained(work / "collection")
    collection.layout = dataclasses.replace(collection.layout, base_model_name_or_path=base)
    collection.encode(SentenceEncoder.from_pretrained(encoder, token=token, cache_dir=tmp_path / "cache"))
    for name in (loras, f"{loras}-again", f"{loras}-other"):
        collection.push_to_hub(name, token=token, private=True)
    with_token = ["--token", token]
    for arguments in (
        ["train", loras, "-o", tmp_path / "g", "--epochs", 1],
        ["train", f"{loras}-other", "-o", tmp_path / "other", "--epochs", 1, "--encoder", f"sentence:{encoder}-other"],
        ["push", tmp_path / "g", generator, "--private"],
        ["evaluate", generator, "--tasks", work / "tasks", "--collection", f"{loras}-again", "--seeds", 0],
    ):
        assert run(*arguments) == 2
        assert "the access token is missing" in (said := capsys.readouterr().err) or "pass token=" in said
        assert run(*arguments, *with_token) == 0


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
