"""Collections that stay on disk: what is read, how much memory it takes, and that the numbers are those of a collection in memory."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_training import LAYOUTS, arguments, config, tiny_collection, weights
from tiny import CONDITION_DIM, generator

from peft_icm import AdapterCollection, AdapterLayout, ICMGenerator, ICMTrainer
from peft_icm.adapters.snapshots import SnapshotMatrix, TaskSnapshots
from peft_icm.generator import subspace
from peft_icm.training.recipe import collection_sha256


@pytest.fixture
def opened(tmp_path):
    """A collection, and the same opened from disk."""
    collection = tiny_collection()
    collection.save_pretrained(tmp_path / "c")
    return collection, AdapterCollection.from_pretrained(tmp_path / "c")


def shard(collection, task):
    return collection.snapshots.files[task]


class TestFiles:
    def test_are_read_when_asked_for(self, opened):
        collection, found = opened
        for task, rows in collection.snapshots.items():
            assert torch.equal(found.snapshots[task], rows)
            assert torch.equal(found.snapshots[task][2:4, 10:20], rows[2:4, 10:20])
            assert torch.equal(found.final(task), rows[-1])
        assert list(found.snapshots) == collection.tasks and len(found.snapshots) == 3
        assert collection_sha256(found) == collection_sha256(collection)
        with pytest.raises(KeyError):
            found.snapshots["cats"]

    def test_a_change_reaches_no_file(self, opened):
        collection, found = opened
        found.snapshots["task1"].zero_()
        assert torch.equal(found.snapshots["task1"], collection.snapshots["task1"])

    def test_a_task_may_be_saved_over_itself(self, opened, tmp_path):
        collection, found = opened
        found.save_pretrained(tmp_path / "c")
        assert torch.equal(found.snapshots["task2"], collection.snapshots["task2"])

    def test_values_are_checked_when_they_are_read(self, opened, tmp_path):
        _, found = opened
        tensors = load_file(shard(found, "task1"))
        tensors["snapshots"][4, 3] = float("nan")
        save_file(tensors, shard(found, "task1"))
        bad = AdapterCollection.from_pretrained(tmp_path / "c")
        with pytest.raises(ValueError, match=r"'task1': snapshot 4 holds nan in .*q_proj.*Train it again"):
            ICMTrainer(config(), arguments(tmp_path / "w"), collection=bad)
        with pytest.raises(ValueError, match="'task1': snapshot 4 holds nan"):
            bad.save_pretrained(tmp_path / "d")
        assert not (tmp_path / "d").exists()
        held_out = load_file(shard(found, "task2"))
        held_out["snapshots"][2, 0] = float("inf")  # nothing is trained on it
        save_file(held_out, shard(found, "task2"))
        with pytest.raises(ValueError, match=r"'task[12]': snapshot [24] holds"):
            ICMTrainer(generator(found.layout, context=False), arguments(tmp_path / "w"), collection=bad)

    @pytest.mark.parametrize("what", ["missing", "cut short", "of another width", "without snapshots"])
    def test_a_shard_that_has_gone_bad_since(self, opened, tmp_path, what):
        _, found = opened
        file = shard(found, "task1")
        if what == "missing":
            file.unlink()
        elif what == "cut short":
            file.write_bytes(file.read_bytes()[:-7])
        else:
            save_file({"snapshots" if what == "of another width" else "others": torch.zeros(10, 7)}, file)
        with pytest.raises(ValueError, match=r"task1\.safetensors (is missing or corrupted|has changed since it was opened)") as caught:
            ICMTrainer(config(), arguments(tmp_path / "w"), collection=found)
        assert "\n" not in str(caught.value)
        assert torch.isfinite(found.snapshots["task0"]).all()

    def test_a_shard_of_another_layout(self, opened, tmp_path):
        _, found = opened
        keys = tuple(key.replace("v_proj", "k_proj") for key in found.layout.keys)
        targets = {**found.layout.peft_config, "target_modules": ["k_proj", "q_proj"]}
        other = dataclasses.replace(found.layout, keys=keys, peft_config=targets)
        dataclasses.replace(tiny_collection(), layout=other).save_pretrained(tmp_path / "other")
        os.replace(tmp_path / "other" / "snapshots" / "task1.safetensors", shard(found, "task1"))
        with pytest.raises(ValueError, match=r"task1\.safetensors is of another layout than collection\.json"):
            AdapterCollection.from_pretrained(tmp_path / "c")

    def test_shards_of_earlier_versions_name_no_layout(self, opened, tmp_path):
        collection, found = opened
        save_file(load_file(shard(found, "task1")), shard(found, "task1"), metadata={"format": "pt"})
        assert torch.equal(AdapterCollection.from_pretrained(tmp_path / "c").snapshots["task1"], collection.snapshots["task1"])

    def test_a_disk_that_fills_in_mid_stream(self, opened, tmp_path, monkeypatch):
        collection, found = opened

        def full(tensors, file, **kwargs):
            if "task1" in str(file):
                raise OSError(28, "No space left on device")
            save_file(tensors, file, **kwargs)

        monkeypatch.setattr("peft_icm.adapters.collection.save_file", full)
        for folder in ("c", "d"):
            with pytest.raises(OSError, match="No space left"):
                found.save_pretrained(tmp_path / folder)
        assert [file.name for file in tmp_path.iterdir()] == ["c"]
        assert torch.equal(found.snapshots["task0"], collection.snapshots["task0"])


@pytest.mark.parametrize("max_memory_bytes", [1, 5000, 2**30])
def test_blocks_are_parts_of_the_matrix(max_memory_bytes):
    collection = tiny_collection()
    chosen = [[0, 3, 4], [], [9]]
    parts = [TaskSnapshots(collection.snapshots, task, rows) for task, rows in zip(collection.tasks, chosen, strict=True)]
    size = collection.layout.numel
    whole = torch.cat([collection.snapshots[task][rows] for task, rows in zip(collection.tasks, chosen, strict=True)])
    sizes = collection.layout.sizes
    mean, std = torch.randn(len(sizes)), torch.rand(len(sizes)) + 1
    matrix = SnapshotMatrix(parts, size, max_memory_bytes).normalized(sizes, mean, std)
    by_rows, by_columns = torch.empty_like(whole), torch.empty_like(whole)
    for rows, block in matrix.rows():
        by_rows[rows] = block
        assert len(block) <= max(1, max_memory_bytes // size)
    for columns, block in matrix.columns():
        by_columns[:, columns] = block
    each_mean, each_std = (part.repeat_interleave(torch.tensor(sizes)) for part in (mean, std))
    assert torch.equal(by_rows, (whole - each_mean) / each_std) and torch.equal(by_columns, by_rows)
    torch.testing.assert_close(matrix.average(), by_rows.mean(0))


def decaying(rows=300, columns=2000, factor=0.8):
    draw = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(columns, 40, generator=draw)).Q.T
    return torch.randn(rows, 40, generator=draw) * factor ** torch.arange(40) @ directions + 3


def components(snapshots, rank=8, max_memory_bytes=2**30):
    center, basis = torch.zeros(snapshots.shape[1]), torch.randn(rank, snapshots.shape[1])
    matrix = dataclasses.replace(SnapshotMatrix.of(snapshots), max_memory_bytes=max_memory_bytes)
    return subspace.principal_components(matrix, center, basis), center, basis


@pytest.mark.parametrize("max_memory_bytes", [2**20, 2**30])
def test_the_random_subspace_is_the_exact_one(monkeypatch, max_memory_bytes):
    snapshots = decaying()
    values, center, basis = components(snapshots)
    torch.testing.assert_close(values, torch.linalg.svdvals((snapshots - snapshots.mean(0)).double())[:8], rtol=1e-5, atol=0)
    monkeypatch.setattr(subspace, "EXACT", 10)
    others, other_center, other_basis = components(snapshots, max_memory_bytes=max_memory_bytes)
    torch.testing.assert_close(others, values, rtol=1e-5, atol=0)
    torch.testing.assert_close(other_center, center, rtol=1e-5, atol=1e-6)
    signs = (basis * other_basis).sum(1).sign()
    assert (other_basis * signs[:, None] - basis).norm(dim=1).max() < 1e-5
    torch.testing.assert_close(other_basis @ other_basis.T, torch.eye(8), rtol=0, atol=1e-6)


@pytest.mark.parametrize("exact", [10, 1024])
def test_what_spans_less_has_fewer_components(monkeypatch, exact):
    monkeypatch.setattr(subspace, "EXACT", exact)
    draw = torch.Generator().manual_seed(0)
    snapshots = torch.randn(60, 3, generator=draw) @ torch.randn(3, 500, generator=draw)
    values, _, basis = components(snapshots)
    assert len(values) == 3 and torch.all(basis[3:] == 0)
    torch.testing.assert_close(basis[:3] @ basis[:3].T, torch.eye(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("max_memory_bytes", [1, 2**16])
def test_statistics_do_not_depend_on_the_blocks(max_memory_bytes):
    model = generator()
    draw = torch.Generator().manual_seed(0)
    snapshots = 3 + 0.1 * torch.randn(50, model.layout.numel, generator=draw)
    snapshots[:, : model.layout.sizes[0]] = 0.1  # which no sum of fp32 gives back
    matrix = dataclasses.replace(SnapshotMatrix.of(snapshots), max_memory_bytes=max_memory_bytes)
    model.statistics.fit(matrix, torch.randn(9, CONDITION_DIM, generator=draw))
    parts = snapshots.double().split(model.layout.sizes, dim=1)
    torch.testing.assert_close(model.statistics.mean.double(), torch.stack([part.mean() for part in parts]), rtol=1e-6, atol=0)
    expected = torch.stack([part.std(correction=0) for part in parts[1:]])
    torch.testing.assert_close(model.statistics.std[1:].double(), expected, rtol=1e-5, atol=0)
    assert model.statistics.std[0] == 1


class TestCoordinates:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("count", [4, 12])  # fewer components than the generator has room for, and as many
    def test_have_the_loss_of_the_adapters(self, layout, count):
        torch.manual_seed(0)
        model = generator(LAYOUTS[layout]())
        torch.nn.init.normal_(model.context.output.weight)
        parameters, condition = torch.randn(count, model.layout.numel), torch.randn(count, CONDITION_DIM)
        model.fit(parameters, condition)
        coordinates = model.project(parameters)
        assert coordinates.shape == (count, min(6, count - 1) + 1)
        given = {"condition": condition, "noise": torch.randn(count, 4), "hidden_tasks": torch.arange(count) % 4 - 1}
        full, small = model(parameters, **given), model(coordinates=coordinates, **given)
        assert small.reconstruction is None
        for name in ("loss", "reconstruction_loss", "kl_loss", "squared_error", "latent_mean", "latent_logvar"):
            torch.testing.assert_close(getattr(small, name), getattr(full, name), rtol=1e-5, atol=1e-5)
        gradients = [torch.autograd.grad(output.loss, [*model.network.decoder.parameters()]) for output in (full, small)]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        errors = [
            model.squared_error(given["noise"], condition, **adapters)
            for adapters in ({"parameters": parameters}, {"coordinates": coordinates})
        ]
        torch.testing.assert_close(*errors, rtol=1e-5, atol=1e-6)

    def test_no_step_sees_an_adapter(self, tmp_path):
        trainer = ICMTrainer(config(), arguments(tmp_path, num_train_epochs=2), collection=tiny_collection())
        for dataset, size in ((trainer.train_dataset, 8), (trainer.eval_dataset, 2)):
            assert [tuple(part.shape) for part in dataset.snapshots] == [
                (size, 5)
            ] * 3  # three tasks and two directions of their walks span four
        trainer.collection.snapshots.clear()
        trainer.train()

    def test_follow_the_subspace_of_a_checkpoint(self, tmp_path):
        """That of another machine may have other signs."""
        options = {"num_train_epochs": 6, "save_strategy": "steps", "save_steps": 5}
        whole = ICMTrainer(config(), arguments(tmp_path / "a", **options), collection=tiny_collection())
        whole.train()
        resumed = ICMTrainer(config(), arguments(tmp_path / "b", **options), collection=tiny_collection())
        with torch.no_grad():
            resumed.generator.network.basis.neg_()
        resumed.objective._project()
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
        expected = weights(whole)
        for name, tensor in weights(resumed).items():
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("exact", [10, 1024])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_generator_of_8_bits_trains_as_one_of_fp32(layout, exact, tmp_path, monkeypatch):
    monkeypatch.setattr(subspace, "EXACT", exact)
    options, trainers = {"num_train_epochs": 20, "save_strategy": "steps", "save_steps": 20}, []
    for basis_dtype in (None, "int8"):
        args = arguments(tmp_path / str(basis_dtype), **options)
        trainers.append(ICMTrainer(config(basis_dtype=basis_dtype), args, collection=tiny_collection(layout)))
    wide, small = (trainer.generator for trainer in trainers)
    codes, rows = small.network.basis.clone(), wide.network.basis
    assert (small.network.rows - rows).abs().max() < rows.abs().max() / 100
    for trainer in trainers:
        trainer.train()
    assert codes.dtype == torch.int8 and torch.equal(small.network.basis, codes)
    assert trainers[1].measured["eval_variance_explained"] == pytest.approx(trainers[0].measured["eval_variance_explained"], abs=0.02)
    resumed = ICMTrainer(config(basis_dtype="int8"), arguments(tmp_path / "int8", **options), collection=tiny_collection(layout))
    resumed.train(resume_from_checkpoint=str(tmp_path / "int8" / "checkpoint-20"))
    expected = weights(trainers[1])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed).items())
    small.save_pretrained(tmp_path / "g")
    found, vector = ICMGenerator.from_pretrained(tmp_path / "g"), torch.ones(small.config.condition_dim)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())
    torch.testing.assert_close(found.sample(vector, temperature=0.0), small.sample(vector, temperature=0.0))


@pytest.mark.parametrize("options", [{}, {"architecture": "paper", "num_conv_layers": 2}, {"architecture": "direct", "context": False}])
def test_a_collection_on_disk_trains_as_one_in_memory(opened, tmp_path, options):
    runs = []
    for collection, memory in ((opened[0], 2**31), (opened[1], 10_000)):
        args = arguments(tmp_path / str(memory), num_train_epochs=3, logging_steps=1, max_memory_bytes=memory)
        trainer = ICMTrainer(config(**options), args, collection=collection)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        runs.append([*losses, *(metric["value"] for metric in trainer.generator.config.training["metrics"])])
    assert runs[1] == pytest.approx(runs[0], rel=1e-4, abs=1e-4)


def test_the_bound_is_checked(tmp_path):
    with pytest.raises(ValueError, match="max_memory_bytes=0 must be at least 1"):
        arguments(tmp_path, max_memory_bytes=0)


MEASURE = """
import sys
from peft_icm import AdapterCollection, ICMConfig, ICMTrainer, ICMTrainingArguments

