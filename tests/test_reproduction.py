"""`python -m benchmarks.paper` on tiny instances of the real classes: every part of a text and a detection family, and what goes wrong."""

import dataclasses
import json

import pytest
import torch
from test_detection import annotated
from test_detection_folder import write_split
from tiny import TEXTS, florence_processor, florence_reader, llama, tokenizer

from benchmarks.paper import run
from benchmarks.paper.__main__ import main
from benchmarks.paper.results import Table, markdown
from benchmarks.paper.scales import FLORENCE_TARGETS, SCALES, Scale
from benchmarks.paper.scoring import Memory
from benchmarks.paper.workshop import joint_task
from peft_icm import AdapterCollection

TINY = {"num_components": 4, "latent_size": 4, "hidden_size": 8}
DIFFUSION = {"steps": 2, "diffusion_steps": 2}
RECIPE = {"num_train_epochs": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 2}


def text_family(base):
    return dataclasses.replace(
        SCALES["demo"].family("text"),
        base=str(base),
        tasks=("plays", "novels"),
        lora={"lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"},
        recipe={**RECIPE, "dataset_kwargs": {"block_size": 16, "blocks_per_epoch": 4}},
        snapshots=2,
        ranks=(1, 2),
        generator=TINY,
        epochs=2,
        diffusion=DIFFUSION,
    )


