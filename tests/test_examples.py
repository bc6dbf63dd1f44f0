"""Every example runs as it stands, offline."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hub_server import READER
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from peft_icm import AdapterCollection, ICMGenerator
from peft_icm.bundled import bundled_folder
from peft_icm.tasks import load_tasks
from peft_icm.tasks.language_modeling import nll

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script, folder, *arguments, code=0, **environment):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    finished = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=500)
    assert finished.returncode == code, finished.stderr[-3000:]
    return finished.stderr if code else finished.stdout


@pytest.mark.slow
def test_quickstart(tmp_path):
    assert run("quickstart.py", tmp_path).strip().removeprefix("HAMLET.").strip()
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "shakespeare-lora").eval()
    tokenizer = AutoTokenizer.from_pretrained(model.get_base_model().name_or_path)
    shakespeare = next(task for task in load_tasks(bundled_folder("text") / "tasks") if task.name == "shakespeare")
    adapted = nll(model, tokenizer, shakespeare.test_texts)[0].perplexity
    with model.disable_adapter():  # the adapter of any other bundled task is a quarter worse than the base here
        assert adapted < 0.98 * nll(model, tokenizer, shakespeare.test_texts)[0].perplexity


@pytest.mark.slow
def test_drop_in_transformers(tmp_path):
    output = run("drop_in_transformers.py", tmp_path)
    assert "pipeline: 'And the LORD said" in output and "merged: LlamaForCausalLM" in output
    assert float(output.split("logits differ by ")[1].split()[0]) < 1e-3
    base, generated, trained = map(float, re.search(r"base ([\d.]+), generated ([\d.]+), trained on ([\d.]+)\n", output).groups())
    # The adapter of any other bundled task is worse than the base here, and training on a converged LoRA changes little.
    assert generated < 0.9 * base and trained < 0.9 * base and trained != generated


@pytest.mark.slow
def test_train_on_your_loras(tmp_path):
    output = run("train_on_your_loras.py", tmp_path, "--epochs", "150")
    assert float(output.rsplit(": ", 1)[1]) > 0.9
    assert (tmp_path / "my-generator" / "base_model" / "config.json").is_file()


@pytest.mark.slow
def test_llama3_pile_at_demo_size(tmp_path):
    output = run("llama3_pile.py", tmp_path, "--demo")
    assert "P = 10,240" in output and "all tasks" in output
    report = json.loads((tmp_path / "llama3-pile" / "report.json").read_text())
    assert [row["name"] for row in report["tasks"]] == ["wikipedia", "latex", "austen", "bible", "rust"]
    assert all(abs(row["own"] - row["base"]) > 1e-3 for row in report["tasks"])  # it shows the path; so few epochs gain nothing
    assert (tmp_path / "llama3-pile" / "report.png").is_file()


@pytest.mark.slow
def test_florence2_coco_at_demo_size(tmp_path):
    output = run("florence2_coco.py", tmp_path, "--demo")
    assert "5 tasks, P = 27,492" in output and "text+pictures" in output and "motorbike" in output
    report = json.loads((tmp_path / "florence2-coco" / "report.json").read_text())
    assert [row["name"] for row in report["tasks"]] == ["dog", "bicycle", "cat", "sofa", "motorbike"]
    for one, other in (("own", "base"), ("generated", "base"), ("pictures", "generated")):  # the path: so few epochs gain little
        assert any(row[one] != row[other] for row in report["tasks"])
    assert (tmp_path / "florence2-coco" / "task_vectors.png").is_file() and (tmp_path / "florence2-coco" / "report.png").is_file()


def test_reproduction_data_names_its_parts(tmp_path):
    output = run("reproduction_data.py", tmp_path, "--help")
    assert all(part in output for part in ("text", "detection", "smollm2"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("hub", ["lfs"], indirect=True)
def test_hf_jobs_train_pulls_a_collection_and_pushes_a_generator(hub, token, tmp_path):
    AdapterCollection.from_pretrained(bundled_folder("text") / "own").push_to_hub("me/loras", token=token)
    options = ["--epochs", "2", "--phrasings", "8", "--encoder", "bundled:text", "--token", token, "-o", "elsewhere"]
    run("hf_jobs_train.py", tmp_path, "me/loras", "me/generator", *options, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "hf"))
    generator = ICMGenerator.from_pretrained("me/generator", token=token)
    assert hub.repos["models", "me/generator"].private and len(generator.config.tasks) == 18
    header = (EXAMPLES / "hf_jobs_train.py").read_text().split("# /// script\n")[1].split("# ///")[0]
    assert tomllib.loads(header.replace("# ", ""))["dependencies"] == ["peft-icm"]  # PEP 723


@pytest.mark.slow
@pytest.mark.parametrize("hub", ["lfs"], indirect=True)
def test_hf_jobs_train_refuses_before_it_trains(hub, token, tmp_path):
    here = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    AdapterCollection.from_pretrained(bundled_folder("text") / "own").push_to_hub("me/loras", token=token, private=False)
    hub.requests.clear()
    assert "401" in run("hf_jobs_train.py", tmp_path, "me/loras", "me/generator", "--token", "hf_wrong", code=1, **here)
    AdapterCollection.from_pretrained(bundled_folder("text") / "own").push_to_hub("me/there", token=token)
    hub.requests.clear()
    told = run("hf_jobs_train.py", tmp_path, "me/loras", "me/there", "--token", READER, code=1, **here)
    assert told.splitlines()[-1].startswith("hf_jobs_train.py: error: Nothing was done, me/there cannot be pushed to, the Hub answered 403")
    assert "Traceback" not in told
    assert "unrecognized arguments: --epochs" in run("hf_jobs_train.py", tmp_path, "--epochs", "2", "me/loras", "me/g", code=2, **here)
    assert hub.requests and not any("loras" in path for _, path in hub.requests) and not list(tmp_path.glob("generator*"))
