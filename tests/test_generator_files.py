"""A generator on disk and on a Hub: whole, pinned to its commit, without secrets; and what its config may say."""

import copy
import json
import pickle
import stat
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CONDITION_DIM, generator, llama, llama_layout
from transformers import AutoConfig, AutoModel

from peft_icm import AdapterLayout, ICMConfig, ICMGenerator
from peft_icm.adapters.base import load_base
from peft_icm.generator import belongings

VECTOR = torch.linspace(-1, 1, CONDITION_DIM)
REPO = "me/pinned"
NAMES = sorted(generator().state_dict())


@pytest.fixture
def saved(tmp_path):
    generator().save_pretrained(tmp_path / "g")
    return tmp_path / "g"


def edit(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def refused(error, load, *words):
    with pytest.raises(error) as caught:
        load()
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), str(caught.value)


def with_base(tmp_path, seed=0, **tokens):
    torch.manual_seed(seed)
    llama().save_pretrained(tmp_path / f"base{seed}")
    return generator(AdapterLayout.from_dict({**llama_layout().to_dict(), "base_model_name_or_path": str(tmp_path / f"base{seed}")}))


class TestWeights:
    @pytest.mark.parametrize("name", NAMES)
    def test_no_tensor_may_be_missing(self, saved, name):
        file = saved / "model.safetensors"
        save_file({key: value for key, value in load_file(file).items() if key != name}, file)
        refused(ValueError, lambda: ICMGenerator.from_pretrained(saved), name, "model.safetensors")
        refused(ValueError, lambda: AutoModel.from_pretrained(saved), name)

    @pytest.mark.parametrize(
        ("change", "word"),
        [
            (lambda t: {**t, "network.more": torch.zeros(1)}, "network.more"),
            (lambda t: {**t, "network.center": torch.zeros(3)}, "network.center has shape (3,)"),
            (lambda t: {**t, "network.center": t["network.center"] * float("nan")}, "network.center holds NaN"),
            (lambda t: {**t, "statistics.std": t["statistics.std"] / 0}, "statistics.std holds NaN or infinite"),
            (lambda t: {**t, "network.center": t["network.center"].int()}, "network.center is of I32"),
            (lambda t: {**t, "network.center": t["network.center"] + 1}, "not those that its config.json was saved with"),
        ],
    )
    def test_nor_be_another(self, saved, change, word):
        file = saved / "model.safetensors"
        save_file(change(load_file(file)), file)
        refused(ValueError, lambda: ICMGenerator.from_pretrained(saved), word)

    def test_the_same_tensors_may_lie_in_another_file(self, saved):
        file = saved / "model.safetensors"
        before = ICMGenerator.from_pretrained(saved).state_dict()
        save_file(load_file(file), file, metadata={"format": "pt", "note": "x" * 11})
        after = ICMGenerator.from_pretrained(saved).state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    def test_shards(self, tmp_path):
        model = generator()
        model.save_pretrained(tmp_path)
        model.save_pretrained(tmp_path, max_shard_size="2KB")
        shards = sorted(tmp_path.glob("model-*-of-*.safetensors"))
        assert len(shards) > 1 and not (tmp_path / "model.safetensors").exists()
        loaded = ICMGenerator.from_pretrained(tmp_path)
        assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
        shards[0].unlink()
        refused(OSError, lambda: ICMGenerator.from_pretrained(tmp_path), shards[0].name)
        model.save_pretrained(tmp_path)
        assert not [*tmp_path.glob("model-*"), *tmp_path.glob("*.index.json")]
        (tmp_path / "model.safetensors").rename(tmp_path / "away")
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../x.safetensors"}}')
        refused(ValueError, lambda: ICMGenerator.from_pretrained(tmp_path), "../../x.safetensors")

    def test_no_pickle_is_read(self, saved):
        torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
        (saved / "model.safetensors").unlink()
        refused(OSError, lambda: ICMGenerator.from_pretrained(saved, use_safetensors=False), "model.safetensors")

    def test_a_generator_of_version_0_1_0(self):
        folder = Path(__file__).parent / "data" / "generator-0.1.0"
        found = ICMGenerator.from_pretrained(folder).generate_state_dict(task_vector=VECTOR, temperature=0.0)
        expected = load_file(folder / "expected" / "adapter.safetensors")
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor)