folder, bound = sys.argv[1], int(sys.argv[2])
# Not ru_maxrss, which begins at what the process that started this one held.
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

def train(collection):
    collection = AdapterCollection.from_pretrained(f"{folder}/{collection}")
    args = ICMTrainingArguments(f"{folder}/w", num_train_epochs=2, max_memory_bytes=bound, use_cpu=True, save_strategy="no", report_to=[])
    ICMTrainer(ICMConfig(latent_size=4, hidden_size=16, num_components=4), args, collection=collection).train()

train("few")  # what the first training of a process imports is not the collection's
before = peak()
train("many")
print(1024 * (peak() - before))
"""


@pytest.mark.slow
def test_memory_is_bounded_whatever_the_size(tmp_path):
    size, bound, grown = 100_000, 32 * 2**20, {}
    keys, shapes = [f"base_model.model.m.lora_{matrix}.weight" for matrix in "AB"], [[1, size - 1], [1, 1]]
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["m"]}
    layout = AdapterLayout.from_dict({"keys": keys, "shapes": shapes, "dtype": "float32", "peft_config": config})
    draw = torch.Generator().manual_seed(0)
    for collection, count in (("few", 3), ("many", 60)):  # of 8 snapshots each: 192 MB
        names = [f"task{index}" for index in range(count)]
        snapshots = {name: torch.randn(8, size, generator=draw) for name in names}
        vectors = {name: torch.randn(3, 8, generator=draw) for name in names}
        AdapterCollection(layout, snapshots, {}, vectors).save_pretrained(tmp_path / collection)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    env["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is let go goes back at once: malloc keeps up to 80 MiB of it, another time none
    for memory in (bound, 2**34):
        command = [sys.executable, "-c", MEASURE, str(tmp_path), str(memory)]
        grown[memory] = json.loads(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split()[-1])
    assert grown[bound] < 100 * 2**20 < 192 * 2**20 < grown[2**34], grown
