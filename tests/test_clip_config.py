"""A checkpoint of open_clip from a stranger: its config runs no code and names no files; its hash covers all of it."""

import gzip
import json
import shutil

import pytest
from open_clip.tokenizer import default_bpe
from PIL import Image
from test_conditioning import clip

from peft_icm.bundled import bundled_encoder
from peft_icm.conditioning import ClipEncoder, load_task_encoder

HOSTILE = {
    "model_cfg.text_cfg.tokenizer_kwargs": {"trust_remote_code": True},
    "model_cfg.text_cfg.hf_tokenizer_name": "evil/repo",
    "model_cfg.text_cfg.hf_model_name": "evil/repo",
    "model_cfg.text_cfg.hf_model_config": {"trust_remote_code": True},
    "model_cfg.text_cfg.bpe_path": "/etc/passwd",
    "model_cfg.text_cfg.layers": 10**6,
    "model_cfg.text_cfg.context_length": 10**9,
    "model_cfg.text_cfg.width": "512",
    "model_cfg.text_cfg.heads": True,
    "model_cfg.vision_cfg.image_size": -1,
    "model_cfg.vision_cfg.timm_model_name": "hf-hub:evil/repo",
    "model_cfg.vision_cfg.timm_model_pretrained": True,
    "model_cfg.vision_cfg": "x",
    "model_cfg.text_cfg": None,
    "model_cfg.embed_dim": 1e9,
    "model_cfg.multimodal_cfg": {},
    "preprocess_cfg.mean": [float("nan")] * 3,
    "preprocess_cfg.size": [10**6, 10**6],
    "preprocess_cfg.hook": "os.system",
}


@pytest.fixture
def checkpoint(tmp_path):
    shutil.copytree(bundled_encoder(), tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def with_merges(tmp_path):
    """A checkpoint whose text tower and tokenizer are open_clip's own."""
    clip().save_pretrained(tmp_path / "own")
    shutil.copy(default_bpe(), tmp_path / "own" / "bpe_merges.txt.gz")
    return tmp_path / "own"


def change(checkpoint, path, value):
    file = checkpoint / "open_clip_config.json"
    config = json.loads(file.read_text())
    part = config
    *way, last = path.split(".")
    for name in way:
        part = part.setdefault(name, {})
    part[last] = value
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("path", HOSTILE)
def test_a_field_that_is_not_known_to_be_harmless_is_refused(checkpoint, path):
    change(checkpoint, path, HOSTILE[path])
    with pytest.raises(ValueError, match=r"open_clip_config.json: (model|preprocess)_cfg") as caught:
        ClipEncoder.from_pretrained(str(checkpoint))
    assert "\n" not in str(caught.value) and path in str(caught.value)


def test_merges_that_unpack_to_gigabytes_are_refused(with_merges):
    with gzip.open(with_merges / "bpe_merges.txt.gz", "wb", compresslevel=9) as file:
        for _ in range(300):
            file.write(b"a a\n" * 2**18)
    with pytest.raises(ValueError, match="bpe_merges"):
        ClipEncoder.from_pretrained(str(with_merges))


def reversed_merges(checkpoint):
    file = checkpoint / "bpe_merges.txt.gz"
    first, *rest = gzip.decompress(file.read_bytes()).split(b"\n")
    file.write_bytes(gzip.compress(b"\n".join([first, *rest[::-1]])))


def other_words(checkpoint):
    file = checkpoint / "text" / "tokenizer.json"
    document = json.loads(file.read_text())
    vocabulary = document["model"]["vocab"]
    vocabulary["dog"], vocabulary["cat"] = vocabulary["cat"], vocabulary["dog"]
    file.write_text(json.dumps(document))


def test_the_hash_covers_merges(with_merges):
    config = ClipEncoder.from_pretrained(str(with_merges)).config
    reversed_merges(with_merges)
    with pytest.raises(ValueError, match="has tokenizer and configs of sha256"):
        load_task_encoder(config)


class TestTextTowerOfTransformers:
    def test_another_folder_is_not_read(self, checkpoint):
        change(checkpoint, "model_cfg.text_cfg.hf_model_name", "../elsewhere")
        with pytest.raises(ValueError, match="hf_model_name is '../elsewhere', it must be one of null, \"text\""):
            ClipEncoder.from_pretrained(str(checkpoint))

    def test_no_folder(self, checkpoint):
        shutil.rmtree(checkpoint / "text")
        with pytest.raises((ValueError, OSError), match="cannot be loaded") as caught:
            ClipEncoder.from_pretrained(str(checkpoint))
        assert "\n" not in str(caught.value)

    def test_a_link_out_of_the_folder(self, checkpoint, tmp_path):
        (checkpoint / "text").rename(tmp_path / "elsewhere")
        (checkpoint / "text").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match="leads out of"):
            ClipEncoder.from_pretrained(str(checkpoint))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model_type": "electra"}, "model_type is 'electra', it must be one of bert, roberta, xlm-roberta"),
            ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
            ({"vocab_size": 100}, "must be of one model|cannot be loaded"),
        ],
    )
    def test_a_config_that_is_none(self, checkpoint, changes, message):
        file = checkpoint / "text" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        with pytest.raises(ValueError, match=message):
            ClipEncoder.from_pretrained(str(checkpoint))

    def test_saved_in_as_few_bits(self, checkpoint, tmp_path):
        encoder = ClipEncoder.from_pretrained(str(checkpoint))
        encoder.save_pretrained(tmp_path / "again")
        again = ClipEncoder.from_pretrained(str(tmp_path / "again"))
        assert {**again.config, "checkpoint": ""} == {**encoder.config, "checkpoint": ""}
        sizes = [sum(file.stat().st_size for file in folder.rglob("*.safetensors")) for folder in (checkpoint, tmp_path / "again")]
        assert sizes[1] <= sizes[0]

    def test_padding_changes_nothing(self, checkpoint):
        encoder = ClipEncoder.from_pretrained(str(checkpoint))
        long = "a sentence that goes on and on, so that the other one is padded to its length"
        assert (encoder.encode(["detect sofas", long])[0] - encoder.encode(["detect sofas"])[0]).abs().max() < 1e-5


