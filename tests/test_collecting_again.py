"""A second `collect` into a folder: what is finished is taken for what was asked for, or not at all; and who else works there."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import PIL.Image
import pytest
import torch
from peft import LoraConfig
from tiny import TEXTS, florence_processor, llama, tokenizer
from transformers import LlamaForCausalLM

from peft_icm import CollectingArguments, collect
from peft_icm.collecting.folder import locked, task_lock
from peft_icm.collecting.recipe import write_recipe
from peft_icm.tasks.annotated_images import AnnotatedImage
from peft_icm.tasks.detection import DetectionTask
from peft_icm.tasks.language_modeling import LanguageModelingTask, TokenBlocks

NAMES = ("sonnet", "novel")
PATTERN = {"q_proj": 1, "layers.1.self_attn.q_proj": 3}


def lora(**kwargs):
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **kwargs})


def tasks(names=NAMES, texts=TEXTS):
    return [LanguageModelingTask(name, [f"about {name}"], [text], []) for name, text in zip(names, texts, strict=False)]


def arguments(folder, **kwargs):
    options = {"num_train_epochs": 1, "num_snapshots": 1, "dataset_kwargs": {"block_size": 32, "blocks_per_epoch": 1}}
    return CollectingArguments(str(folder), **{**options, **kwargs})


def own_base(folder):
    torch.manual_seed(0)
    llama(vocab_size=len(tokenizer())).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return own_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def collected(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    collect(base, tasks(), lora(rank_pattern=PATTERN), arguments(folder))
    return folder


class TestAnotherRecipe:
    @pytest.mark.parametrize(
        ("changed", "words"),
        [
            ({"rank_pattern": {"q_proj": 4}}, "lora.rank_pattern was"),
            ({"rank_pattern": {}}, "lora.rank_pattern was .*, now None"),
            ({"rank_pattern": dict(reversed(PATTERN.items()))}, "lora.rank_pattern was"),  # of two that match the first counts
            ({"alpha_pattern": {"q_proj": 3}}, "lora.alpha_pattern was None, now"),
            ({"layers_to_transform": [0]}, r"lora.layers_to_transform was None, now \[0\]"),
            ({"exclude_modules": ["layers.0.q_proj"]}, "lora.exclude_modules was None"),
            ({"init_lora_weights": "gaussian"}, "lora.init_lora_weights was True, now 'gaussian'"),
            ({"lora_dropout": 0.5}, "lora.lora_dropout was 0.0, now 0.5"),
            ({"task_type": None}, "lora.task_type was 'CAUSAL_LM', now None"),
            ({"bias": "all"}, "bias='all'"),
        ],
    )
    def test_of_the_lora(self, base, collected, changed, words):
        with pytest.raises(ValueError, match=words):
            collect(base, tasks(), lora(**{"rank_pattern": PATTERN, **changed}), arguments(collected))

    def test_what_does_not_change_the_lora_is_the_same_recipe(self, base, collected):
        config = lora(rank_pattern=PATTERN, base_model_name_or_path="elsewhere", target_modules=["v_proj", "q_proj"], lora_alpha=8.0)
        assert collect(base, tasks(), config, arguments(collected)).tasks == list(NAMES)

    def test_of_two_that_begin_at_once(self, tmp_path):
        write_recipe(tmp_path, {"seed": 0})  # by the other, after this one had looked
        with pytest.raises(ValueError, match="another recipe: seed was 0, now 1"):
            write_recipe(tmp_path, {"seed": 1})

    def test_a_base_that_was_trained_on_in_its_folder(self, collected, tmp_path):
        base = own_base(tmp_path / "base")
        collect(base, tasks(), lora(), arguments(tmp_path / "work"))
        model = LlamaForCausalLM.from_pretrained(base)
        with torch.no_grad():
            model.lm_head.weight.add_(1)
        model.save_pretrained(base)
        with pytest.raises(ValueError, match="another recipe: base_sha256 was"):
            collect(base, tasks(), lora(), arguments(tmp_path / "work"))


class TestOtherData:
    def test_of_one_name(self, base, collected):
        with pytest.raises(ValueError, match=r"novel is of a task that was trained on other data than it has now: delete it"):
            collect(base, tasks(texts=[TEXTS[0], TEXTS[2]]), lora(rank_pattern=PATTERN), arguments(collected))

    def test_that_no_epoch_may_have_drawn(self):
        assert TokenBlocks(torch.arange(8).view(4, 2), 1).fingerprint() != TokenBlocks(torch.arange(1, 9).view(4, 2), 1).fingerprint()

    def test_pictures_are_their_files_content_and_answers(self, tmp_path):
        def fingerprint(file, box=(0, 0, 8, 8), **kwargs):
            images = [AnnotatedImage(file, [list(box)], ["dog"]), AnnotatedImage(PIL.Image.new("RGB", (32, 32)))]
            return DetectionTask("dog", ["dogs"], "dog", images, []).train_dataset(florence_processor(), **kwargs).fingerprint()

        for name, colour in (("here.png", "red"), ("there.png", "red"), ("other.png", "blue")):
            PIL.Image.new("RGB", (32, 32), colour).save(tmp_path / name)
        here = fingerprint(str(tmp_path / "here.png"))
        assert here == fingerprint(tmp_path / "there.png")
        assert here == fingerprint(tmp_path / "here.png", images_per_epoch=7)  # that is a recipe's
        different = {
            here,
            fingerprint(tmp_path / "other.png"),
            fingerprint(tmp_path / "here.png", box=(0, 0, 8, 16)),
            fingerprint(tmp_path / "here.png", negatives=1.0),
            fingerprint(PIL.Image.new("RGB", (32, 32), "red")),
            fingerprint(PIL.Image.new("RGB", (32, 32), "blue")),
        }
        assert len(different) == 6

    def test_sentences_and_texts_to_test_on_are_none(self, base, collected):
        changed = tasks()
        changed[0].descriptions, changed[0].test_texts = ["fourteen lines"], ["another text"]
        collection = collect(base, changed, lora(rank_pattern=PATTERN), arguments(collected))
        assert collection.descriptions["sonnet"] == ["fourteen lines"]

    def test_of_a_task_of_ones_own(self, base, tmp_path):
        task = OwnTask([1, 2, 3])
        collect(base, [task], lora(), arguments(tmp_path))
        collect(base, [OwnTask([1, 2, 3])], lora(), arguments(tmp_path))
        with pytest.raises(ValueError, match="trained on other data"):
            collect(base, [OwnTask([1, 2, 4])], lora(), arguments(tmp_path))

    def test_too_little_of_it_is_told_before_anything_is_trained(self, base, tmp_path):
        with pytest.raises(ValueError, match="less than one block"):
            collect(base, tasks(texts=[TEXTS[0], "short"]), lora(), arguments(tmp_path))
        assert not (tmp_path / "recipe.json").exists() and not (tmp_path / "sonnet").exists()


class OwnTask:
    """All that the protocol asks for."""

    name, descriptions = "mine", "about it"

    def __init__(self, ids):
        self.ids = ids

    def train_dataset(self, processor, block_size, blocks_per_epoch):
        row = torch.tensor(self.ids)
        return [{"input_ids": row, "labels": row}]


class TestDescriptions:
    def test_one_string_is_one_sentence(self, base, tmp_path):
        assert collect(base, [OwnTask([1, 2])], lora(), arguments(tmp_path)).descriptions == {"mine": ["about it"]}

    @pytest.mark.parametrize("descriptions", [3, [""], [None]])
    def test_what_is_no_sentence_is_told_before_anything_is_trained(self, base, tmp_path, descriptions):
        task = OwnTask([1, 2])
        task.descriptions = descriptions
        with pytest.raises(ValueError, match="descriptions of task 'mine'"):
            collect(base, [task], lora(), arguments(tmp_path / "work"))
        assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("name", ["recipe.json", ".locks", "Recipe.JSON"])
def test_names_that_the_work_folder_needs(base, tmp_path, name):
    task = OwnTask([1, 2])
    task.name = name
    with pytest.raises(ValueError, match="that of a file of the work folder"):
        collect(base, [task], lora(), arguments(tmp_path))


class TestOtherProcesses:
    def test_a_task_is_left_to_the_one_that_trains_it(self, base, tmp_path, caplog):
        write_recipe(tmp_path, {})
        (tmp_path / "recipe.json").unlink()
        with locked(task_lock(tmp_path, "sonnet")) as held:
            assert held
            assert collect(base, tasks(), lora(), arguments(tmp_path)) is None
            assert "'sonnet' is being trained by another process" in caplog.text
            assert (tmp_path / "novel" / "done.json").is_file() and not (tmp_path / "sonnet").exists()
            with pytest.raises(ValueError, match="Another process is collecting into .*'sonnet'"):
                collect(base, tasks(), lora(), arguments(tmp_path))
        assert collect(base, tasks(), lora(), arguments(tmp_path)).tasks == list(NAMES)

    def test_a_task_that_another_has_just_finished_is_not_trained_again(self, base, collected, tmp_path):
        from peft_icm.collecting.work import work

        work_folder = tmp_path / "work"
        shutil.copytree(collected, work_folder)
        before = (work_folder / "sonnet" / "done.json").stat().st_mtime_ns
        list(work(str(base), tasks()[:1], lora(), arguments(work_folder), {"sonnet": "0"}))
        assert (work_folder / "sonnet" / "done.json").stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_ray_ends_with_a_script_that_is_ended(tmp_path, how):
    pytest.importorskip("ray", reason="ray is not installed: pip install peft-icm[cluster]")
    base = own_base(tmp_path / "base")
    script = tmp_path / "script.py"
    script.write_text(
        "from test_collecting_again import *\n"
        f"if __name__ == '__main__':\n    collect({str(base)!r}, tasks(), lora(), arguments({str(tmp_path / 'work')!r}, launcher='ray',"
        " num_train_epochs=100000, num_snapshots=100000))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")))}
    process = subprocess.Popen([sys.executable, str(script)], env=env, stderr=subprocess.DEVNULL, start_new_session=True)
    children = []
    try:
        end = time.monotonic() + 400
        while len({file.parent for file in (tmp_path / "work").glob("*/epoch-*")}) < 1:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        children = descendants(process.pid, "ray::_work_in")
        assert children
        process.send_signal(how)
        assert process.wait(timeout=60) != 0
        end = time.monotonic() + 60
        while alive := [pid for pid in children if is_running(pid)]:
            assert time.monotonic() < end, f"{len(alive)} of {len(children)} go on"
            time.sleep(0.1)
    finally:
        for pid in filter(is_running, [process.pid, *children]):
            os.kill(pid, signal.SIGKILL)


def descendants(pid, title):
    """Those that train; agents of Ray's own go on for a minute after a SIGKILL."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [line.split(maxsplit=2) for line in listed]
    found = [(int(child), command) for child, parent, command in rows if int(parent) == pid]
    return [child for child, command in found if command.startswith(title)] + [
        below for child, _ in found for below in descendants(child, title)
    ]


