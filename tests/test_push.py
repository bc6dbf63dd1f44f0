"""What a push publishes, and what it does not: bases, paths of this machine, cards that people edit."""

import dataclasses
import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModel, AutoPeftModelForCausalLM, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import CONDITION_DIM, florence, florence_layout, generator, llama, llama_layout, llama_lora

from peft_icm import AdapterCollection, push_adapter, save_adapter
from peft_icm.hub.bases import copy_base
from peft_icm.hub.cards import adapter_card, collection_card, generator_card
from peft_icm.hub.files import edited_by_hand, marked, published, push_folder

REPO = "me/sofas"
VECTOR = torch.linspace(-1, 1, CONDITION_DIM)
BASES = {"llama": (llama, llama_layout, AutoPeftModelForCausalLM), "florence": (florence, florence_layout, AutoPeftModel)}


def files(hub, repo=REPO, kind="models", revision="main"):
    return hub.repos[kind, repo].files(revision)


def text_of(hub, repo=REPO, kind="models"):
    return files(hub, repo, kind)["README.md"].decode()


def generated(folder, base, layout=None, **options):
    """A generated adapter of a base in a local folder, and where it is saved."""
    named = dataclasses.replace(layout or llama_layout(), base_model_name_or_path=str(base))
    options = {"task_vector": VECTOR, "generator": torch.Generator().manual_seed(5), **options}
    model = generator(named).generate_adapter(**options)
    return model, save_adapter(model, folder)


@pytest.fixture
def adapter(base, tmp_path):
    return generated(tmp_path / "adapter", base)[1]


