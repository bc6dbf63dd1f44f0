"""AdapterCollection: made from LoRAs that exist, saved, loaded, refused; and the gauge."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model_state_dict
from tiny import florence_lora, llama_layout, llama_lora

from peft_icm import AdapterCollection
from peft_icm.adapters.gauge import balanced_factors, canonicalize


@pytest.fixture
def collection():
    torch.manual_seed(0)
    layout = llama_layout()
    snapshots = {name: torch.randn(3, layout.numel) for name in ("cats", "dogs")}
    vectors = {name: torch.randn(2, 8) for name in snapshots}
    texts = {name: [f"about {name}", f"{name}, please"] for name in snapshots}
    return AdapterCollection(layout, snapshots, texts, vectors, {"kind": "clip", "sha256": "0"}, {"seed": 3})


def save_lora(folder, seed=0, **kwargs):
    torch.manual_seed(seed)
    model = llama_lora(**kwargs)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return get_peft_model_state_dict(model)


class TestGauge:
    @given(r=st.integers(1, 4), inputs=st.integers(4, 9), outputs=st.integers(4, 9), seed=st.integers(0, 10**6))
    @settings(deadline=None, max_examples=40)
    def test_product_stays_and_the_gauge_is_one(self, r, inputs, outputs, seed):
        draw = torch.Generator().manual_seed(seed)
        a, b = torch.randn(r, inputs, generator=draw), torch.randn(outputs, r, generator=draw)
        mix = torch.eye(r) + 0.3 * torch.rand(r, r, generator=draw)  # diagonally dominant enough to be invertible
        a1, b1 = balanced_factors(a, b)
        torch.testing.assert_close(b1 @ a1, b @ a, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a1 @ a1.T, b1.T @ b1, rtol=1e-3, atol=1e-3)
        a2, b2 = balanced_factors(mix @ a, b @ torch.linalg.inv(mix))
        torch.testing.assert_close(b2 @ a2, b1 @ a1, rtol=1e-3, atol=1e-3)
        values = torch.linalg.svdvals(b @ a)[:r]
        if bool((values[:-1] - values[1:] > 0.1).all()):  # the order of equal singular values is not fixed
            torch.testing.assert_close(a2, a1, rtol=1e-2, atol=1e-2)

    def test_of_a_fresh_lora_is_zero_and_finite(self):
        a, b = balanced_factors(torch.randn(2, 5), torch.zeros(6, 2))
        assert torch.isfinite(a).all() and torch.all(b @ a == 0)

    def test_florence_with_convolutions(self):
        torch.manual_seed(0)
        model = florence_lora()
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter)
        before = get_peft_model_state_dict(model)
        after = canonicalize(before)
        assert set(after) == set(before)
        for key in before:
            if "lora_A" in key:
                other = key.replace("lora_A", "lora_B")
                product = before[other].flatten(1) @ before[key].flatten(1)
                torch.testing.assert_close(after[other].flatten(1) @ after[key].flatten(1), product, rtol=1e-4, atol=1e-4)


class TestDisk:
    def test_there_and_back(self, collection, tmp_path):
        collection.save_pretrained(tmp_path / "c")
        loaded = AdapterCollection.from_pretrained(tmp_path / "c")
        assert loaded.layout == collection.layout and loaded.tasks == ["cats", "dogs"]
        assert loaded.descriptions == collection.descriptions
        assert (loaded.encoder, loaded.metadata) == (collection.encoder, collection.metadata)
        for task in collection.tasks:
            assert torch.equal(loaded.snapshots[task], collection.snapshots[task])
            assert torch.equal(loaded.task_vectors[task], collection.task_vectors[task])
            assert torch.equal(loaded.final(task), collection.snapshots[task][-1])

    def test_is_replaced_whole(self, collection, tmp_path):
        collection.save_pretrained(tmp_path / "c")
        del collection.snapshots["dogs"]
        collection.save_pretrained(tmp_path / "c")
        assert [file.name for file in (tmp_path / "c" / "snapshots").iterdir()] == ["cats.safetensors"]
        assert [file.name for file in tmp_path.iterdir()] == ["c"]

    def test_a_full_disk_leaves_the_old_one(self, collection, tmp_path, monkeypatch):
        collection.save_pretrained(tmp_path / "c")
        before = (tmp_path / "c" / "snapshots" / "cats.safetensors").read_bytes()
        collection.snapshots["cats"] = collection.snapshots["cats"] + 1

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("peft_icm.collection.save_file", full)
        with pytest.raises(OSError, match="No space left"):
            collection.save_pretrained(tmp_path / "c")
        assert (tmp_path / "c" / "snapshots" / "cats.safetensors").read_bytes() == before
        assert [file.name for file in tmp_path.iterdir()] == ["c"]

    def test_another_folder_is_not_overwritten(self, collection, tmp_path):
        (tmp_path / "thesis.txt").write_text("mine")
        with pytest.raises(ValueError, match="neither empty nor a collection"):
            collection.save_pretrained(tmp_path)
        assert (tmp_path / "thesis.txt").read_text() == "mine"

    def test_truncated_missing_and_foreign(self, collection, tmp_path):
        collection.save_pretrained(tmp_path / "c")
        file = tmp_path / "c" / "snapshots" / "dogs.safetensors"
        file.write_bytes(file.read_bytes()[:-50])
        with pytest.raises(ValueError, match="dogs.safetensors is missing or corrupted"):
            AdapterCollection.from_pretrained(tmp_path / "c")
        file.unlink()
        with pytest.raises(ValueError, match="dogs.safetensors is missing or corrupted"):
            AdapterCollection.from_pretrained(tmp_path / "c")
        manifest = json.loads((tmp_path / "c" / "collection.json").read_text())
        (tmp_path / "c" / "collection.json").write_text(json.dumps({**manifest, "format": 9}))
        with pytest.raises(ValueError, match="collection format 9, this peft_icm reads 1"):
            AdapterCollection.from_pretrained(tmp_path / "c")
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match=r"no adapter collection: it has no collection\.json"):
            AdapterCollection.from_pretrained(tmp_path / "empty")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named(collection, value):
    snapshots = {name: tensor.clone() for name, tensor in collection.snapshots.items()}
    snapshots["dogs"][1, 40] = value
    with pytest.raises(ValueError, match=rf"'dogs': snapshot 1 holds {value} in {collection.layout.key_at(40)}"):
        AdapterCollection(collection.layout, snapshots, collection.descriptions)


def test_a_wrong_width_is_refused(collection):
    with pytest.raises(ValueError, match="expected snapshots of shape"):
        AdapterCollection(collection.layout, {"cats": torch.zeros(3, 7)}, {})
    with pytest.raises(ValueError, match="at least one task"):
        AdapterCollection(collection.layout, {}, {})


class TestFromAdapters:
    def test_products_stay(self, tmp_path):
        states = [save_lora(tmp_path / name, seed) for seed, name in enumerate(("cats", "dogs"))]
        collection = AdapterCollection.from_adapters([tmp_path / "cats", tmp_path / "dogs"], ["about cats", ["about dogs", "dogs"]])
        assert collection.tasks == ["cats", "dogs"] and collection.descriptions["dogs"] == ["about dogs", "dogs"]
        for state, task in zip(states, collection.tasks, strict=True):
            found = collection.layout.unflatten(collection.final(task))
            for key in (key for key in state if "lora_A" in key):
                other = key.replace("lora_A", "lora_B")
                torch.testing.assert_close(found[other] @ found[key], state[other] @ state[key], rtol=1e-4, atol=1e-4)
        as_found = AdapterCollection.from_adapters([tmp_path / "cats"], ["about cats"], gauge=False)
        assert all(torch.equal(value, states[0][key]) for key, value in as_found.layout.unflatten(as_found.final("cats")).items())

    def test_two_layouts_two_names_and_a_missing_description(self, tmp_path):
        save_lora(tmp_path / "a" / "cats")
        save_lora(tmp_path / "b" / "cats")
        save_lora(tmp_path / "wide", r=4)
        with pytest.raises(ValueError, match="has another layout than"):
            AdapterCollection.from_adapters([tmp_path / "a" / "cats", tmp_path / "wide"], ["x", "y"])
        with pytest.raises(ValueError, match="Two adapters are named 'cats'"):
            AdapterCollection.from_adapters([tmp_path / "a" / "cats", tmp_path / "b" / "cats"], ["x", "y"])
        with pytest.raises(ValueError, match="one description for each adapter, found 1 and 0"):
            AdapterCollection.from_adapters([tmp_path / "wide"], [])
