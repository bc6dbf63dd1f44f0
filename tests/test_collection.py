"""AdapterCollection: made from LoRAs that exist, saved, loaded, refused; and the gauge."""

import json
from dataclasses import replace
from types import MappingProxyType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import florence_lora, llama_layout, llama_lora

from peft_icm import AdapterCollection
from peft_icm.adapters.gauge import align, balanced_factors, canonicalize


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

    def test_aligned_adapters_of_one_product_are_equal(self):
        torch.manual_seed(0)
        shapes = {"m.lora_A.weight": (3, 5), "m.lora_B.weight": (6, 3), "e.lora_embedding_A": (2, 9), "e.lora_embedding_B": (4, 2)}
        shapes |= {"c.lora_A.weight": (4, 6, 3, 3), "c.lora_B.weight": (8, 2, 1, 1)}  # two groups
        reference, one = ({key: torch.randn(shape) for key, shape in shapes.items()} for _ in range(2))
        other = dict(one)
        for a, b in (("m.lora_A.weight", "m.lora_B.weight"), ("e.lora_embedding_A", "e.lora_embedding_B")):
            mix = 2 * torch.eye(len(one[a])) + torch.rand(len(one[a]), len(one[a]))
            other[a], other[b] = mix @ one[a], one[b] @ mix.inverse()
        other["c.lora_A.weight"], other["c.lora_B.weight"] = one["c.lora_A.weight"] * -4, one["c.lora_B.weight"] / -4
        first, second = align(one, reference), align(other, reference)
        for key, value in first.items():
            torch.testing.assert_close(value, second[key], rtol=1e-3, atol=1e-4)
        for a, b in (("m.lora_A.weight", "m.lora_B.weight"), ("e.lora_embedding_A", "e.lora_embedding_B")):
            torch.testing.assert_close(first[b] @ first[a], one[b] @ one[a], rtol=1e-4, atol=1e-4)
        for group in range(2):
            (a, b), (a1, b1) = (
                (t["c.lora_A.weight"].flatten(1).chunk(2)[group], t["c.lora_B.weight"].flatten(1).chunk(2)[group]) for t in (one, first)
            )
            torch.testing.assert_close(b1 @ a1, b @ a, rtol=1e-4, atol=1e-4)
        balanced = canonicalize(one)
        distance = [sum(float((x[key] - canonicalize(reference)[key]).square().sum()) for key in shapes) for x in (first, balanced)]
        assert distance[0] < distance[1]


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

        monkeypatch.setattr("peft_icm.adapters.collection.save_file", full)
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


def test_a_wrong_width_is_refused(collection, tmp_path):
    with pytest.raises(ValueError, match="expected snapshots of shape"):
        AdapterCollection(collection.layout, {"cats": torch.zeros(3, 7)}, {})
    lazy = AdapterCollection(collection.layout, MappingProxyType({"cats": torch.zeros(3, 7)}), {})
    for use in (lambda: lazy.save_pretrained(tmp_path / "c"), lambda: lazy.final("cats")):
        with pytest.raises(ValueError, match="expected snapshots of shape"):
            use()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="at least one task"):
        AdapterCollection(collection.layout, {}, {})


class TestFromAdapters:
    def test_products_stay(self, tmp_path):
        states = [save_lora(tmp_path / name, seed) for seed, name in enumerate(("cats", "dogs"))]
        collection = AdapterCollection.from_adapters(
            [tmp_path / "cats", tmp_path / "dogs"], ["about cats", ["about dogs", "dogs"]], gauge=True
        )
        assert collection.tasks == ["cats", "dogs"] and collection.descriptions["dogs"] == ["about dogs", "dogs"]
        for state, task in zip(states, collection.tasks, strict=True):
            found = collection.layout.unflatten(collection.final(task))
            for key in (key for key in state if "lora_A" in key):
                other = key.replace("lora_A", "lora_B")
                torch.testing.assert_close(found[other] @ found[key], state[other] @ state[key], rtol=1e-4, atol=1e-4)
        as_found = AdapterCollection.from_adapters([tmp_path / "cats"], ["about cats"])
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

    def test_nan_names_folder_and_tensor(self, tmp_path):
        save_lora(tmp_path / "good")
        save_lora(tmp_path / "bad", 1)
        file = tmp_path / "bad" / "adapter_model.safetensors"
        tensors = load_file(file)
        key = next(key for key in tensors if "lora_B" in key)
        tensors[key][0, 0] = float("nan")
        save_file(tensors, file)
        for gauge in (True, False):
            with pytest.raises(ValueError, match=rf"bad holds NaN or infinite values in {key}"):
                AdapterCollection.from_adapters([tmp_path / "good", tmp_path / "bad"], ["a", "b"], gauge=gauge)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.full((2, 8), float("nan")), "NaN"),
        (torch.full((2, 8), float("inf")), "NaN or infinite"),
        (torch.zeros(0, 8), "one row or more"),
        (torch.zeros(8), r"found \(8,\)"),
        (torch.zeros(2, 9), "of one width"),
        (torch.zeros(2, 8, dtype=torch.int64), "int64"),
        ([[0.0]], "a list"),
    ],
)
def test_task_vectors_that_are_none(collection, bad, message):
    with pytest.raises(ValueError, match=rf"'dogs'.*{message}|{message}.*'dogs'"):
        replace(collection, task_vectors={**collection.task_vectors, "dogs": bad})


@pytest.mark.parametrize("name", ["../up", "", ".", "/etc/x", "a/b", "a\nb", "x" * 201])
def test_names_are_file_names(collection, name, tmp_path):
    with pytest.raises(ValueError, match="task name"):
        AdapterCollection(collection.layout, {name: collection.snapshots["cats"]}, {})
    collection.save_pretrained(tmp_path / "c")
    file = tmp_path / "c" / "collection.json"
    manifest = json.loads(file.read_text())
    manifest["tasks"][0]["name"] = name
    file.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="task name"):
        AdapterCollection.from_pretrained(tmp_path / "c")


@pytest.mark.parametrize(
    "change",
    [
        {"tasks": []}, {"tasks": {}}, {"tasks": ["x"]}, {"layout": []}, {"layout": {"keys": []}}, {"encoder": 1}, {"metadata": []},
        {"format": None}, {"format": True}, {"tasks": [{"name": "cats", "snapshots": 2, "descriptions": []}]},
        {"tasks": [{"name": "cats", "descriptions": "x"}]},
        {"tasks": [{"name": "cats"}, {"name": "cats"}]}, {"tasks": [{"name": "cats", "descriptions": [1]}]},
    ],
)  # fmt: skip
def test_manifests_that_are_none(collection, tmp_path, change):
    collection.save_pretrained(tmp_path / "c")
    file = tmp_path / "c" / "collection.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError) as caught:  # each of another message, of one line
        AdapterCollection.from_pretrained(tmp_path / "c")
    assert str(tmp_path / "c") in str(caught.value) and "\n" not in str(caught.value)


def test_a_link_out_of_the_folder_is_not_followed(collection, tmp_path):
    collection.save_pretrained(tmp_path / "c")
    collection.save_pretrained(tmp_path / "other")
    file = tmp_path / "c" / "snapshots" / "cats.safetensors"
    file.unlink()
    file.symlink_to(tmp_path / "other" / "snapshots" / "cats.safetensors")
    with pytest.raises(ValueError, match="leads out of"):
        AdapterCollection.from_pretrained(tmp_path / "c")