class TestWithItsBase:
    @pytest.mark.parametrize("name", BASES)
    @pytest.mark.parametrize("revision", [None, "v2"])
    def test_peft_alone_loads_both(self, hub, token, tmp_path, name, revision):
        build, layout, auto = BASES[name]
        torch.manual_seed(0)
        build().save_pretrained(tmp_path / "base")
        model, folder = generated(tmp_path / "a", tmp_path / "base", layout())
        info = push_adapter(folder, REPO, token=token, with_base_model=True, revision=revision)
        assert hub.repos["models", REPO].log == ["initial commit", "Upload generated adapter"]
        assert info.oid == hub.repos["models", REPO].branches[revision or "main"]
        loaded = auto.from_pretrained(REPO, revision=revision, cache_dir=tmp_path / "cache").eval()
        ids = torch.arange(3, 15)[None]
        call = {"input_ids": ids, **({"decoder_input_ids": ids} if name == "florence" else {})}
        with torch.no_grad():
            assert torch.equal(loaded(**call).logits, model(**call).logits)
            with loaded.disable_adapter(), model.disable_adapter():
                assert torch.equal(loaded(**call).logits, model(**call).logits)

    def test_the_snippet_of_the_card_runs(self, hub, token, base, adapter, tmp_path, monkeypatch):
        push_adapter(adapter, "me/snippet-with-base", token=token, with_base_model=True)
        shutil.rmtree(base)
        names = {}
        exec(text_of(hub, "me/snippet-with-base").split("```python")[1].split("```")[0], names)
        found = get_peft_model_state_dict(names["model"], save_embedding_layers=False)
        saved = load_file(adapter / "adapter_model.safetensors")
        assert saved.keys() == found.keys() and all(torch.equal(found[key], tensor) for key, tensor in saved.items())

    def test_only_when_asked(self, hub, token, adapter):
        push_adapter(adapter, REPO, token=token)
        assert set(files(hub)) == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
        assert json.loads(files(hub)["adapter_config.json"])["base_model_name_or_path"] == "base"
        assert "a folder that is not in this repo" in text_of(hub) and '"path/to/the/base"' in text_of(hub)

    def test_only_files_of_a_model(self, hub, token, base, adapter):
        for name in ("passwords.txt", "optimizer.pt", "run.py", "other.safetensors", "training_args.bin", "notes.json", ".env"):
            (base / name).write_text("{}")
        (base / "checkpoint-5").mkdir()
        (base / "checkpoint-5" / "config.json").write_text("{}")
        (base / "README.md").write_text("the base's own card")
        (base / "tokenizer_config.json").write_text(
            json.dumps({"name_or_path": str(base), "added_tokens_decoder": {"7": {"content": "/>"}}})
        )
        push_adapter(adapter, REPO, token=token, with_base_model=True)
        of_the_base = {"config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"}
        assert set(files(hub)) == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", *of_the_base}
        assert text_of(hub).startswith("---\n") and "own card" not in text_of(hub)
        wanted = {"name_or_path": "base", "added_tokens_decoder": {"7": {"content": "/>"}}}
        assert json.loads(files(hub)["tokenizer_config.json"]) == wanted

    def test_shards_by_their_index(self, base, tmp_path):
        model = llama()
        shutil.rmtree(base)
        model.save_pretrained(base, max_shard_size="2KB")
        copy_base(base, tmp_path / "there")
        loaded = type(model).from_pretrained(tmp_path / "there" / "base_model")
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
        next(base.glob("model-*.safetensors")).unlink()
        with pytest.raises(ValueError, match="lacks model-0.*index"):
            copy_base(base, tmp_path / "again")
        assert not (tmp_path / "again").exists()

    def test_the_cache_of_huggingface_hub_is_a_folder_like_any_other(self, base, tmp_path):
        blobs, snapshot = tmp_path / "models--org--llama" / "blobs", tmp_path / "models--org--llama" / "snapshots" / ("0" * 40)
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for file in base.iterdir():
            shutil.copy(file, blobs / file.name)
            (snapshot / file.name).symlink_to(blobs / file.name)
        copy_base(snapshot, tmp_path / "there")
        assert (tmp_path / "there/base_model/model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
        assert not any(file.is_symlink() for file in (tmp_path / "there/base_model").iterdir())
        assert published(str(snapshot)) == "org/llama"

    @pytest.mark.parametrize(
        ("spoil", "said"),
        [
            (lambda base: (base / "config.json").unlink(), "no config.json with a model_type"),
            (lambda base: (base / "config.json").write_text("[]"), "no config.json with a model_type"),
            (lambda base: (base / "config.json").write_text("{"), "no config.json with a model_type"),
            (lambda base: (base / "model.safetensors").rename(base / "pytorch_model.bin"), "only safetensors are pushed"),
            (lambda base: (base / "adapter_config.json").write_text("{}"), "holds an adapter"),
            (lambda base: (base / "LICENSE").symlink_to("/etc/passwd"), "LICENSE is a link"),
            (lambda base: _link(base / "model.safetensors"), "model.safetensors is a link"),
            (lambda base: _index(base, {"a": "../secret.safetensors"}), "no index of weights"),
            (lambda base: _index(base, ["a"]), "no index of weights"),
            (lambda base: _index(base, {"a": "secret.txt"}), "lacks secret.txt"),
            (shutil.rmtree, "a base that is a local folder"),
        ],
    )
    def test_what_is_no_base_is_refused_and_nothing_is_made(self, hub, token, base, adapter, spoil, said):
        spoil(base)
        with pytest.raises(ValueError, match=said) as error:
            push_adapter(adapter, REPO, token=token, with_base_model=True)
        assert "\n" not in str(error.value) and not hub.repos


def _link(file):
    file.rename(file.parent.parent / "elsewhere.safetensors")
    file.symlink_to(file.parent.parent / "elsewhere.safetensors")


def _index(base, weight_map):
    (base / "model.safetensors").rename(base / "secret.txt")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


class TestPathsOfThisMachine:
    @pytest.mark.parametrize(
        ("value", "told"),
        [
            ("/home/ada/models/llama", "llama"),
            ("/data/llama/", "llama"),
            ("~/llama", "llama"),
            ("../llama", "llama"),
            ("C:\\models\\llama", "llama"),
            ("org/name", "org/name"),
            ("gpt2", "gpt2"),
            ("/imagine a cat", "/imagine a cat"),
            ("/", "/"),
            ("https://x.org/a", "https://x.org/a"),
            ({"a": ["/x/y", 1, None]}, {"a": ["y", 1, None]}),
        ],
    )
    def test_are_told_by_their_names(self, value, told):
        assert published(value) == told

    def test_nor_relative_ones_that_are_there(self, tmp_path, monkeypatch):
        (tmp_path / "mine" / "llama").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert published("mine/llama") == "llama" and published("other/llama") == "other/llama"

    def test_are_in_no_adapter(self, hub, token, base, tmp_path):
        made = generator(dataclasses.replace(llama_layout(), base_model_name_or_path=str(base)))
        made._source["name"] = str(tmp_path / "my-generator")
        model = made.generate_adapter(task_vector=VECTOR, base_model=str(base))
        for number, what in enumerate((model, save_adapter(model, tmp_path / "a"))):
            push_adapter(what, f"{REPO}{number}", token=token)
            assert not [name for name, content in files(hub, f"{REPO}{number}").items() if str(tmp_path).encode() in content]
            assert "| generator | my-generator |" in text_of(hub, f"{REPO}{number}")

    def test_are_in_no_collection(self, hub, token, base, tmp_path):
        layout = dataclasses.replace(llama_layout(), base_model_name_or_path=str(base))
        metadata = {"base_model": str(base), "made_from": [str(tmp_path / "lora")], "tasks": {"folder": str(tmp_path)}, "seed": 0}
        encoder = {"kind": "sentence", "checkpoint": str(tmp_path / "encoder"), "dim": 8, "sha256": ""}
        collection = AdapterCollection(layout, {"cats": torch.randn(2, layout.numel)}, {"cats": ["of cats"]}, {}, encoder, metadata)
        collection.push_to_hub("me/loras", token=token)
        assert not [name for name, content in files(hub, "me/loras", "datasets").items() if str(tmp_path).encode() in content]
        pulled = AdapterCollection.from_pretrained("me/loras", cache_dir=tmp_path / "cache")
        assert pulled.metadata == {"base_model": "base", "made_from": ["lora"], "tasks": {"folder": tmp_path.name}, "seed": 0}
        assert (pulled.layout.base_model_name_or_path, pulled.encoder["checkpoint"]) == ("base", "encoder")
        assert collection.metadata == metadata and collection.layout == layout

    def test_a_file_that_names_one_is_not_pushed(self, hub, token, tmp_path):
        def write(folder):
            (folder / "facts.json").write_text(json.dumps({"note": f"trained in {tmp_path}/x, long ago"}))

        with pytest.raises(ValueError, match=f"facts.json names {tmp_path}/x,") as error:
            push_folder(write, REPO, card=lambda folder: ModelCard("words"), token=token)
        assert "\n" not in str(error.value) and not hub.repos


class TestCardsThatPeopleEdit:
    EDIT = "\n## My results\n\nMeasured by hand: 0.93.\n"

    def test_the_mark_tells(self):
        text = marked("---\nlicense: mit\n---\n\n# A card")
        assert not edited_by_hand(text) and not edited_by_hand(text.replace("\n", "\r\n")) and marked(text) != text
        assert edited_by_hand(text + self.EDIT) and edited_by_hand(text.replace("mit", "gpl")) and edited_by_hand("# A card")

    def test_a_saved_adapter_has_it(self, adapter):
        assert not edited_by_hand((adapter / "README.md").read_text())

    def test_an_edited_card_of_an_adapter_is_pushed_as_it_is(self, hub, token, adapter):
        card = adapter / "README.md"
        card.write_text(card.read_text().replace("---\n", "---\nlicense: mit\n", 1) + self.EDIT)
        push_adapter(adapter, REPO, token=token)
        assert text_of(hub) == card.read_text()
        card.write_text("# Mine alone\n")
        push_adapter(adapter, REPO, token=token)  # the card on the Hub was edited too: this one is newer
        assert text_of(hub) == "# Mine alone\n"

    def test_an_edited_card_of_a_collection_is_pushed_as_it_is(self, hub, token, tmp_path):
        layout = llama_layout()
        AdapterCollection(layout, {"cats": torch.randn(1, layout.numel)}, {"cats": ["of cats"]}).save_pretrained(tmp_path / "c")
        (tmp_path / "c" / "README.md").write_text("# My cats\n")
        AdapterCollection.from_pretrained(tmp_path / "c").push_to_hub("me/loras", token=token)
        assert text_of(hub, "me/loras", "datasets") == "# My cats\n"

    @pytest.mark.parametrize("change", [lambda card: card.unlink(), lambda card: None])
    def test_a_folder_without_one_gets_a_fresh_one(self, hub, token, adapter, change):
        change(adapter / "README.md")
        push_adapter(adapter, REPO, token=token)
        assert f'"{REPO}"' in text_of(hub) and not edited_by_hand(text_of(hub))

    def test_a_card_that_is_no_yaml_is_refused(self, hub, token, adapter):
        (adapter / "README.md").write_text("---\nlicense: [mit\n---\n# Mine\n")
        with pytest.raises(ValueError, match="README.md: its front matter") as error:
            push_adapter(adapter, REPO, token=token)
        assert "\n" not in str(error.value) and not hub.repos

    def test_an_edited_card_on_the_hub_stays_until_told_otherwise(self, hub, token, adapter):
        push_adapter(adapter, REPO, token=token)
        repo = hub.repos["models", REPO]
        repo.commit("main", {**repo.files(), "README.md": b"# By hand\n"}, "by hand")
        push_adapter(adapter, REPO, token=token)
        assert text_of(hub) == "# By hand\n"
        push_adapter(adapter, REPO, token=token, overwrite_card=True)
        assert "# LoRA adapter" in text_of(hub)

    def test_tags_and_description(self, hub, token, adapter):
        push_adapter(adapter, REPO, token=token, tags=["cats", "lora"], commit_message="one", commit_description="two")
        assert ModelCard(text_of(hub)).data.tags == ["lora", "icm", "generated", "cats"]
        repo = hub.repos["models", REPO]
        assert (repo.log[-1], repo.descriptions[-1]) == ("one", "two")


class TestCardsTellTheTruth:
    def test_generated(self, hub, token, adapter):
        push_adapter(adapter, REPO, token=token)
        assert "Generated, not trained" in text_of(hub) and "| seed | 5 |" in text_of(hub)
        facts = ModelCard(text_of(hub)).data.icm
        assert facts == {"seed": 5, "temperature": 1.0, "sha256": facts["sha256"]}

    @pytest.mark.parametrize("save", [save_adapter, lambda model, folder: model.save_pretrained(folder)])
    def test_trained(self, hub, token, base, tmp_path, save):
        model = llama_lora()
        model.peft_config["default"].base_model_name_or_path = str(base)
        model.get_base_model().config._name_or_path = str(base)  # which peft writes into its card
        save(model, tmp_path / "trained")
        push_adapter(tmp_path / "trained", REPO, token=token)
        assert "enerated" not in text_of(hub) and "generated" not in ModelCard(text_of(hub)).data.tags
        assert "More Information Needed" not in text_of(hub) and str(tmp_path) not in text_of(hub)
        card = tmp_path / "trained" / "README.md"
        card.write_text(card.read_text() + TestCardsThatPeopleEdit.EDIT)
        push_adapter(tmp_path / "trained", REPO, token=token)
        assert "Measured by hand" in text_of(hub) and str(tmp_path) not in text_of(hub)

    @pytest.mark.parametrize(
        "facts", ["icm: 3\n", "icm: [a]\n", "icm:\n  layout: 1\n  foo: {a: 1}\n  3: 4\n  text: [a]\n  seed: x\n  images: true\n"]
    )
    def test_facts_that_are_none(self, hub, token, adapter, facts):
        text = (adapter / "README.md").read_text().split("<!-- written")[0]
        start, end = text.index("icm:\n"), text.index("---\n", 4)
        (adapter / "README.md").write_text(marked(text[:start] + facts + text[end:]))
        push_adapter(adapter, REPO, token=token)
        assert "enerated" not in text_of(hub) and ModelCard(text_of(hub)).data.get("icm") is None

    @pytest.mark.parametrize("known", [{}, {"r": 2}, {"lora_alpha": 4}, {"r": 2, "lora_alpha": 4}])
    @pytest.mark.parametrize(
        ("targets", "told"),
        [
            *((targets, ["on `q_proj`"]) for targets in (["q_proj"], {"q_proj"}, ("q_proj",), "q_proj")),
            (["v_proj", "q_proj"], ["on `q_proj`, `v_proj`"]),
            ("a|b", ["on `a\\|b`"]),
            *((targets, []) for targets in (None, 7, [])),
        ],
    )
    def test_what_is_known_of_the_lora_and_nothing_else(self, known, targets, told):
        text = adapter_card({"peft_config": {**known, "target_modules": targets}}).text
        row = ", ".join([f"{name.removeprefix('lora_')} = {value}" for name, value in known.items()] + told)
        assert f"\n| LoRA | {row} |\n" in text and "None" not in text

    @pytest.mark.parametrize("missing", list(llama_layout().to_dict()))
    def test_no_field_is_needed(self, tmp_path, missing):
        layout = {name: value for name, value in llama_layout().to_dict().items() if name != missing}
        layout["peft_config"] = {name: value for name, value in layout.get("peft_config", {}).items() if name != "r"}
        config = {
            "layout": layout,
            "encoder": {"kind": "clip"},
            "tasks": ["cats", {"name": "dogs"}],
            "training": {"metrics": [1, {"name": "x"}]},
        }
        manifest = {"layout": layout, "tasks": [{"name": "cats"}, {"descriptions": "of dogs"}, 3], "metadata": {"versions": 3}}
        for card in (adapter_card(layout), generator_card(config, repo_id=REPO, folder=tmp_path), collection_card(manifest, repo_id=REPO)):
            assert card.text.strip()
        assert generator_card({}, repo_id=REPO, folder=tmp_path).text and collection_card({}, repo_id=REPO).text

    def test_words_stay_in_their_cells_and_names_in_their_quotes(self):
        layout = {**llama_layout().to_dict(), "base_model_name_or_path": 'x"); import os #', "base_model_class": "A\nimport os"}
        text = adapter_card(layout, text="a | b\n\n# c", seed=1).text
        assert "| text | a \\| b # c |" in text and "\nimport os" not in text
        compile(text.split("```python")[1].split("```")[0], "card", "exec")
        assert "import os" not in text.split("```python")[1].split("```")[0].replace('"x\\"); import os #"', "")


def test_a_folder_that_is_no_adapter_makes_no_repo(hub, token, tmp_path, adapter):
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    for bad in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match="holds no adapter_model.safetensors|is no folder"):
            push_adapter(bad, REPO, token=token)
    with pytest.raises(ValueError, match="Repo id"):
        push_adapter(adapter, "a/b/c", token=token)
    assert not hub.repos


def test_the_token_is_nowhere(hub, token, adapter, capfd, caplog):
    push_adapter(adapter, REPO, token=token, private=True)
    assert not [name for name, content in files(hub).items() if token.encode() in content]
    assert token not in "".join(capfd.readouterr()) + caplog.text
    assert hub.repos["models", REPO].private