@pytest.mark.parametrize(
    "change_it",
    [other_words, lambda checkpoint: change(checkpoint, "preprocess_cfg.mean", [3, 3, 3])],
    ids=["words", "how pictures are prepared"],
)
def test_the_hash_covers_what_the_weights_do_not_say(checkpoint, change_it):
    config = ClipEncoder.from_pretrained(str(checkpoint)).config
    assert load_task_encoder(config).config == config
    change_it(checkpoint)
    with pytest.raises(ValueError, match="has tokenizer and configs of sha256"):
        load_task_encoder(config)
    old = {name: value for name, value in config.items() if name != "config_sha256"}  # as 0.1.0 wrote it
    assert load_task_encoder(old).config["sha256"] == config["sha256"]


def test_the_encoder_moves_and_answers_on_the_cpu(checkpoint):
    import torch

    encoder = ClipEncoder.from_pretrained(str(checkpoint))
    before = encoder.encode(["detect sofas"])
    assert encoder.to("cpu", torch.float64) is encoder
    after = encoder.encode(["detect sofas"])
    assert after.dtype == torch.float32 and after.device.type == "cpu"
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)


def test_a_repo_may_not_name_a_folder_of_this_machine(checkpoint):
    config = ClipEncoder.from_pretrained(str(checkpoint)).config
    with pytest.raises(ValueError, match="a place on this machine"):
        load_task_encoder(config, from_hub=True)


def test_a_long_sentence_warns_and_an_unread_one_is_refused(checkpoint, caplog):
    encoder = ClipEncoder.from_pretrained(str(checkpoint))
    encoder.encode(["please " * 500])
    assert "longer than the" in caplog.text
    with pytest.raises(ValueError, match="non-empty strings"):
        encoder.encode("a string")
    assert encoder.encode([Image.new("RGB", (30, 30), "red")]).shape == (1, encoder.dim)
