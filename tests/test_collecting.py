"""One LoRA per task with the real Trainer: resumable, refused where it must be."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import datasets
import pytest
import torch
from filelock import FileLock
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from tiny import TEXTS, llama, tokenizer
from transformers import BertConfig, Florence2Config, LlamaConfig, T5Config

from peft_icm import AdapterCollection, CollectingArguments, collect
from peft_icm.adapters.base import base_class
from peft_icm.collecting import collector, gather
from peft_icm.tasks.language_modeling import LanguageModelingTask

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def lora(**kwargs):
    return LoraConfig(**{**LORA, **kwargs})


def tasks(names=("sonnet", "novel", "genesis")):
    return [LanguageModelingTask(name, [f"about {name}"], [text], []) for name, text in zip(names, TEXTS, strict=False)]


class Streaming(LanguageModelingTask):
    """Its examples come one after the other, as from the Hub with `streaming=True`."""

    def train_dataset(self, *args, **kwargs):
        return datasets.Dataset.from_list([*super().train_dataset(*args, **kwargs)]).with_format("torch").to_iterable_dataset()


class Counted(torch.utils.data.IterableDataset):
    """A stream that knows how long it is."""

    def __len__(self):
        return 1

    def __iter__(self):
        return iter([])


class StreamingCounted(LanguageModelingTask):
    def train_dataset(self, *args, **kwargs):
        return Counted()


def arguments(folder, **kwargs):
    options = {"num_train_epochs": 3, "num_snapshots": 2, "learning_rate": 1e-2, "dataset_kwargs": {"block_size": 32}}
    return CollectingArguments(str(folder), **{**options, **kwargs})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    llama(vocab_size=len(tokenizer())).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def collected(base, tmp_path_factory):
    """(collection, its folder) of one worker."""
    folder = tmp_path_factory.mktemp("one")
    return collect(base, tasks(), lora(), arguments(folder)), folder


def same(first, second):
    return all(torch.equal(first.snapshots[task], second.snapshots[task]) for task in first.tasks)


def test_tasks_differ_and_start_from_one_seed(collected):
    collection, _ = collected
    sonnet, novel, genesis = (collection.final(task) for task in collection.tasks)
    assert not torch.allclose(sonnet, novel) and not torch.allclose(novel, genesis)
    assert torch.cosine_similarity(sonnet, novel, dim=0) > 0.8  # most of A is still what the seed drew
    assert not torch.equal(*collection.snapshots["sonnet"])


def test_the_metadata_tells_how(collected, base):
    metadata = collected[0].metadata
    assert metadata["num_train_epochs"] == 3 and metadata["lora"]["r"] == 2 and metadata["seed"] == 0
    assert set(metadata["versions"]) == {"torch", "transformers", "peft"} and set(metadata["train_loss"]) == {
        "sonnet",
        "novel",
        "genesis",
    }
    assert collected[0].layout.base_model_name_or_path == str(base)


def test_what_0_1_0_had_is_read_with_a_warning(tmp_path, monkeypatch):
    with pytest.warns(FutureWarning, match="shard is deprecated and goes in 0.3.0: processes that are started on one folder") as caught:
        assert arguments(tmp_path, shard="1/2").launcher == "local"
    assert caught[0].filename == __file__
    with pytest.warns(FutureWarning, match="num_workers is deprecated and goes in 0.3.0: write launcher='ray'"):
        assert arguments(tmp_path, num_workers=1).launcher == "local"
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")  # as a container's quota does
    with pytest.warns(FutureWarning):
        args = arguments(tmp_path, num_workers=2)
    assert args.launcher == "ray" and args.cpus_per_task == 1


def test_each_file_of_an_epoch_is_read_once_until_it_is_saved(collected, tmp_path, monkeypatch):
    collection, folder = collected
    read = []
    monkeypatch.setattr(collector, "read_snapshot", lambda file: read.append(file) or load_file(file))
    gather(folder, tasks()).save_pretrained(tmp_path / "c")
    assert sorted(read) == sorted(folder.glob("*/epoch-*.safetensors")) and len(read) == 6
    assert same(collection, AdapterCollection.from_pretrained(tmp_path / "c"))


def test_finished_tasks_are_skipped_and_unfinished_ones_done_again(base, collected, tmp_path):
    first = collect(base, tasks()[:2], lora(), arguments(tmp_path))
    times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    (tmp_path / "novel" / "done.json").unlink()
    (tmp_path / "novel" / "epoch-0003.safetensors").write_bytes(b"half")
    again = collect(base, tasks(), lora(), arguments(tmp_path))
    assert same(first, again) and same(collected[0], again)
    assert all(file.stat().st_mtime_ns == before for file, before in times.items() if "sonnet" in str(file))


def test_snapshots_are_read_in_numeric_order(collected, tmp_path):
    collection, folder = collected
    work = tmp_path / "sonnet"
    work.mkdir()
    (tmp_path / "recipe.json").write_text('{"num_snapshots": 2}')
    (work / "done.json").write_bytes((folder / "sonnet" / "done.json").read_bytes())
    files = sorted((folder / "sonnet").glob("epoch-*"))
    (work / "epoch-9.safetensors").write_bytes(files[0].read_bytes())
    (work / "epoch-10.safetensors").write_bytes(files[1].read_bytes())
    assert torch.equal(gather(tmp_path, tasks()[:1]).final("sonnet"), collection.final("sonnet"))


def test_a_callers_lora_config_is_left_alone(base, tmp_path):
    config = lora(target_modules="all-linear")
    collect(base, tasks()[:1], config, arguments(tmp_path, num_train_epochs=1, num_snapshots=1))
    assert config.target_modules == "all-linear"


def test_snapshots_are_adapters_of_peft(collected, base, tmp_path):
    collection, folder = collected
    state = load_file(folder / "sonnet" / "epoch-0003.safetensors")
    assert torch.equal(collection.layout.flatten(state), collection.final("sonnet"))
    model = get_peft_model(llama(vocab_size=len(tokenizer())), lora())
    assert {key: tensor.shape for key, tensor in get_peft_model_state_dict(model).items()} == {
        key: tensor.shape for key, tensor in state.items()
    }


class TestRefusals:
    def test_another_recipe(self, base, collected):
        with pytest.raises(ValueError, match=r"LoRAs of another recipe: learning_rate was 0\.01, now 0\.5"):
            collect(base, tasks(), lora(), arguments(collected[1], learning_rate=0.5))

    def test_rank_zero(self, base, tmp_path):
        config = lora()
        config.r = 0
        with pytest.raises(ValueError, match="positive integer, found r=0"):
            collect(base, tasks(), config, arguments(tmp_path))

    def test_names_that_repeat(self, base, tmp_path):
        with pytest.raises(ValueError, match="different names"):
            collect(base, tasks(("a", "a")), lora(), arguments(tmp_path))

    def test_inside_torchrun(self, base, tmp_path, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="use launcher='ray' or 'submitit'"):
            collect(base, tasks(), lora(), arguments(tmp_path))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_snapshots": 9}, "num_snapshots=9 must be between 1 and num_train_epochs=3"),
            ({"launcher": "dask"}, "launcher='dask' must be one of local, ray, submitit"),
            ({"ray_address": "here:1"}, "ray_address='here:1' goes with launcher='ray', found launcher='local'"),
            ({"slurm_partition": "gpu", "launcher": "ray"}, "slurm_partition='gpu' goes with launcher='submitit', found launcher='ray'"),
            ({"cpus_per_task": 0}, "cpus_per_task=0 and slurm_time=1440 must be at least 1"),
            ({"gpus_per_task": -1}, "gpus_per_task=-1 must be a whole number or"),
            ({"gpus_per_task": 1.5}, "gpus_per_task=1.5 must be a whole number or"),
            ({"gpus_per_task": 0.5, "launcher": "submitit"}, "gpus_per_task=0.5 must be a whole number or"),
        ],
    )
    def test_arguments(self, options, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            arguments(tmp_path, **options)

    def test_a_loss_that_explodes_leaves_no_snapshot(self, base, tmp_path):
        with pytest.raises(ValueError, match="is not finite after epoch"):
            collect(base, tasks()[:1], lora(), arguments(tmp_path, learning_rate=float("inf")))
        assert not list(tmp_path.rglob("*.safetensors"))

    def test_two_layouts_in_one_folder(self, base, collected, tmp_path):
        for name in ("sonnet", "novel"):
            (tmp_path / name).mkdir()
            for file in (collected[1] / name).iterdir():
                (tmp_path / name / file.name).write_bytes(file.read_bytes())
        (tmp_path / "recipe.json").write_bytes((collected[1] / "recipe.json").read_bytes())
        done = json.loads((tmp_path / "novel" / "done.json").read_text())
        done["layout"]["peft_config"]["lora_alpha"] = 7
        (tmp_path / "novel" / "done.json").write_text(json.dumps(done))
        with pytest.raises(ValueError, match="Task 'novel' has another layout"):
            gather(tmp_path, tasks()[:2])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["local", "ray"])
def test_ctrl_c_keeps_finished_tasks(base, collected, tmp_path, launcher):
    if launcher == "ray":
        pytest.importorskip("ray", reason="ray is not installed: pip install peft-icm[cluster]")
    data = tmp_path / "tasks"
    data.mkdir()
    for name, text in zip(("sonnet", "novel", "genesis"), TEXTS, strict=True):
        (data / f"{name}.txt").write_text(text * (1 if name == "sonnet" else 400))
    entries = [{"name": n, "descriptions": [f"about {n}"], "train": f"{n}.txt"} for n in ("sonnet", "novel", "genesis")]
    (data / "tasks.json").write_text(json.dumps({"tasks": entries}))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "peft_icm.cli", "collect", str(base), "--tasks", str(data), "-o", str(out), "--epochs", "3",
               "--snapshots", "2", "--block-size", "32", "--learning-rate", "0.01", "--launcher", launcher]  # fmt: skip
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a test run in the background inherits that it is ignored
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=listen)
    done = tmp_path / "out.work" / "sonnet" / "done.json"
    for _ in range(1200):
        if done.is_file() or process.poll() is not None:
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors[-2000:]
    assert errors.strip().splitlines()[-1] == "peft-icm: stopped; what was finished is kept."
    assert done.is_file() and not (tmp_path / "out.work" / "genesis" / "done.json").exists()
    assert not out.exists() and not list((tmp_path / "out.work").rglob("*.part"))
    assert isinstance(gather(tmp_path / "out.work", tasks()[:1]), AdapterCollection)


class TestBeforeAnythingIsTrained:
    @pytest.mark.parametrize("name", ["../..", "..", "a/b", "", "x" * 300])
    def test_a_name_that_is_no_folder(self, base, tmp_path, name):
        first, second = tasks()[:2]
        second.name = name  # past the task's own check
        with pytest.raises(ValueError, match="task name"):
            collect(base, [first, second], lora(), arguments(tmp_path / "work"))
        assert not (tmp_path / "work").exists()

    def test_names_that_one_file_system_takes_for_one(self, base, tmp_path):
        first, second = tasks()[:2]
        second.name = first.name.upper()
        with pytest.raises(ValueError, match="different names"):
            collect(base, [first, second], lora(), arguments(tmp_path / "work"))

    def test_a_link_out_of_the_folder(self, base, tmp_path):
        (tmp_path / "work").mkdir()
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "photo").touch()
        (tmp_path / "work" / tasks()[0].name).symlink_to(tmp_path / "mine")
        with pytest.raises(ValueError, match="leads out of"):
            collect(base, tasks()[:1], lora(), arguments(tmp_path / "work"))
        assert (tmp_path / "mine" / "photo").exists()

    @pytest.mark.parametrize(("kind", "found"), [(Streaming, "IterableDataset"), (StreamingCounted, "Counted")])
    def test_examples_without_numbers(self, base, tmp_path, kind, found):
        with pytest.raises(ValueError, match=rf"task 'endless' returns a stream \({found}\), .*return a map-style data set"):
            collect(base, [kind("endless", ["about it"], [TEXTS[0]], [])], lora(), arguments(tmp_path / "work"))
        assert not list(tmp_path.rglob("*.safetensors"))

    @pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
    def test_a_lora_without_a_layout(self, base, tmp_path, options):
        with pytest.raises(ValueError):
            collect(base, tasks()[:1], lora(**options), arguments(tmp_path / "work"))
        assert not list(tmp_path.rglob("*.safetensors"))


def test_a_lost_snapshot_and_a_cut_one_are_named(collected, base, tmp_path):
    _, folder = collected
    work = tmp_path / "work"
    shutil.copytree(folder, work)
    lost = sorted((work / "sonnet").glob("epoch-*"))[-1]
    lost.unlink()
    with pytest.raises(ValueError, match="'sonnet' has .* snapshots"):
        gather(work, tasks())
    with pytest.raises(ValueError, match=f"finished task and has {arguments(work).num_snapshots - 1} of"):
        collect(base, tasks(), lora(), arguments(work))
    lost.write_bytes(b"half")
    with pytest.raises(ValueError, match="no whole safetensors file"):
        gather(work, tasks())
    for name in ("recipe.json", "sonnet/done.json"):
        shutil.rmtree(work)
        shutil.copytree(folder, work)
        (work / name).write_text("")
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            gather(work, tasks())


def test_a_second_process_stays_out(base, tmp_path):
    work = tmp_path / "work"
    (work / ".locks").mkdir(parents=True)
    with FileLock(work / ".locks" / "sonnet"), pytest.raises(ValueError, match="Another process"):
        collect(base, tasks()[:1], lora(), arguments(work))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(), "LlamaForCausalLM"),
        (T5Config(), "T5ForConditionalGeneration"),
        (BertConfig(), "BertForMaskedLM"),
        (Florence2Config(), "Florence2ForConditionalGeneration"),
        (BertConfig(architectures=["BertForSequenceClassification"]), "BertForSequenceClassification"),
    ],
)
def test_the_class_of_a_base_is_its_configs(config, expected):
    assert base_class(config).__name__ == expected


@pytest.mark.parametrize("name", ["QWenLMHeadModel", "pipeline", "__version__"])
def test_a_class_that_transformers_has_not(name):
    with pytest.raises(ValueError, match=f"no model class {name}"):
        base_class(LlamaConfig(architectures=[name]))
