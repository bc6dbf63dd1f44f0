"""The report on memorisation: sources whose answer is known, a trained generator, and what is refused."""

import dataclasses
import json
import math
import weakref
from collections.abc import Mapping

import pytest
import torch
from PIL import Image
from test_training import arguments, config, tiny_collection
from tiny import CONDITION_DIM, generator, llama_layout, llama_lora

from peft_icm import AdapterCollection, AdapterLayout, ICMTrainer
from peft_icm.adapters.fidelity import cosine, relative_error
from peft_icm.evaluation import memorisation
from peft_icm.evaluation.memorisation import memorisation_report, plot_memorisation


class Source:
    """A generator that answers what `answer(condition, seeds)` says; no seed for z = 0."""

    def __init__(self, layout, answer):
        self.layout, self.answer = layout, answer

    def sample(self, condition, num_samples=1, generator=None, temperature=1.0):
        seeds = [source.initial_seed() for source in generator] if temperature else [None]
        assert len(seeds) == num_samples
        return torch.stack([self.answer(condition, seed) for seed in seeds])


def line(layout, *numbers):
    """`[n, P]`: adapters on a line through the origin, at these distances from it."""
    draw = torch.Generator().manual_seed(0)
    adapter = torch.randn(layout.numel, generator=draw)
    b = torch.cat([torch.full((size,), ".lora_B" in key) for key, size in zip(layout.keys, layout.sizes, strict=True)])
    return torch.stack([torch.where(b, number * adapter, adapter) for number in numbers])


@pytest.fixture
def on_a_line():
    """Snapshots at 8, 9 and 10 (own LoRA), and at 17 and 20 (own LoRA)."""
    layout = llama_layout()
    vectors = {"near": torch.zeros(1, CONDITION_DIM), "far": torch.ones(2, CONDITION_DIM)}
    snapshots = {"near": line(layout, 8, 9, 10), "far": line(layout, 17, 20)}
    return AdapterCollection(layout, snapshots, {name: [name] for name in snapshots}, vectors)


def rows(report):
    return {row.pop("name"): row for row in json.loads(json.dumps(report))["tasks"]}


def test_a_source_that_returns_a_snapshot(on_a_line):
    source = Source(on_a_line.layout, lambda v, seed: on_a_line.snapshots["far" if v[0] else "near"][0])
    report = memorisation_report(source, on_a_line, seeds=[3, 4])
    near, far = rows(report)["near"], rows(report)["far"]
    expected = {"snapshots": 3, "nearest_snapshot": 0, "nearest_is_own_task": 1, "between_snapshots": 0.1, "ratio": 0, "to_own": 0.2,
                "mode_to_own": 0.2, "spread": 0}  # fmt: skip
    assert near == pytest.approx(expected, abs=1e-5)
    assert far["between_snapshots"] == pytest.approx(3 / 20, abs=1e-5) and far["to_own"] == pytest.approx(3 / 20, abs=1e-5)
    assert report["mean"]["between_snapshots"] == pytest.approx((0.1 + 0.15) / 2, abs=1e-5)
    assert report["snapshots"] == 5 and report["seeds"] == [3, 4]
    assert report["cosines"] == {name: {"mean_absolute": 1, "max_absolute": 1} for name in ("own", "generated")}


def test_by_hand(on_a_line):
    """z of seed s moves along the line: 13 and 15 for near (the second is nearer to far's 17), 18.5 and 18.5 + 2 for far."""
    at = {(0.0, None): 12, (0.0, 0): 13, (0.0, 2): 15, (1.0, None): 20, (1.0, 0): 18.5, (1.0, 2): 20.5}
    source = Source(on_a_line.layout, lambda v, seed: line(on_a_line.layout, at[v[0].item(), seed])[0])
    report = memorisation_report(source, on_a_line, seeds=[0, 2])
    near, far = rows(report)["near"], rows(report)["far"]
    expected = {"nearest_snapshot": (3 + 2) / 20, "nearest_is_own_task": 0.5, "between_snapshots": 0.1, "ratio": 2.5,
                "to_own": (3 + 5) / 20, "mode_to_own": 0.2, "spread": 0.2, "snapshots": 3}  # fmt: skip
    assert near == pytest.approx(expected, abs=1e-4)
    expected = {"nearest_snapshot": (1.5 + 0.5) / 40, "nearest_is_own_task": 1, "between_snapshots": 0.15, "ratio": 1 / 3,
                "to_own": (1.5 + 0.5) / 40, "mode_to_own": 0, "spread": 0.1, "snapshots": 2}  # fmt: skip
    assert far == pytest.approx(expected, abs=1e-4)
    assert report["mean"]["ratio"] == pytest.approx((0.25 + 0.05) / (0.1 + 0.15), abs=1e-4)


