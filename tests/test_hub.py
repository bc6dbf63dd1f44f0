"""Push and pull through the real huggingface_hub client, against a Hub of our own over HTTP."""

import io
import json

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model_state_dict
from PIL import Image
from tiny import CONDITION_DIM, florence, florence_layout, generator, llama, llama_layout

from peft_icm import AdapterCollection, ICMConfig, ICMGenerator, push_adapter
from peft_icm.adapters.layout import AdapterLayout
from peft_icm.evaluation.memorisation import memorisation_report
from peft_icm.hub.cards import adapter_card, cards_folder, generator_card
from peft_icm.hub.files import REPORT

REPO = "org/icm-tiny"
VECTOR = torch.linspace(-1, 1, CONDITION_DIM)


BASES = {"llama": (llama, llama_layout), "florence": (florence, florence_layout)}


@pytest.fixture(params=BASES)
def layout(request):
    return BASES[request.param][1]()


@pytest.fixture(params=BASES)
def local_base(request, tmp_path):
    """A generator whose base is a local folder."""
    build, layout = BASES[request.param]
    torch.manual_seed(0)
    build().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "checkpoint-5").mkdir()
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"pickle")
    return generator(AdapterLayout.from_dict({**layout().to_dict(), "base_model_name_or_path": str(tmp_path / "base")}))


def commits(hub, repo=REPO, kind="models"):
    return [message for message in hub.repos[kind, repo].log if message != "initial commit"]


def test_one_commit_there_and_back(hub, token, tmp_path, layout):
    model = generator(layout)
    info = model.push_to_hub(REPO, token=token, commit_message="first")
    assert commits(hub) == ["first"] and info.oid == hub.repos["models", REPO].branches["main"]
    assert set(hub.repos["models", REPO].files()) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    loaded = ICMGenerator.from_pretrained(REPO, cache_dir=tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    again = ICMGenerator.from_pretrained(REPO, cache_dir=tmp_path, local_files_only=True)
    torch.testing.assert_close(again.sample(VECTOR, temperature=0.0), model.sample(VECTOR, temperature=0.0))


def test_a_local_base_travels_and_is_found(hub, token, tmp_path, local_base):
    local_base.push_to_hub(REPO, token=token, with_base_model=True)
    assert len(commits(hub)) == 1
    files = hub.repos["models", REPO].files()
    assert "base_model/model.safetensors" in files
    assert not [name for name in files if name.endswith(".bin") or "checkpoint" in name]
    assert str(tmp_path).encode() not in files["config.json"] + files["README.md"]
    loaded = ICMGenerator.from_pretrained(REPO, cache_dir=tmp_path / "cache")
    model = loaded.generate_adapter(task_vector=VECTOR)
    base = type(model.get_base_model()).from_pretrained(tmp_path / "base")
    found = {name.replace(".base_layer", ""): tensor for name, tensor in model.get_base_model().state_dict().items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in base.state_dict().items())


def test_subfolder_and_revision(hub, token, tmp_path):
    from huggingface_hub import HfApi

    model = generator()
    model.save_pretrained(tmp_path / "g")
    api = HfApi(token=token)
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=tmp_path / "g", path_in_repo="small")
    loaded = ICMGenerator.from_pretrained(REPO, subfolder="small", cache_dir=tmp_path / "cache")
    assert torch.equal(loaded.statistics.mean, model.statistics.mean)
    model.push_to_hub(REPO, token=token, revision="v2")
    assert "model.safetensors" in hub.repos["models", REPO].files("v2")
    assert "model.safetensors" not in hub.repos["models", REPO].files("main")
    ICMGenerator.from_pretrained(REPO, revision="v2", cache_dir=tmp_path / "cache")


def test_private_and_pull_request(hub, token, tmp_path):
    model = generator()
    model.push_to_hub(REPO, token=token, private=True)
    assert hub.repos["models", REPO].private
    with pytest.raises(OSError, match=REPO):
        ICMGenerator.from_pretrained(REPO, cache_dir=tmp_path)
    ICMGenerator.from_pretrained(REPO, token=token, cache_dir=tmp_path)
    before = hub.repos["models", REPO].branches["main"]
    info = model.push_to_hub(REPO, token=token, create_pr=True)
    assert info.pr_url and hub.repos["models", REPO].branches["main"] == before
    assert "refs/pr/1" in hub.repos["models", REPO].branches


