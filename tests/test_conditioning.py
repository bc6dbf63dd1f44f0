"""Task encoders: what they compute, that they travel, and that another one is refused."""

import open_clip
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import TEXTS, generator, llama, tokenizer
from transformers import BertConfig, BertModel

from peft_icm import ICMGenerator, load_task_encoder
from peft_icm.conditioning import ClipTextEncoder, HiddenStateEncoder, SentenceEncoder

CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}


def clip(seed=0):
    torch.manual_seed(seed)
    return ClipTextEncoder(open_clip.CLIP(**CLIP), open_clip.SimpleTokenizer(context_length=16), "tiny", CLIP)


def sentence(folder):
    torch.manual_seed(0)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(tokenizer()), **size)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return SentenceEncoder.from_pretrained(str(folder))


def hidden_state(folder):
    torch.manual_seed(0)
    llama(vocab_size=len(tokenizer())).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return HiddenStateEncoder.from_pretrained(str(folder))


@pytest.fixture(params=["clip", "sentence", "hidden_state"])
def encoder(request, tmp_path):
    if request.param == "clip":
        clip().save_pretrained(tmp_path / "source")
        return ClipTextEncoder.from_pretrained(str(tmp_path / "source"))
    return {"sentence": sentence, "hidden_state": hidden_state}[request.param](tmp_path / "source")


LINES = ["detect sofas", "continue a play by William Shakespeare", "q"]


class TestEveryKind:
    def test_one_row_for_each_item_alone_or_in_a_batch(self, encoder):
        rows = encoder.encode(LINES)
        assert rows.shape == (3, encoder.dim) and rows.dtype == torch.float32 and not rows.requires_grad
        for index, line in enumerate(LINES):
            torch.testing.assert_close(encoder.encode([line])[0], rows[index], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(encoder.encode(LINES, batch_size=2), rows, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(rows[0], rows[1], atol=1e-3)

    def test_travels_and_keeps_its_hash(self, encoder, tmp_path):
        encoder.save_pretrained(tmp_path / "copy")
        loaded = load_task_encoder(encoder.config, tmp_path / "copy")
        assert loaded.config["sha256"] == encoder.config["sha256"]
        torch.testing.assert_close(loaded.encode(LINES), encoder.encode(LINES))

    def test_other_weights_are_refused(self, encoder, tmp_path):
        encoder.save_pretrained(tmp_path / "copy")
        (file,) = (tmp_path / "copy").glob("*.safetensors")
        weights = load_file(file)
        name = max(weights, key=lambda name: weights[name].numel())
        save_file({**weights, name: weights[name] + 0.5}, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="is not the one that the task vectors were made with"):
            load_task_encoder(encoder.config, tmp_path / "copy")

    @pytest.mark.parametrize("items", [[], "a string", [""], ["  "], [3]])
    def test_what_is_no_text_is_refused(self, encoder, items):
        with pytest.raises(ValueError, match="Expected"):
            encoder.encode(items)


class TestClip:
    def test_is_the_normalised_text_embedding_of_open_clip(self):
        encoder = clip()
        expected = encoder.model.encode_text(encoder.tokenizer(LINES), normalize=True)
        torch.testing.assert_close(encoder.encode(LINES), expected.detach())

    def test_unprojected_is_the_state_of_the_eot_token(self):
        encoder = clip()
        encoder.projected = False
        model, tokens = encoder.model, encoder.tokenizer(LINES)
        with torch.no_grad():
            x = model.token_embedding(tokens) + model.positional_embedding
            x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
        expected = F.normalize(x[torch.arange(3), tokens.argmax(1)], dim=1)
        torch.testing.assert_close(encoder.encode(LINES), expected, rtol=1e-4, atol=1e-5)
        assert encoder.model.text_projection is not None

    def test_names_that_do_not_work(self, tmp_path):
        with pytest.raises(ValueError, match=r"no model 'ViT-Z'.*list_models"):
            ClipTextEncoder.from_pretrained("ViT-Z")
        with pytest.raises(ValueError, match="ViT-B-32 needs pretrained=, one of openai"):
            ClipTextEncoder.from_pretrained("ViT-B-32")
        with pytest.raises(ValueError, match=r"no open_clip checkpoint: it has no open_clip_config\.json"):
            ClipTextEncoder.from_pretrained(str(tmp_path))


class TestHiddenState:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_is_the_last_state_of_the_last_token(self, tmp_path, side):
        encoder = hidden_state(tmp_path)
        encoder.tokenizer.padding_side = side
        rows = encoder.encode(TEXTS)
        for row, text in zip(rows, TEXTS, strict=True):
            ids = encoder.tokenizer(text, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                state = encoder.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
            torch.testing.assert_close(row, state, rtol=1e-4, atol=1e-5)

    def test_reads_the_unadapted_base(self, tmp_path):
        plain = hidden_state(tmp_path)
        expected = plain.encode(TEXTS)
        model = get_peft_model(plain.model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        adapted = HiddenStateEncoder(model, plain.tokenizer, "tiny")
        torch.testing.assert_close(adapted.encode(TEXTS), expected)


def test_sentence_is_the_mean_over_the_tokens(tmp_path):
    encoder = sentence(tmp_path)
    ids = encoder.tokenizer(LINES[1], return_tensors="pt")
    with torch.no_grad():
        state = encoder.model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).last_hidden_state[0].mean(0)
    torch.testing.assert_close(encoder.encode([LINES[1]])[0], F.normalize(state, dim=0), rtol=1e-4, atol=1e-5)


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

    @pytest.mark.parametrize("text", ["", "  ", 3, ["a", "b"]])
    def test_refuses_what_is_no_sentence(self, saved, text):
        with pytest.raises(ValueError, match="must be a non-empty sentence"):
            ICMGenerator.from_pretrained(saved).generate_adapter(text, llama())

    def test_names_the_right_input(self, saved, tmp_path):
        with pytest.raises(ValueError, match="clip encoder reads text=, not examples="):
            ICMGenerator.from_pretrained(saved).task_vector(examples=["a"])
        encoder = hidden_state(tmp_path / "base")
        model = generator(condition_dim=encoder.dim, encoder=encoder.config)
        with pytest.raises(ValueError, match="hidden_state encoder reads examples=, not text="):
            model.task_vector("detect sofas")
        torch.testing.assert_close(model.task_vector(examples=TEXTS), encoder.encode(TEXTS).mean(0))
        with pytest.raises(ValueError, match="non-empty list of strings"):
            model.task_vector(examples="one string")


def test_an_unknown_kind():
    with pytest.raises(ValueError, match="Unknown task encoder 'bert': choose one of clip, hidden_state, sentence"):
        load_task_encoder({"kind": "bert", "checkpoint": "x"})
