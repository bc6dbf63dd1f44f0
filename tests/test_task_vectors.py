"""Task vectors inside a generator and a collection: what is read, whose encoder, and from which folder."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import yaml
from peft import get_peft_model_state_dict
from test_conditioning import clip, florence_encoder, hidden_state, pictures
from test_training import tiny_collection
from tiny import TEXTS, generator, llama

from peft_icm import ICMConfig, ICMGenerator, bundled_generator, save_adapter
from peft_icm.conditioning import open_images


class TestInsideAGenerator:
    @pytest.fixture
    def saved(self, tmp_path):
        """A generator that carries its encoder."""
        encoder = clip()
        model = generator(encoder={**encoder.config, "checkpoint": "encoder", "folder": "encoder"})
        model.encoder = encoder
        model.save_pretrained(tmp_path / "g")
        return tmp_path / "g"

    def test_stands_on_its_own(self, saved, tmp_path):
        moved = saved.rename(tmp_path / "elsewhere")
        loaded = ICMGenerator.from_pretrained(moved)
        vector = clip().encode(["detect sofas"])[0]
        torch.testing.assert_close(loaded.task_vector("detect sofas"), vector)
        model = loaded.generate_adapter("detect sofas", llama(), generator=torch.Generator().manual_seed(0))
        assert model.active_adapter == "default"
        many = loaded.generate_adapters(["detect sofas", "about dogs"], llama(), generator=torch.Generator().manual_seed(0))
        assert sorted(many.peft_config) == ["about_dogs", "detect_sofas"] and many.active_adapter == "detect_sofas"

    def test_refuses_another_encoder(self, saved):
        loaded = ICMGenerator.from_pretrained(saved)
        with pytest.raises(ValueError, match="was trained with the clip encoder of sha256"):
            loaded.encoder = clip(seed=1)
        clip(seed=1).save_pretrained(saved / "encoder")
        with pytest.raises(ValueError, match="is not the one that the task vectors were made with"):
            ICMGenerator.from_pretrained(saved).task_vector("detect sofas")

    def test_a_sentence_is_read_once(self, saved, monkeypatch):
        monkeypatch.setattr("peft_icm.generator.belongings.Sentences.KEPT", 2)
        loaded, read = ICMGenerator.from_pretrained(saved), []
        embed = loaded.encoder._embed
        monkeypatch.setattr(loaded.encoder, "_embed", lambda items: read.extend(items) or embed(items))
        vector = loaded.task_vector("detect sofas")
        vector.zero_()  # whoever asked for it may do with it what he likes
        loaded.generate_adapter("detect sofas", llama())
        assert read == ["detect sofas"]
        torch.testing.assert_close(loaded.task_vector("detect sofas"), clip().encode(["detect sofas"])[0])
        for text in ("about dogs", "about cats", "detect sofas"):  # of two that are kept
            loaded.task_vector(text)
        assert read == ["detect sofas", "about dogs", "about cats", "detect sofas"]
        assert sorted(loaded._lazy["sentences"]) == ["about cats", "detect sofas"]
        assert copy.deepcopy(loaded)._lazy["sentences"] == {}  # nor has a pickle what users asked for
        loaded.encoder = clip()
        assert loaded._lazy["sentences"] == {}

    @pytest.mark.parametrize(
        "device",
        ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))],
    )
    def test_what_goes_to_another_process_has_no_base_and_needs_no_gpu(self, saved, device):
        loaded = ICMGenerator.from_pretrained(saved)
        loaded._lazy["base"] = llama()
        loaded.encoder.to(loaded.to(device).device)
        sent = pickle.loads(pickle.dumps(loaded.portable()))
        for model, where in ((sent, "cpu"), (loaded, device)):
            assert model.device.type == next(model.encoder.model.parameters()).device.type == where
        assert "base" not in sent._lazy and "base" in copy.deepcopy(loaded)._lazy
        torch.testing.assert_close(sent.task_vector("detect sofas"), loaded.task_vector("detect sofas"))

    @pytest.mark.parametrize("text", ["", "  ", 3, ["a", "b"]])
    def test_refuses_what_is_no_sentence(self, saved, text):
        with pytest.raises(ValueError, match="must be a non-empty sentence"):
            ICMGenerator.from_pretrained(saved).generate_adapter(text, llama())

    def test_pictures_alone_and_beside_a_text(self, saved, tmp_path):
        loaded, encoder = ICMGenerator.from_pretrained(saved), clip()
        files = [tmp_path / f"{index}.png" for index in range(3)]
        for file, picture in zip(files, pictures(), strict=True):
            picture.save(file)
        seen = F.normalize(encoder.encode(pictures()).mean(0), dim=0)
        torch.testing.assert_close(loaded.task_vector(images=pictures()), seen)
        torch.testing.assert_close(loaded.task_vector(images=[files[0], str(files[1]), pictures()[2]]), seen)
        both = F.normalize(encoder.encode(["detect sofas"])[0] + seen, dim=0)
        torch.testing.assert_close(loaded.task_vector("detect sofas", images=files), both)
        draws = [torch.Generator().manual_seed(0) for _ in range(3)]
        tensors = loaded.generate_state_dict("detect sofas", images=files, generator=draws[0])
        model = loaded.generate_adapter("detect sofas", llama(), images=files, generator=draws[1])
        assert all(torch.equal(tensors[key], value) for key, value in get_peft_model_state_dict(model).items())
        card = save_adapter(model, tmp_path / "adapter") / "README.md"
        facts = yaml.safe_load(card.read_text().split("---")[1])["icm"]
        assert facts.pop("sha256") == loaded.layout.sha256(tensors)
        assert facts == {
            "generator": saved.name,  # not where it lies on this machine
            "text": "detect sofas",
            "images": 3,
            "seed": 0,
            "temperature": 1.0,
        }
        text_only = loaded.generate_state_dict("detect sofas", generator=draws[2])
        assert any(not torch.equal(tensors[key], text_only[key]) for key in tensors)

    def test_what_is_no_picture(self, saved, tmp_path):
        loaded = ICMGenerator.from_pretrained(saved)
        (tmp_path / "text.png").write_text("no picture")
        pictures(1)[0].save(tmp_path / "cut.png")
        (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
        for name in ("text.png", "cut.png", "missing.png"):
            with pytest.raises(ValueError, match=f"{name} is no picture that can be opened"):
                loaded.task_vector(images=[tmp_path / name])
        for images in ([], "text.png", pictures(1)[0]):
            with pytest.raises(ValueError, match="must be a non-empty list of PIL images or paths"):
                loaded.task_vector(images=images)
        with pytest.raises(ValueError, match="Expected a list of non-empty strings or of PIL images for the clip encoder, found 3"):
            loaded.task_vector(images=[3])
        assert open_images(pictures()) == pictures()

    def test_refuses_an_encoder_of_another_width(self):
        model = generator(condition_dim=9)
        with pytest.raises(ValueError, match="condition_dim is 9, the clip encoder's task vectors have 8 numbers"):
            model.encoder = clip()

    def test_a_folder_outside_of_its_own(self, saved, tmp_path, hub, token):
        """Two generators may share an encoder's folder; what is saved or pushed of them stands on its own."""
        (saved / "encoder").rename(tmp_path / "shared")
        config = ICMConfig.from_pretrained(saved)
        config.encoder = {**config.encoder, "folder": "../shared"}
        config.save_pretrained(saved)
        loaded, expected = ICMGenerator.from_pretrained(saved), clip().encode(["detect sofas"])[0]
        torch.testing.assert_close(loaded.task_vector("detect sofas"), expected)
        before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
        loaded.save_pretrained(tmp_path / "deep" / "copy")
        assert loaded.config.encoder["folder"] == "../shared"
        assert {file: file.read_bytes() for file in before} == before
        assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["copy"]
        (tmp_path / "shared").rename(tmp_path / "gone")
        copy = ICMGenerator.from_pretrained(tmp_path / "deep" / "copy")
        assert copy.config.encoder["folder"] == "encoder"
        torch.testing.assert_close(copy.task_vector("detect sofas"), expected)
        loaded.push_to_hub("org/shared", token=token)
        pulled = ICMGenerator.from_pretrained("org/shared")
        assert pulled.config.encoder["folder"] == "encoder"
        torch.testing.assert_close(pulled.task_vector("detect sofas"), expected)

    @pytest.mark.parametrize("folder", ["../../encoder", "encoder/../..", "/encoder"])
    def test_a_folder_outside_of_a_repo_is_not_followed(self, saved, hub, token, folder):
        ICMGenerator.from_pretrained(saved).push_to_hub("org/hostile", token=token)
        pulled = ICMGenerator.from_pretrained("org/hostile")
        pulled.config.encoder["folder"] = folder
        with pytest.raises(ValueError, match="org/hostile names the folder .*, outside its own repo"):
            pulled.task_vector("detect sofas")

    def test_the_bundled_ones_share_theirs(self, tmp_path):
        bundled = ICMGenerator.from_pretrained(bundled_generator("text"))
        bundled.save_pretrained(tmp_path / "copy", with_base_model=True)
        assert {path.name for path in (tmp_path / "copy").iterdir() if path.is_dir()} == {"encoder", "base_model"}
        copy = ICMGenerator.from_pretrained(tmp_path / "copy")
        torch.testing.assert_close(copy.task_vector("detect sofas"), bundled.task_vector("detect sofas"))

    def test_names_the_right_input(self, saved, tmp_path):
        with pytest.raises(ValueError, match="clip encoder reads, text= and/or images=, or task_vector= alone; found examples="):
            ICMGenerator.from_pretrained(saved).task_vector(examples=["a"])
        encoder = hidden_state(tmp_path / "base")
        model = generator(condition_dim=encoder.dim, encoder=encoder.config)
        with pytest.raises(ValueError, match="hidden_state encoder reads, examples=, or task_vector= alone; found text="):
            model.task_vector("detect sofas")
        torch.testing.assert_close(model.task_vector(examples=TEXTS), encoder.encode(TEXTS).mean(0))
        with pytest.raises(ValueError, match="non-empty list of strings"):
            model.task_vector(examples="one string")


class TestInACollection:
    def test_rows_of_texts_and_pictures(self, tmp_path):
        collection, encoder = tiny_collection(), clip()
        first, *rest = collection.tasks
        collection.descriptions = {task: [f"about {task}", f"{task}, please"] for task in collection.tasks}
        pictures(1)[0].save(tmp_path / "a.png")
        collection.encode(encoder, images={first: [tmp_path / "a.png", pictures()[1]]})
        expected = torch.cat([encoder.encode(collection.descriptions[first]), encoder.encode(pictures()[:2])])
        torch.testing.assert_close(collection.task_vectors[first], expected)
        assert all(len(collection.task_vectors[task]) == 2 for task in rest)
        collection.descriptions = {}
        with pytest.raises(ValueError, match=f"clip encoder reads text or images; task '{rest[0]}' has none"):
            collection.encode(encoder, images={first: pictures()})

    def test_pictures_alone(self, tmp_path):
        collection, encoder = tiny_collection(), florence_encoder(tmp_path)
        with pytest.raises(ValueError, match="hidden_state encoder reads images; task"):
            collection.encode(encoder)
        collection.encode(encoder, images={task: pictures(1) for task in collection.tasks})
        assert all(vectors.shape == (1, 16) for vectors in collection.task_vectors.values())