class TestCard:
    def test_says_what_is_known_and_nothing_else(self, hub, token, tmp_path):
        model = generator()
        model.config.training = {
            "snapshots": 30,
            "metrics": [{"type": "variance_explained", "name": "variance explained", "value": 0.75, "dataset": "held-out snapshots"}],
        }
        model.push_to_hub(REPO, token=token)
        card = ModelCard(hub.repos["models", REPO].files()["README.md"].decode())
        assert card.data.library_name == "peft_icm"
        assert card.data.eval_results[0].metric_value == 0.75
        text = card.text
        assert f'from_pretrained("{REPO}")' in text and "'about cats'" not in text
        assert "r = 2" in text and "`q_proj`, `v_proj`" in text and "- `sofas`: about sofas" in text
        assert "| snapshots trained on | 30 |" in text
        assert "None" not in text and "seed" not in text and "base model |" not in text

    def test_break_even_is_the_first_number_of_loras_that_weighs_more(self, hub, token):
        model = generator()
        model.push_to_hub(REPO, token=token)
        files = hub.repos["models", REPO].files()
        text = files["README.md"].decode()
        size, one = len(files["model.safetensors"]), model.layout.numel * 4
        number = next(n for n in range(1, 10**6) if n * one >= size)
        assert f"from {number} tasks on" in text

    def test_edited_by_hand_is_kept_until_told_otherwise(self, hub, token):
        model = generator()
        model.push_to_hub(REPO, token=token)
        repo = hub.repos["models", REPO]
        model.push_to_hub(REPO, token=token)
        assert b"ICMGenerator" in repo.files()["README.md"]
        edited = repo.files()["README.md"].replace(b"## Limits", b"## My own words")
        repo.commit("main", {**repo.files(), "README.md": edited}, "by hand")
        model.push_to_hub(REPO, token=token)
        assert repo.files()["README.md"] == edited
        model.push_to_hub(REPO, token=token, overwrite_card=True)
        assert b"## My own words" not in repo.files()["README.md"]

    def test_the_snippet_of_an_adapter_runs(self, hub, token, tmp_path, local_base):
        model = local_base.generate_adapter(task_vector=VECTOR, generator=torch.Generator().manual_seed(5))
        repo = f"me/sofas-{local_base.layout.base_model_class}"  # the client's cache outlives this Hub
        push_adapter(model, repo, token=token, with_base_model=True)
        files = hub.repos["models", repo].files()
        assert {"adapter_config.json", "adapter_model.safetensors", "config.json", "model.safetensors", "README.md"} <= set(files)
        assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == repo
        card = files["README.md"].decode()
        assert "| seed | 5 |" in card and str(tmp_path) not in card
        names = {}
        exec(card.split("```python")[1].split("```")[0], names)
        assert isinstance(names["model"], PeftModel)
        assert type(names["model"].get_base_model()) is type(model.get_base_model())
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items():
            assert torch.equal(get_peft_model_state_dict(names["model"], save_embedding_layers=False)[name], tensor)

    @pytest.mark.parametrize(
        ("encoder", "phrase", "call"),
        [
            ({"kind": "clip", "projected": True}, "a sentence (or a handful of pictures, `images=[...]`)", "'about cats'"),
            ({"kind": "clip", "projected": False}, "a sentence", "'about cats'"),
            ({"kind": "sentence"}, "a sentence", "'about cats'"),
            ({"kind": "hidden_state"}, "a handful of examples", "examples=[...]"),
            ({"kind": "hidden_state", "prompt": "<OD>"}, "a handful of pictures", "images=[...]"),
            (None, "a task vector", "task_vector=vector"),
        ],
    )
    def test_says_what_the_encoder_reads(self, tmp_path, layout, encoder, phrase, call):
        model = generator(layout, encoder=encoder and {"checkpoint": "somewhere", "dim": CONDITION_DIM, "sha256": "0" * 64, **encoder})
        model.save_pretrained(tmp_path)
        text = generator_card(model.config.to_dict(), repo_id=REPO, folder=tmp_path).text
        assert f"turns\n{phrase} into a LoRA adapter" in text and f"generate_adapter({call})" in text and "None" not in text

    def test_tells_the_hub_what_the_base_does(self, layout):
        tag = {"LlamaForCausalLM": "text-generation", "Florence2ForConditionalGeneration": "image-text-to-text"}[layout.base_model_class]
        assert adapter_card(layout.to_dict()).data.pipeline_tag == tag
        nameless = {**llama_layout().to_dict(), "base_model_class": None}  # as peft saves an adapter that has a task type
        assert adapter_card(nameless).data.pipeline_tag == "text-generation"
        assert adapter_card({**layout.to_dict(), "base_model_class": "BertModel"}).data.pipeline_tag is None

    @pytest.mark.parametrize(("images", "row"), [(1, "| 1 picture |"), (10, "| 10 pictures |")])
    def test_says_how_many_pictures_an_adapter_was_generated_from(self, layout, images, row):
        card = adapter_card(layout.to_dict(), images=images)
        assert f"| generated from {row}" in card.text and card.data.icm == {"images": images} and "None" not in card.text

    def test_templates_are_found(self):
        assert {file.name for file in cards_folder().glob("*.md")} == {"adapter.md", "collection.md", "generator.md"}