class TestConfig:
    @pytest.mark.parametrize(
        ("fields", "word"),
        [
            ({"latent_size": "4"}, "latent_size"),
            ({"latent_size": True}, "latent_size"),
            ({"hidden_size": 10**9}, "hidden_size=1000000000 must be at most"),
            ({"num_conv_layers": 20_000, "architecture": "paper"}, "num_conv_layers=20000 must be at most 64"),
            ({"num_components": 0}, "num_components=0"),
            ({"kl_weight": float("nan")}, "kl_weight=nan"),
            ({"kl_weight": float("inf")}, "kl_weight=inf"),
            ({"context": "yes"}, "context"),
            ({"tasks": ["cats"]}, "tasks"),
            ({"tasks": [{"name": "../cats"}]}, "../cats"),
            ({"tasks": [{"name": str(n)} for n in range(10_001)]}, "10001"),
            ({"training": []}, "training"),
            ({"encoder": {"kind": 3}}, "kind=3"),
            ({"encoder": {"dim": 9}}, "dim=9"),
            ({"encoder": {"folder": "/etc"}}, "/etc"),
            ({"base_model_subfolder": "../base"}, "../base"),
            ({"base_model_subfolder": "/base"}, "/base"),
            ({"dtype": "load"}, "dtype"),
            ({"dtype": "no_dtype"}, "dtype"),
            ({"transformers_weights": "../x.safetensors"}, "transformers_weights"),
            ({"adapter_layout": 3}, "adapter_layout"),
        ],
    )
    def test_every_field_is_checked(self, saved, fields, word):
        refused(ValueError, lambda: ICMConfig(**{"condition_dim": CONDITION_DIM, **fields}), word)
        edit(saved, **fields)
        refused(ValueError, lambda: ICMGenerator.from_pretrained(saved), "config.json", word)
        refused(ValueError, lambda: AutoConfig.from_pretrained(saved), word)

    @pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"model_type": "icm", "layout": 3}'])
    def test_so_is_the_file(self, saved, text):
        (saved / "config.json").write_text(text)
        refused((ValueError, OSError), lambda: ICMGenerator.from_pretrained(saved), "config.json")

    def test_an_assignment_is_checked_too(self):
        with pytest.raises(ValueError, match="latent_size"):
            ICMConfig().latent_size = "x"

    def test_components_follow_from_the_tasks(self):
        layout = llama_layout().to_dict()

        def components(count, **kwargs):
            return ICMConfig(layout=layout, tasks=[{"name": str(n)} for n in range(count)], **kwargs).num_components

        assert [components(count) for count in (1, 3, 12)] == [2, 6, 24] and components(2, num_components=40) == 40


