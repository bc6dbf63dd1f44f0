"""The bundled detection generator as people meet it: the demo in a process of its own, and what travels in the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoProcessor, Florence2ForConditionalGeneration

from peft_icm import ICMGenerator, bundled_generator, detect
from peft_icm.bundled import BUNDLES, bundled_folder
from peft_icm.evaluation.detection import class_precision
from peft_icm.tasks import load_tasks
from peft_icm.tasks.annotated_images import crops

BASE = Path(bundled_generator("detection")) / "base_model"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "-m", "peft_icm.cli", "demo", "--task", "detection", "--full", "--json", "--output", str(folder)]
    finished = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=500)
    assert finished.returncode == 0, finished.stderr[-2000:]
    return json.loads(finished.stdout)


@pytest.fixture(scope="module")
def sofas():
    return next(task for task in load_tasks(bundled_folder("detection") / "tasks") if task.name == "sofa")


@pytest.mark.slow
class TestDemo:
    def test_finds_sofas_where_the_base_finds_none(self, demo):
        rows = {row["name"]: row for row in demo["tasks"]}
        assert set(rows) == {"dog", "bicycle", "cat", "sofa", "motorbike"} and demo["seeds"] == [0, 1, 2]
        for name in ("sofa", "motorbike"):
            assert rows[name]["base"]["map_50"] < 0.1 and rows[name]["generated"]["map_50"] > 0.3
        assert demo["ratio"]["generated"]["map_50"]["mean"] > 0.9

    def test_means_and_ratios_are_those_of_its_own_table(self, demo):
        mean, own = (sum(row[name]["map_50"] for row in demo["tasks"]) / 5 for name in ("generated", "own"))
        assert demo["mean"]["generated"]["map_50"] == pytest.approx(mean, abs=1e-3)
        assert demo["ratio"]["generated"]["map_50"]["mean"] == pytest.approx(mean / own, abs=1e-3)

    def test_the_saved_adapter_finds_the_boxes_that_are_reported_and_drawn_with_peft_alone(self, demo, sofas):
        images = [image for image in sofas.test_images if "couch" in image.labels][:3]
        model = PeftModel.from_pretrained(Florence2ForConditionalGeneration.from_pretrained(BASE), demo["adapter"])
        found = detect(model, AutoProcessor.from_pretrained(BASE), images)
        for one, boxes in zip(found, demo["shown"]["generated"]["boxes"], strict=True):
            mine = [box for box, label in zip(one["boxes"].tolist(), one["labels"], strict=True) if label == "couch"]
            assert np.allclose(mine, boxes)
        assert class_precision(found, images, "couch")["map_50"] == pytest.approx(demo["shown"]["generated"]["map_50"], abs=1e-4)
        with Image.open(demo["picture"]) as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        red = (pixels[..., 0] > 240) & (pixels[..., 1] < 20) & (pixels[..., 2] < 20)
        thirds = [bool(part.any()) for part in np.array_split(red, 3, axis=1)]
        assert thirds == [any(map(len, demo["shown"][name]["boxes"])) for name in ("base", "own", "generated")] == [False, True, True]


def test_text_pictures_and_both_ask_for_the_same_adapter(sofas):
    generator = ICMGenerator.from_pretrained(bundled_generator("detection"))
    pictures = crops(sofas.test_images, "couch", 4)
    conditions = ({"text": "detect sofas"}, {"images": pictures}, {"text": "detect sofas", "images": pictures})
    tasks = [task["description"] for task in generator.config.tasks]
    center = torch.stack([generator.sample(generator.task_vector(text), temperature=0)[0] for text in tasks]).mean(0)
    vectors = [generator.sample(generator.task_vector(**condition), temperature=0)[0] - center for condition in conditions]
    for vector in vectors[1:]:
        assert torch.cosine_similarity(vector, vectors[0], dim=0) > 0.9


def test_what_is_bundled_is_small_licensed_and_free_of_pickles():
    files = [file for file in BUNDLES.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 45_000_000
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pkl")]
    assert (BASE / "config.json").is_file() and (BASE / "tokenizer.json").is_file()
    licences = (bundled_folder("detection") / "LICENSES.md").read_text()
    assert all(f"@iconify-json/{style} " in licences for style in ("noto", "twemoji", "openmoji"))
    configs = [json.loads((BUNDLES / name / "generator" / "config.json").read_text()) for name in ("text", "detection")]
    assert len({config["encoder"]["sha256"] for config in configs}) == 1