def test_snapshots_that_coincide_one_seed_one_task(on_a_line):
    layout = on_a_line.layout
    collection = AdapterCollection(layout, {"a": line(layout, 5, 5)}, {}, {"a": torch.zeros(1, CONDITION_DIM)})
    report = memorisation_report(Source(layout, lambda v, seed: line(layout, 6)[0]), collection, seeds=[0])
    (row,) = rows(report).values()
    assert row["between_snapshots"] == 0 and row["ratio"] is None and row["spread"] is None and report["mean"]["ratio"] is None
    assert report["mean"]["spread"] is None and report["cosines"] == {"own": None, "generated": None}


def test_rounded_as_it_would_be_saved():
    layout = AdapterLayout.from_peft_model(llama_lora(dtype=torch.bfloat16))
    snapshots = {"a": line(layout, 1, 2).bfloat16()}
    collection = AdapterCollection(layout, snapshots, {}, {"a": torch.zeros(1, CONDITION_DIM)})
    report = memorisation_report(Source(layout, lambda v, seed: snapshots["a"][1].float() * 1.0001), collection, seeds=[0])
    assert report["mean"]["to_own"] == 0


def test_a_trained_generator_is_nearer_than_an_untrained_one(tmp_path):
    collection = tiny_collection()
    trainer = ICMTrainer(config(), arguments(tmp_path, num_train_epochs=150), collection=collection)
    before = memorisation_report(trainer.generator, collection)
    trainer.train()
    model = trainer.generator.eval()
    report = memorisation_report(model, collection)
    assert report["seeds"] == list(range(8)) and [row["name"] for row in report["tasks"]] == collection.tasks
    assert report["mean"]["nearest_is_own_task"] == 1 and report["mean"]["to_own"] < 0.85 * before["mean"]["to_own"]
    assert report["mean"]["nearest_snapshot"] <= report["mean"]["to_own"]
    # the same, one adapter at a time
    samples = [
        [model.sample(vectors[0], generator=torch.Generator().manual_seed(seed))[0] for seed in range(8)]
        for vectors in collection.task_vectors.values()
    ]
    for index, (task, row) in enumerate(rows(report).items()):
        drawn, own = torch.stack(samples[index]), collection.final(task)[None]
        assert row["to_own"] == pytest.approx(relative_error(model.layout, drawn, own).mean().item(), rel=1e-3)
        mode = model.sample(collection.task_vectors[task][0], temperature=0.0)
        assert row["mode_to_own"] == pytest.approx(relative_error(model.layout, mode, own).item(), rel=1e-3)
    own = torch.stack([collection.final(task) for task in collection.tasks])
    for name, adapters in (("own", own), ("generated", torch.stack([drawn[0] for drawn in samples]))):
        values = cosine(model.layout, adapters, adapters)
        values = [abs(values[i, j].item()) for i in range(3) for j in range(3) if i != j]
        expected = {"mean_absolute": sum(values) / 6, "max_absolute": max(values)}
        assert report["cosines"][name] == pytest.approx(expected, rel=1e-3, abs=1e-5)


class Passing(Mapping):
    """Snapshots that are made anew whenever they are asked for, and the most of them that were held at once."""

    def __init__(self, layout, names):
        self.layout, self.names, self.alive, self.most, self.read = layout, names, [], 0, 0

    def __getitem__(self, name):
        snapshots = torch.randn(3, self.layout.numel, generator=torch.Generator().manual_seed(self.names.index(name)))
        self.alive = [other for other in self.alive if other() is not None] + [weakref.ref(snapshots)]
        self.most, self.read = max(self.most, len(self.alive)), self.read + 1
        return snapshots

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)