class TestFolder:
    def test_is_old_or_new(self, tmp_path, monkeypatch):
        old, new = generator(), generator(hidden_size=32)
        old.save_pretrained(tmp_path / "g")
        before = {file.name: file.read_bytes() for file in (tmp_path / "g").iterdir()}

        def full(*args, **kwargs):
            raise OSError("No space left on device")

        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
        with pytest.raises(OSError, match="No space left"):
            new.save_pretrained(tmp_path / "g")
        assert {file.name: file.read_bytes() for file in (tmp_path / "g").iterdir()} == before
        assert [file.name for file in tmp_path.iterdir()] == ["g"]

    def test_other_files_stay_and_others_may_read(self, saved):
        (saved / "notes.txt").write_text("mine")
        generator(hidden_size=32).save_pretrained(saved)
        assert (saved / "notes.txt").read_text() == "mine" and ICMGenerator.from_pretrained(saved).config.hidden_size == 32
        (saved / "probe").touch()
        assert {stat.S_IMODE(file.stat().st_mode) for file in saved.iterdir()} == {stat.S_IMODE((saved / "probe").stat().st_mode)}

    def test_a_file_is_no_folder(self, tmp_path, monkeypatch):
        (tmp_path / "f").write_text("x")
        refused(OSError, lambda: generator().save_pretrained(tmp_path / "f"), "is a file")

    def test_variants_and_other_processes_as_in_transformers(self, tmp_path):
        model = generator()
        model.save_pretrained(tmp_path, variant="fp32", state_dict=model.state_dict())
        assert (tmp_path / "model.fp32.safetensors").is_file()
        ICMGenerator.from_pretrained(tmp_path, variant="fp32")
        model.save_pretrained(tmp_path / "other", is_main_process=False)
        assert not list((tmp_path / "other").glob("*"))
        refused(ValueError, lambda: model.save_pretrained(tmp_path, safe_serialization=False), "safe_serialization")

    def test_without_its_base_it_is_found_on_this_machine(self, tmp_path):
        with_base(tmp_path).save_pretrained(tmp_path / "a", with_base_model=True)
        ICMGenerator.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
        assert ICMGenerator.from_pretrained(tmp_path / "b").load_base().name_or_path == str(tmp_path / "a" / "base_model")
        with pytest.raises(ValueError, match="leads out"):
            ICMGenerator.from_pretrained(tmp_path / "a")._resolve("../b")