def is_running(pid):
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout.strip()
    return bool(found) and not found.startswith("Z")


class TestTheOutput:
    def test_that_is_a_file(self, base, tmp_path):
        (tmp_path / "file").write_text("mine")
        for output in ("file", "file/below"):
            with pytest.raises(OSError, match=r"output_dir='.*file.*' (is a file|cannot be made).*: choose a folder") as error:
                collect(base, tasks(), lora(), arguments(tmp_path / output))
            assert "\n" not in str(error.value)
        assert (tmp_path / "file").read_text() == "mine"


def test_a_base_without_safetensors_is_refused_before_anything_is_written(tmp_path):
    base = own_base(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"has no weights in safetensors.*convert it with save_pretrained\(safe_serialization=True\)"):
        collect(base, tasks(), lora(), arguments(tmp_path / "work"))
    assert not list((tmp_path / "work").iterdir())
    LlamaForCausalLM.from_pretrained(base, use_safetensors=False).save_pretrained(base, safe_serialization=True)
    assert collect(base, tasks()[:1], lora(), arguments(tmp_path / "work")).tasks == ["sonnet"]


def test_a_cut_snapshot_of_a_finished_task_is_named_before_the_rest_is_trained(base, tmp_path):
    collect(base, tasks()[:1], lora(), arguments(tmp_path))
    (snapshot,) = (tmp_path / "sonnet").glob("epoch-*")
    snapshot.write_bytes(snapshot.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"epoch-0001.safetensors is no whole safetensors file .*: delete its folder"):
        collect(base, tasks(), lora(), arguments(tmp_path))
    assert not (tmp_path / "novel").exists()