def detection_family(base):
    return dataclasses.replace(
        SCALES["demo"].family("detection"),
        base=str(base),
        tasks=("dog", "cat"),
        lora={"lora_alpha": 4, "target_modules": list(FLORENCE_TARGETS), "task_type": None},
        recipe={**RECIPE, "dataset_kwargs": {"location_step": 100, "negatives": 1.0, "images_per_epoch": 2}},
        snapshots=2,
        ranks=(2,),
        generator=TINY,
        epochs=2,
        diffusion=DIFFUSION,
        pictures=4,
        test_items=1,
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A work folder with the data of both families, and bases that are filled with noise."""
    folder = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    model = llama(vocab_size=len(tokenizer()), max_position_embeddings=64)
    for family, base, reader in (
        ("text", model, tokenizer()),
        ("detection", florence_reader(max_position_embeddings=128), florence_processor()),
    ):
        base.save_pretrained(folder / f"{family}-base")
        reader.save_pretrained(folder / f"{family}-base")
    texts = folder / "data" / "text"
    texts.mkdir(parents=True)
    entries = []
    for name, text in zip(("plays", "novels"), TEXTS, strict=False):
        for split in ("train", "test"):
            (texts / f"{name}.{split}.txt").write_text(text)
        words = {"descriptions": [f"write {name}", f"continue {name}"], "unseen_descriptions": [f"I like {name}"] * 3}
        entries.append({"name": name, "train": f"{name}.train.txt", "test": f"{name}.test.txt", **words})
    (texts / "tasks.json").write_text(json.dumps({"tasks": entries}))
    pictures = folder / "data" / "detection"
    scenes = [annotated(((4, 4, 30, 30), "dog"), ((40, 8, 60, 30), "couch")), annotated(((8, 4, 24, 20), "dog"))]
    scenes.append(annotated(((9, 4, 30, 20), "couch")))
    splits = {name: write_split(pictures, name, scenes * count) for name, count in (("train", 1), ("test", 6))}
    entries = [
        {"name": name, "label": label, "descriptions": [f"detect {name}s", f"find {name}s"], "unseen_descriptions": [f"any {name}?"] * 3}
        for name, label in (("dog", "dog"), ("cat", "couch"))
    ]
    (pictures / "tasks.json").write_text(json.dumps({**splits, "tasks": entries}))
    return folder


@pytest.fixture
def tiny(work, monkeypatch):
    families = (text_family(work / "text-base"), detection_family(work / "detection-base"))
    scale = Scale("tiny", families, conv_layers=(3,), conv_ranks=(2,), conv_epochs=1, seeds=(0, 1, 2))
    monkeypatch.setitem(SCALES, "tiny", scale)
    monkeypatch.setitem(run.tables.paper.TABLE_5, 3, (0.5, 0.5, 0.5, 0.5))
    return scale


@pytest.mark.slow
def test_every_part_is_made_and_a_second_start_scores_nothing_anew(tiny, work, tmp_path):
    first = run.reproduce("tiny", work, tmp_path, quiet=True)
    assert set(first) == set(run.parts(tiny))
    folder = tmp_path / "tiny"
    for name in first:
        assert (folder / f"{name}.json").is_file() and (folder / f"{name}.md").read_text().startswith("###")
    for name in ("table1", "table4", "figure2", "figure2_states", "figure4", "figure5", "memorisation_text", "ablations"):
        assert (folder / f"{name}.png").read_bytes()[1:4] == b"PNG"
    document = json.loads((folder / "table1.json").read_text())
    assert (
        document["run"]["command"] == "python -m benchmarks.paper --scale tiny --only table1"
        and document["run"]["versions"]["torch"] == torch.__version__
    )
    assert len(document["rows"]["ICM-LoRA"]["dog AP50"]["values"]) == 3
    assert document["rows"]["ICM-LoRA"]["dog AP50"]["paper"] == 0.96
    scores = work / "tiny" / "detection" / "scores.jsonl"
    known = scores.read_text()
    second = run.reproduce("tiny", work, tmp_path, only=["table1", "table6"], quiet=True)
    assert second["table1"]["rows"] == first["table1"]["rows"] and scores.read_text() == known


def test_the_original_model_and_the_own_lora_frame_the_share(tiny, work, tmp_path):
    rows = run.reproduce("tiny", work, tmp_path, only=["table2"], quiet=True)["table2"]["rows"]
    share = {name: row["share of own gain"]["mean"] for name, row in rows.items()}
    assert share["original model"] == 0 and share["original LoRA"] == pytest.approx(1)
    assert share["own LoRA in int8"] == pytest.approx(1, abs=0.05)
    assert rows["original model"]["plays PPL"]["mean"] > rows["original LoRA"]["plays PPL"]["mean"]


def test_results_of_another_format_are_refused(tiny, work, tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "run.json").write_text(json.dumps({"format": 0, "peft_icm": "0.0.1"}))
    with pytest.raises(ValueError, match=r"results of format 0 \(peft_icm 0.0.1\).*another --output"):
        run.reproduce("tiny", work, tmp_path, only=["table2"])
    assert json.loads((tmp_path / "tiny" / "run.json").read_text())["format"] == 0


def test_a_part_that_is_not_there(tiny, work, tmp_path):
    with pytest.raises(ValueError, match=r"'table9' is no part of --scale tiny: choose from table1"):
        run.reproduce("tiny", work, tmp_path, only=["table9"])


def test_too_few_snapshots_and_another_recipe(tiny, work, tmp_path, monkeypatch):
    run.reproduce("tiny", work, tmp_path, only=["table2"], quiet=True)
    folder = work / "tiny" / "text" / "r2"
    opened = AdapterCollection.from_pretrained(folder)
    whole = dataclasses.replace(opened, snapshots={task: rows.clone() for task, rows in opened.snapshots.items()})
    fewer = {task: rows[-1:] for task, rows in whole.snapshots.items()}
    dataclasses.replace(whole, snapshots=fewer).save_pretrained(folder)
    try:
        with pytest.raises(ValueError, match="has 1 snapshots of 'plays', 2 are asked for"):
            run.reproduce("tiny", work, tmp_path, only=["table2"])
    finally:
        whole.save_pretrained(folder)
    more = dataclasses.replace(tiny, families=tuple(dataclasses.replace(family, epochs=5) for family in tiny.families))
    monkeypatch.setitem(SCALES, "tiny", more)
    with pytest.raises(ValueError, match=r"made by another recipe: epochs was 2, now 5\. Choose another --work"):
        run.reproduce("tiny", work, tmp_path, only=["table2"])


def test_the_lora_of_all_tasks_answers_with_all_classes(tiny, work):
    shop = run.Workshop(tiny.family("detection"), work / "data", work / "joint")
    examples = joint_task(shop.tasks).train_dataset(florence_processor(), location_step=100)
    assert {label for image in examples.images for label in image.labels} == {"dog", "couch"}
    assert sorted(len(image.labels) for image in examples.images) == [1, 1, 2]


@pytest.mark.parametrize("family", ["text", "detection"])
def test_a_task_that_is_not_there_or_cannot_be_tested(tiny, work, tmp_path, monkeypatch, family):
    index = ["text", "detection"].index(family)
    lacking = list(tiny.families)
    lacking[index] = dataclasses.replace(lacking[index], tasks=("unicorns",))
    monkeypatch.setitem(SCALES, "tiny", dataclasses.replace(tiny, families=tuple(lacking)))
    with pytest.raises(ValueError, match="lacks the task 'unicorns'"):
        run.reproduce("tiny", work, tmp_path, only=["table3"])


def test_a_task_without_test_text(tiny, work, tmp_path):
    file = work / "data" / "text" / "tasks.json"
    whole = file.read_text()
    document = json.loads(whole)
    document["tasks"][1]["test"] = None
    file.write_text(json.dumps(document))
    try:
        with pytest.raises(ValueError, match="Task 'novels' has no test text"):
            run.reproduce("tiny", work, tmp_path, only=["table2"])
    finally:
        file.write_text(whole)


def test_a_half_written_score_is_dropped(tmp_path):
    file = tmp_path / "scores.jsonl"
    Memory(file).get("a", lambda: {"gain": 1.0})
    with file.open("a") as stream:
        stream.write('["b", {"ga')
    memory = Memory(file)
    assert memory.known == {"a": {"gain": 1.0}}
    memory.get("c", lambda: {"gain": 2.0})
    assert Memory(file).known == {"a": {"gain": 1.0}, "c": {"gain": 2.0}}


def test_markdown_of_a_table_is_that_of_its_json():
    table = Table(
        "table1", "title", ["dog", "cat"], {"LoRA": {"dog": [0.5, 0.7], "cat": "none"}, "base": {"dog": [0.25]}}, {"base": {"dog": 0.92}}
    )
    assert table.markdown() == markdown(json.loads(json.dumps(table.to_dict())))
    assert "| base | 0.25 [0.92] |  |" in table.markdown()


def test_command_line_says_what_is_wrong(tmp_path, capsys, monkeypatch):
    assert main(["--scale", "demo", "--dry-run", "--work", str(tmp_path)]) == 2
    assert "--dry-run is for --scale paper" in capsys.readouterr().err
    assert main(["--scale", "paper", "--work", str(tmp_path), "-o", str(tmp_path / "results")]) == 2
    assert "has no tasks.json: put the paper's data there" in capsys.readouterr().err

    def bug(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr("benchmarks.paper.__main__.reproduce", bug)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["--scale", "demo", "--work", str(tmp_path), "-o", str(tmp_path / "results")])
