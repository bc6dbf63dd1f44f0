"""Every example runs as it stands, offline."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script, folder, *arguments):
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    finished = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=500)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


@pytest.mark.slow
def test_quickstart(tmp_path):
    assert "HAMLET" in run("quickstart.py", tmp_path)
    assert (tmp_path / "shakespeare-lora" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_drop_in_transformers(tmp_path):
    output = run("drop_in_transformers.py", tmp_path)
    assert "pipeline: 'And the LORD said" in output and "merged: LlamaForCausalLM" in output
    assert float(output.split("logits differ by ")[1].split()[0]) < 1e-3
    before, after = output.split("perplexity of a held-out passage ")[1].split("\n")[0].split(" -> ")
    assert float(after) > 1 and float(before) > 1


@pytest.mark.slow
def test_train_on_your_loras(tmp_path):
    output = run("train_on_your_loras.py", tmp_path, "--epochs", "150")
    assert float(output.rsplit(": ", 1)[1]) > 0.9
    assert (tmp_path / "my-generator" / "base_model" / "config.json").is_file()


@pytest.mark.slow
def test_llama3_pile_at_demo_size(tmp_path):
    output = run("llama3_pile.py", tmp_path, "--demo")
    assert "P = 10,240" in output and "all tasks" in output
    assert (tmp_path / "llama3-pile" / "report.png").is_file()


@pytest.mark.slow
def test_florence2_coco_at_demo_size(tmp_path):
    output = run("florence2_coco.py", tmp_path, "--demo")
    assert "5 tasks, P = 27,492" in output and "text+pictures" in output and "motorbike" in output
    assert (tmp_path / "florence2-coco" / "task_vectors.png").is_file() and (tmp_path / "florence2-coco" / "report.png").is_file()


def test_reproduction_data_names_its_parts(tmp_path):
    output = run("reproduction_data.py", tmp_path, "--help")
    assert all(part in output for part in ("text", "detection", "smollm2"))
    assert not list(tmp_path.iterdir())
