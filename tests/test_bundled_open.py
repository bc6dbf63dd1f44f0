"""The bundled open world: classes that nothing was trained on are found after a look at pictures of them."""

import json
import warnings

import pytest
import torch
from transformers import AutoProcessor

from peft_icm import ICMGenerator, UnknownTaskWarning, bundled_generator
from peft_icm.bundled import BUNDLES, bundled_folder
from peft_icm.cli import main
from peft_icm.evaluation.detection import DetectionEvaluation
from peft_icm.tasks import load_tasks
from peft_icm.tasks.annotated_images import crops


@pytest.fixture(scope="module")
def generator():
    return ICMGenerator.from_pretrained(bundled_generator("open"))


@pytest.fixture(scope="module")
def tasks():
    return load_tasks(bundled_folder("open") / "tasks")


def score(model, processor, task):
    return DetectionEvaluation.score(model, processor, task)["map_50"]


def test_unseen_classes_are_found_from_pictures_and_not_from_those_of_another_class(generator, tasks):
    assert not {task.name for task in tasks} & {task["name"] for task in generator.config.tasks}, "nothing was trained on them"
    model = generator.generate_adapter(images=crops(tasks[0].train_images, tasks[0].label, 8), temperature=0.0)
    processor = AutoProcessor.from_pretrained(model.get_base_model().name_or_path)
    right, wrong = [], []
    for task, other in zip(tasks, [*tasks[1:], tasks[0]], strict=True):
        for source, scores in ((task, right), (other, wrong)):
            pictures = crops(source.train_images, source.label, 8)
            model = generator.generate_adapter(base_model=model, images=pictures, temperature=0.0)
            scores.append(score(model, processor, task))
    with model.disable_adapter():
        assert score(model, processor, tasks[0]) < 0.05, "the base has no name for it"
    assert sum(right) / len(right) > 0.25
    assert sum(wrong) < 0.5 * sum(right)


def test_it_learns_from_a_few_scenes(generator, tasks):
    task = tasks[1]
    processor = AutoProcessor.from_pretrained(generator.load_base().name_or_path)
    examples = task.train_dataset(processor, location_step=20, negatives=1.0)
    model = generator.adapt(labelled=examples, images=crops(task.train_images, task.label, 8), steps=12)
    assert score(model, processor, task) > 0.25


def test_it_lies_on_the_base_and_the_encoder_of_the_others(generator):
    config = json.loads((BUNDLES / "open" / "generator" / "config.json").read_text())
    folders = {part["folder"] for part in config["encoder"]["parts"].values()}
    assert folders == {"../../encoder", "../../detection/generator/base_model"}
    assert not (BUNDLES / "open" / "generator" / "base_model").exists()
    assert generator.load_base().name_or_path.endswith("detection/generator/base_model")
    assert generator.encoder.accepts == ("text", "images")


def test_it_travels_with_its_base(generator, tasks, tmp_path):
    generator.save_pretrained(tmp_path)
    moved = ICMGenerator.from_pretrained(tmp_path)
    assert moved.load_base().name_or_path == str(tmp_path / "encoder" / "images")
    pictures = crops(tasks[0].train_images, tasks[0].label, 2)
    one, two = (found.generate_state_dict(images=pictures, temperature=0.0) for found in (generator, moved))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_it_tells_the_nouns_it_was_trained_on_from_others(generator, tasks, capsys):
    for line in ("detect bicycles", "find the guitar", "box every rhinoceros, please"):
        assert generator.read(line).known
    for task in tasks:
        assert not generator.read(task.descriptions[0]).known
    with pytest.warns(UnknownTaskWarning, match=r"Show it pictures of it \(images=\)"):
        generator.generate_state_dict("detect zzzqqq")
    assert main(["read", "bundled:open", "detect bicycles"]) == 0
    shown = capsys.readouterr().out
    assert "heard: bicycle (0.9" in shown and f"... and {len(generator.config.tasks) - 10} more tasks" in shown


def test_pictures_are_never_unknown(generator, tasks):
    pictures = crops(tasks[0].train_images, tasks[0].label, 2)
    for given in ({"images": pictures}, {"text": tasks[0].descriptions[0], "images": pictures}):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UnknownTaskWarning)
            generator.generate_state_dict(**given, on_unknown="raise")
        with pytest.raises(ValueError, match="pass text= alone"):
            generator.read(**given)


def test_a_noun_that_it_was_trained_on_is_heard(generator):
    one, again, other = (
        generator.sample(generator.task_vector(text), temperature=0.0)[0] for text in ("detect guitars", "find the guitars", "detect pens")
    )
    assert (one - again).norm() < (one - other).norm()
