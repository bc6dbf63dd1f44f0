"""What is bundled: the demo, as people start it, and whose texts and sentences these are."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from peft_icm import AdapterCollection, ICMGenerator, bundled_generator
from peft_icm.bundled import bundled_folder
from peft_icm.conditioning.phrasings import FRAMES
from peft_icm.tasks import load_tasks


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
    assert set(result) == {"tasks", "share", "seeds", "seconds", "adapter", "opening", "continued", "requests"} and result["seeds"] == [
        0,
        1,
        2,
    ]
    assert len(result["tasks"]) >= 12
    for name, share in result["share"].items():
        gains = [(row["base"] - row[name], row["base"] - row["own"]) for row in result["tasks"]]
        assert share["mean"] == pytest.approx(sum(a for a, _ in gains) / sum(b for _, b in gains), abs=2e-3)
        assert share["min"] == pytest.approx(min(a / b for a, b in gains), abs=2e-2)
    share = {name: entry["mean"] for name, entry in result["share"].items()}
    assert share["generated"] > 0.95 and share["unseen_phrasing"] > 0.7
    assert share["wrong_task"] <= 0.25 and share["gibberish"] <= 0.25
    asked = result["requests"]
    assert (asked["known"], asked["unknown"]) == (36, 18) and asked["share"]["unseen_phrasings"]["generated"]["warn"] > 0.7
    for name in ("demo", "requests"):
        assert (tmp_path / "demo" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
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