def test_blocks_of_tasks_and_snapshots_that_pass_by(monkeypatch):
    layout, names = llama_layout(), [f"task{index}" for index in range(9)]
    model, vectors = generator(), {name: torch.randn(1, CONDITION_DIM) for name in names}
    passing = Passing(layout, names)
    whole = memorisation_report(model, AdapterCollection(layout, dict(passing), {}, vectors), seeds=[0, 1])
    collection = AdapterCollection(layout, passing, {}, vectors)
    monkeypatch.setattr(memorisation, "_HELD", 2 * (3 + 2) * layout.numel)  # two tasks, their snapshots and two seeds
    passing.alive, passing.most, passing.read = [], 0, 0
    assert memorisation_report(model, collection, seeds=[0, 1]) == whole
    assert passing.read == 9 + 9 + 5 * 9, "once to check, once to be held, and once for each of five blocks"
    assert passing.most <= 3, "two to become a block or the one that passes by, and the one before it"


class TestRefuses:
    def collection(self, **changes):
        layout = llama_layout()
        snapshots = {name: torch.randn(2, layout.numel) for name in ("a", "b")}
        vectors = {name: torch.randn(1, CONDITION_DIM) for name in snapshots}
        return dataclasses.replace(AdapterCollection(layout, snapshots, {}, vectors), **changes)

    def test_no_seed(self):
        with pytest.raises(ValueError, match="at least one seed"):
            memorisation_report(generator(), self.collection(), seeds=[])

    def test_another_layout(self):
        model = generator(AdapterLayout.from_peft_model(llama_lora(r=3)))
        with pytest.raises(ValueError, match=r"another layout than the generator: .*expected shape \(3, 16\), found \(2, 16\)"):
            memorisation_report(model, self.collection())

    @pytest.mark.parametrize("vectors", [{}, {"a": torch.randn(1, CONDITION_DIM)}])
    def test_no_task_vectors(self, vectors):
        with pytest.raises(ValueError, match=f"no task vectors for '{'b' if vectors else 'a'}': call collection.encode"):
            memorisation_report(generator(), self.collection(task_vectors=vectors))

    @pytest.mark.parametrize("mine", [{"kind": "clip", "sha256": "1" * 64}, None])
    def test_another_encoder(self, mine):
        model = generator(encoder={"kind": "clip", "checkpoint": "x", "dim": CONDITION_DIM, "sha256": "0" * 64})
        with pytest.raises(ValueError, match=f"sha256 {'1' * 12 if mine else None}, the generator was trained with {'0' * 12}"):
            memorisation_report(model, self.collection(encoder=mine))

    def test_one_snapshot_and_a_zero_one(self):
        layout = llama_layout()
        one = {"snapshots": {"a": line(layout, 1)}, "task_vectors": {"a": torch.ones(1, CONDITION_DIM)}, "descriptions": {"a": ["a"]}}
        with pytest.raises(ValueError, match="has one snapshot"):
            memorisation_report(generator(), self.collection(**one))
        with pytest.raises(ValueError, match="own LoRA of 'a'.* is zero"):
            memorisation_report(generator(), self.collection(snapshots={"a": line(layout, 1, 0), "b": line(layout, 1)}))


@pytest.mark.parametrize("count", [1, 18])
@pytest.mark.parametrize("spread", [0.3, None])
def test_plot(tmp_path, count, spread):
    tasks = [{"name": f"task{i}", "nearest_snapshot": 0.2, "between_snapshots": math.sqrt(i), "spread": spread} for i in range(count)]
    plot_memorisation({"tasks": tasks}, tmp_path / "m.png")
    with Image.open(tmp_path / "m.png") as picture:
        assert picture.format == "PNG" and picture.width > 500
    assert [file.name for file in tmp_path.iterdir()] == ["m.png"]