class TestHub:
    @pytest.mark.parametrize("subfolder", ["", "deep/er"])
    def test_the_base_is_of_the_generator_s_own_commit(self, hub, token, tmp_path, subfolder):
        from hub_server import Repo

        def commit(seed):
            folder = tmp_path / f"g{seed}"
            with_base(tmp_path, seed).save_pretrained(folder / subfolder, with_base_model=True)
            files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
            repo.commit("main", files, str(seed))

        repo = hub.repos["models", "me/moves"] = Repo(private=True)
        commit(0)
        model = ICMGenerator.from_pretrained("me/moves", cache_dir=tmp_path / "cache", token=token, subfolder=subfolder)
        assert not list((tmp_path / "cache").rglob("base_model"))
        assert model.config._commit_hash == repo.branches["main"]
        commit(1)
        base = model.generate_adapter(task_vector=VECTOR).get_base_model()
        old = load_file(tmp_path / "base0" / "model.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(base.model.embed_tokens.weight, old)
        for copied in (pickle.dumps(model), pickle.dumps(copy.deepcopy(model)), repr(vars(model)).encode()):
            assert token.encode() not in copied
        assert isinstance(AutoModel.from_pretrained("me/moves", cache_dir=tmp_path / "c2", token=token, subfolder=subfolder), ICMGenerator)

    def test_what_reaches_the_generator_reaches_its_base(self, hub, token, tmp_path, monkeypatch):
        layout = AdapterLayout.from_dict({**llama_layout().to_dict(), "base_model_name_or_path": "me/base"})
        generator(layout).push_to_hub(REPO, token=token)
        calls = []
        monkeypatch.setattr(belongings, "load_base", lambda layout, *args, **kwargs: calls.append((args, kwargs)) or llama())
        ICMGenerator.from_pretrained(REPO, cache_dir=tmp_path, token=token).load_base()
        assert calls == [(("me/base", None), {"token": token, "cache_dir": tmp_path})]

    def test_a_repo_names_no_folder_of_this_machine(self, hub, token, tmp_path, monkeypatch):
        model = with_base(tmp_path)
        with pytest.warns(UserWarning, match="goes without its base model"):
            model.push_to_hub(REPO, token=token)
        files = hub.repos["models", REPO].files()
        config = json.loads(files["config.json"])
        assert config["layout"]["base_model_name_or_path"] is None and not any("base_model/" in name for name in files)
        for name in (str(tmp_path / "base0"), "mine/base"):
            config["layout"]["base_model_name_or_path"] = name
            hub.repos["models", REPO].commit("main", {**files, "config.json": json.dumps(config).encode()}, "hostile")
            (tmp_path / "mine" / "base").mkdir(parents=True, exist_ok=True)
            monkeypatch.chdir(tmp_path)
            loaded = ICMGenerator.from_pretrained(REPO, cache_dir=tmp_path / "cache", force_download=True)
            refused(ValueError, loaded.load_base, name, "place on this machine")

    def test_takes_what_transformers_takes(self, hub, token):
        options = {"max_shard_size": "2KB", "tags": ["mine"], "commit_description": "why", "safe_serialization": True}
        generator().push_to_hub(REPO, token=token, **options)
        files = hub.repos["models", REPO].files()
        assert "model.safetensors.index.json" in files and b"- mine" in files["README.md"]


class TestArguments:
    @pytest.mark.parametrize(
        "options",
        [
            {"temperature": float("nan")},
            {"temperature": float("inf")},
            {"temperature": None},
            {"temperature": True},
            {"temperature": "1"},
            {"generator": 0},
            {"generator": "seed"},
            {"generator": [torch.Generator()]},
            {"task_vector": torch.full((CONDITION_DIM,), float("nan"))},
            {"task_vector": torch.zeros(2, CONDITION_DIM)},
            {"task_vector": torch.zeros(0, CONDITION_DIM)},
            {"task_vector": torch.zeros(CONDITION_DIM + 1)},
            {"task_vector": torch.zeros(CONDITION_DIM, dtype=torch.complex64)},
            {"task_vector": [0.0] * CONDITION_DIM},
        ],
    )
    def test_of_an_adapter(self, options):
        model = generator()
        refused(ValueError, lambda: model.generate_state_dict(**{"task_vector": VECTOR, **options}))
        refused(ValueError, lambda: model.generate_adapter(**{"task_vector": VECTOR, "base_model": llama(), **options}))

    @pytest.mark.parametrize("count", [True, 1.0, 0, "2", None])
    def test_of_many(self, count):
        refused(ValueError, lambda: generator().sample(VECTOR, num_samples=count), "num_samples")

    @pytest.mark.parametrize("base", [torch.nn.Linear(2, 2), 3, torch.compile(llama())])
    def test_what_a_base_is(self, base):
        refused(ValueError, lambda: generator().generate_adapter(task_vector=VECTOR, base_model=base), type(base).__name__)

    @pytest.mark.parametrize("name", ["", "..", "a/b", "a\nb", "x" * 300])
    def test_names(self, name):
        refused(ValueError, lambda: generator().generate_adapter(task_vector=VECTOR, base_model=llama(), adapter_name=name), "adapter")
        refused(
            ValueError, lambda: generator().generate_adapters(["cats"], base_model=llama(), adapter_names=[name or ".", "b"]), "adapter"
        )


def test_the_encoder_follows_the_generator():
    class Encoder:
        dim, kind, config = CONDITION_DIM, "fake", {"sha256": "", "kind": "fake"}

        def __init__(self):
            self.model = torch.nn.Linear(1, 1)
            self.model.device = torch.device("cpu")

        def to(self, device):
            self.moved = device

    model = generator()
    model.encoder = encoder = Encoder()
    model.to("meta")
    assert encoder.moved == torch.device("meta")


def test_threads_load_one_base(tmp_path, monkeypatch):
    model, calls = with_base(tmp_path), []
    monkeypatch.setattr(belongings, "load_base", lambda *args, **kwargs: calls.append(1) or load_base(*args, **kwargs))
    found = []
    threads = [threading.Thread(target=lambda: found.append(model.load_base())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len({id(base) for base in found}) == 1 and len(found) == 8