class TestReport:
    def report(self, model, snapshots=3, tasks=("cats", "dogs")):
        torch.manual_seed(0)
        vectors = {name: torch.randn(1, CONDITION_DIM) for name in tasks}
        return memorisation_report(
            model, AdapterCollection(model.layout, {name: torch.randn(snapshots, model.layout.numel) for name in tasks}, {}, vectors)
        )

    def card(self, report):
        model = generator()
        return generator_card(model.config.to_dict(), repo_id=REPO, folder="nowhere", report=report and report(model)).text

    def test_goes_along_in_the_same_commit(self, hub, token, tmp_path, layout):
        model = generator(layout)
        report = self.report(model)
        model.push_to_hub(REPO, token=token, report=report)
        files = hub.repos["models", REPO].files()
        assert len(commits(hub)) == 1 and json.loads(files[REPORT]) == report
        text, mean = files["README.md"].decode(), report["mean"]
        assert "2 tasks, 8 seeds of z and 6 snapshots. Each task is in `memorisation.json`" in text
        assert f"| generated adapter to the nearest snapshot | {mean['nearest_snapshot']:.3f} |" in text
        assert f"| snapshot to the nearest other snapshot | {mean['between_snapshots']:.3f} |" in text
        assert f"(largest) | {report['cosines']['own']['mean_absolute']:.3f} ({report['cosines']['own']['max_absolute']:.3f}) |" in text
        assert f"lies {100 * mean['nearest_snapshot']:.1f} % of" in text and f"{mean['ratio']:.2f} times as far" in text
        assert text.count("nearer than another snapshot") == 1 and "one snapshot of each task" not in text and "None" not in text
        ICMGenerator.from_pretrained(REPO, cache_dir=tmp_path)

    def test_a_picture_goes_along_without_what_it_says_of_its_camera(self, hub, token, tmp_path):
        exif = Image.Exif()
        exif[0x010F] = "a camera"
        Image.new("RGB", (8, 6), "red").save(tmp_path / "shown.jpg", exif=exif)
        generator().push_to_hub(REPO, token=token, picture=tmp_path / "shown.jpg")
        files = hub.repos["models", REPO].files()
        shown = Image.open(io.BytesIO(files["picture.png"]))
        assert shown.format == "PNG" and shown.size == (8, 6) and not shown.getexif()
        card = ModelCard(files["README.md"].decode())
        assert card.data.widget[0]["output"] == {"url": "picture.png"} and "](picture.png)" in card.text
        generator().push_to_hub("org/plain", token=token)
        assert "picture" not in hub.repos["models", "org/plain"].files()["README.md"].decode().replace("pictures", "")

    def test_no_picture_nothing_on_the_hub(self, hub, token, tmp_path):
        (tmp_path / "shown.png").write_bytes(b"no picture")
        with pytest.raises(ValueError, match=r"shown\.png"):
            generator().push_to_hub(REPO, token=token, picture=tmp_path / "shown.png")
        assert ("models", REPO) not in hub.repos

    @pytest.mark.parametrize(
        ("ratio", "said"), [(0.5, "0.50 times as far as"), (1.5, "1.50 times as far as"), (None, "| generated adapter to the nearest")]
    )
    def test_one_sentence_reads_it(self, ratio, said):
        def changed(model):
            report = self.report(model)
            report["mean"]["ratio"] = ratio
            return report

        text = self.card(changed)
        assert said in text and "None" not in text
        assert ("as copies of snapshots are" in text, "no nearer than another" in text) == (ratio == 0.5, ratio == 1.5)

    def test_one_snapshot_of_each_task(self):
        assert "There is one snapshot of each task here" in self.card(lambda model: self.report(model, snapshots=1))

    def test_one_task_has_no_cosines(self):
        text = self.card(lambda model: self.report(model, tasks=("cats",)))
        assert "over\n1 task, 8 seeds" in text and "cosine" not in text and "None" not in text

    def test_no_section_without_one(self):
        assert "memorise" not in self.card(None)


def test_collection_there_and_back(hub, token, tmp_path):
    layout = llama_layout()
    snapshots = {name: torch.randn(3, layout.numel) for name in ("cats", "dogs")}
    texts = {"cats": ["about cats"], "dogs": ["about dogs", "of dogs"]}
    collection = AdapterCollection(layout, snapshots, texts, metadata={"seed": 0})
    collection.push_to_hub("org/loras", token=token)
    assert commits(hub, "org/loras", "datasets") == ["Upload AdapterCollection"]
    loaded = AdapterCollection.from_pretrained("org/loras", cache_dir=tmp_path)
    assert loaded.descriptions == texts and all(torch.equal(loaded.snapshots[name], snapshots[name]) for name in snapshots)
    card = hub.repos["datasets", "org/loras"].files()["README.md"].decode()
    assert "| `dogs` | 3 | about dogs |" in card and "None" not in card


def test_config_on_the_hub_is_a_config(hub, token, tmp_path):
    generator().push_to_hub(REPO, token=token)
    assert isinstance(ICMConfig.from_pretrained(REPO, cache_dir=tmp_path), ICMConfig)
