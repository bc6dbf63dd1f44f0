"""Task encoders: what they compute, that they travel, and that another one is refused."""

import json
import weakref

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import FLORENCE_TARGETS, TEXTS, florence_processor, florence_reader, generator, llama, tokenizer
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, Llama4ForCausalLM, Llama4TextConfig, T5Config, T5Model

from peft_icm import load_task_encoder
from peft_icm.conditioning import ClipEncoder, HiddenStateEncoder, SentenceEncoder, StatisticsEncoder
from peft_icm.conditioning.base import MAX_TOKENS

CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}


def clip(seed=0):
    torch.manual_seed(seed)
    return ClipEncoder(open_clip.CLIP(**CLIP), open_clip.SimpleTokenizer(context_length=16), "tiny", CLIP)


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


def florence_encoder(folder, **options):
    """Random weights that are large enough to see pictures; every tenth token an end and no token twice, so that answers end soon."""
    torch.manual_seed(0)
    model = florence_reader()
    for parameter in model.parameters():
        parameter.data *= 20 if parameter.ndim > 1 else 1
    model.generation_config.eos_token_id = list(range(2, model.config.text_config.vocab_size, 10))
    model.generation_config.no_repeat_ngram_size = 1
    model.save_pretrained(folder)
    florence_processor().save_pretrained(folder)
    return HiddenStateEncoder.from_pretrained(str(folder), **options)


def pictures(count=3, mode="RGB"):
    """Noise of several sizes."""
    draw = torch.Generator().manual_seed(0)
    sizes = [(20 + 7 * index, 31 - 5 * index, 3) for index in range(count)]
    return [Image.fromarray(torch.randint(256, size, generator=draw, dtype=torch.uint8).numpy()).convert(mode) for size in sizes]


@pytest.fixture(params=["clip", "sentence", "hidden_state"])
def encoder(request, tmp_path):
    if request.param == "clip":
        clip().save_pretrained(tmp_path / "source")
        return ClipEncoder.from_pretrained(str(tmp_path / "source"))
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

    def test_half_of_a_character_is_refused(self, encoder):
        with pytest.raises(ValueError, match=r"'detect \\ud800' has a surrogate, half of a character"):
            encoder.encode(["detect sofas", "detect \ud800"])

    @pytest.mark.parametrize("items", [[], "a string", [""], ["  "], [3], pictures(1)[0]])
    def test_what_it_does_not_read_is_refused(self, encoder, items):
        with pytest.raises(ValueError, match=f"Expected a list of non-empty strings.* for the {encoder.kind} encoder, found"):
            encoder.encode(items)

    def test_a_picture_where_none_is_read(self, encoder):
        if "images" not in encoder.accepts:
            with pytest.raises(ValueError, match="Expected a list of non-empty strings for the .* encoder, found <PIL"):
                encoder.encode(pictures())


class TestClip:
    def test_is_the_normalised_text_embedding_of_open_clip(self):
        encoder = clip()
        expected = encoder.model.encode_text(encoder.tokenizer(LINES), normalize=True)
        torch.testing.assert_close(encoder.encode(LINES), expected.detach())

    def test_pictures_are_the_normalised_image_embedding_of_open_clip(self, tmp_path):
        """Prepared as the checkpoint says, and still so after saving."""
        clip().save_pretrained(tmp_path)
        config = json.loads((tmp_path / "open_clip_config.json").read_text())
        config["preprocess_cfg"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "interpolation": "bilinear", "resize_mode": "squash"}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        encoder = ClipEncoder.from_pretrained(str(tmp_path))
        encoder.save_pretrained(tmp_path / "copy")
        prepare = image_transform_v2(PreprocessCfg(**config["preprocess_cfg"]), is_train=False)
        pixels = torch.stack([prepare(picture) for picture in pictures()])
        expected = clip().model.encode_image(pixels, normalize=True).detach()
        for one in (encoder, ClipEncoder.from_pretrained(str(tmp_path / "copy"))):
            torch.testing.assert_close(one.encode(pictures()), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(one.encode(pictures()[1:2])[0], expected[1], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(clip().encode(pictures()), expected, atol=1e-3)

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
    def test_pictures_of_every_mode(self, mode):
        (picture,) = pictures(1, mode)
        torch.testing.assert_close(clip().encode([picture]), clip().encode([picture.convert("RGB")]))

    def test_the_space_before_the_projection_is_gone(self, tmp_path):
        clip().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="projected=False: .* encode the tasks again"):
            ClipEncoder.from_pretrained(str(tmp_path), projected=False)

    def test_strings_and_pictures_in_one_list(self):
        with pytest.raises(ValueError, match="non-empty strings or of PIL images for the clip encoder, found both in one list"):
            clip().encode([*LINES, *pictures()])

    def test_an_openai_checkpoint_gets_its_activation(self, tmp_path, monkeypatch):
        """open_clip's plain names have GELU, OpenAI's weights of those names are for QuickGELU; a copy remembers it."""
        clip().save_pretrained(tmp_path)
        file = {"file": str(tmp_path / "open_clip_model.safetensors")}
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-tiny", CLIP)
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "ViT-tiny", {"openai": {**file, "quick_gelu": True}, "laion": file})
        openai, laion = (ClipEncoder.from_pretrained("ViT-tiny", pretrained=tag) for tag in ("openai", "laion"))
        torch.testing.assert_close(laion.encode(LINES), clip().encode(LINES))
        quick = open_clip.CLIP(**CLIP, quick_gelu=True).eval()
        quick.load_state_dict(clip().model.state_dict())
        expected = quick.encode_text(openai.tokenizer(LINES), normalize=True).detach()
        openai.save_pretrained(tmp_path / "copy")
        for encoder in (openai, load_task_encoder(openai.config, tmp_path / "copy")):
            torch.testing.assert_close(encoder.encode(LINES), expected)
        assert not torch.allclose(expected, laion.encode(LINES), atol=1e-4)

    @pytest.mark.parametrize(("part", "key"), [("text_cfg", "width"), ("vision_cfg", "width"), (None, "embed_dim")])
    def test_weights_that_do_not_fit_the_config(self, tmp_path, part, key):
        clip().save_pretrained(tmp_path)
        config = json.loads((tmp_path / "open_clip_config.json").read_text())
        (config["model_cfg"][part] if part else config["model_cfg"])[key] *= 2
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"cannot be loaded: .*(size mismatch|width changed)") as error:
            ClipEncoder.from_pretrained(str(tmp_path))
        assert len(str(error.value)) < 700 and "\n" not in str(error.value)
        (tmp_path / "open_clip_model.safetensors").unlink()
        with pytest.raises((ValueError, OSError), match="open_clip_model.safetensors"):
            ClipEncoder.from_pretrained(str(tmp_path))

    def test_names_that_do_not_work(self, tmp_path):
        with pytest.raises(ValueError, match=r"no model 'ViT-Z'.*list_models"):
            ClipEncoder.from_pretrained("ViT-Z")
        with pytest.raises(ValueError, match="ViT-B-32 needs pretrained=, one of openai"):
            ClipEncoder.from_pretrained("ViT-B-32")
        with pytest.raises(ValueError, match=r"no open_clip checkpoint: it has no open_clip_config\.json"):
            ClipEncoder.from_pretrained(str(tmp_path))


class TestHiddenState:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_is_the_last_state_of_the_last_token(self, tmp_path, side):
        encoder = hidden_state(tmp_path)
        encoder.processor.padding_side = side
        rows = encoder.encode(TEXTS)
        for row, text in zip(rows, TEXTS, strict=True):
            ids = encoder.processor(text, return_tensors="pt")["input_ids"]
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
        adapted = HiddenStateEncoder(model, plain.processor, "tiny")
        torch.testing.assert_close(adapted.encode(TEXTS), expected)


def language_model(kind, layers=6):
    """A base of random weights that reads `tokenizer()`."""
    torch.manual_seed(0)
    words, heads = {"vocab_size": len(tokenizer())}, {"num_attention_heads": 2, "num_key_value_heads": 1}
    sizes = {"hidden_size": 16, "num_hidden_layers": layers, "intermediate_size": 32}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=layers, n_head=2, bos_token_id=0, eos_token_id=1, **words))
    if kind == "t5":
        return T5Model(T5Config(d_model=16, d_ff=32, d_kv=8, num_layers=layers, num_heads=2, **words))
    if kind == "llama4":  # its base_model is itself
        config = Llama4TextConfig(intermediate_size_mlp=32, head_dim=8, num_local_experts=2, **sizes, **heads, **words)
        return Llama4ForCausalLM(config)
    return llama(layers, **words)


def most_states_at_once(layers):
    """Counts, while a model reads, how many of its layers' states are held at the same time: a list of one number, the most so far."""
    alive, most = [], [0]

    def count(layer, inputs, output):
        alive.append(weakref.ref(output[0] if isinstance(output, tuple) else output))
        most[0] = max(most[0], sum(state() is not None for state in alive))

    for layer in layers:
        layer.register_forward_hook(count)
    return most


class TestMemory:
    """What a base takes to read many texts: no logits, the states of one layer, so many tokens at once."""

    @pytest.mark.parametrize("adapted", [False, True])
    @pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "llama4"])
    def test_neither_the_head_nor_the_states_of_all_layers(self, kind, adapted):
        model = language_model(kind)
        layers = {"gpt2": lambda: model.transformer.h, "t5": lambda: model.encoder.block}.get(kind, lambda: model.model.layers)()
        encoder = HiddenStateEncoder(model, tokenizer(), "tiny")
        expected = encoder.encode(TEXTS)
        if adapted:
            target = {"gpt2": "c_attn", "t5": "q"}.get(kind, "q_proj")
            model = get_peft_model(model, LoraConfig(r=2, target_modules=[target], init_lora_weights=False, fan_in_fan_out=kind == "gpt2"))
            encoder = HiddenStateEncoder(model, tokenizer(), "tiny")
        head = model.get_output_embeddings()
        if head is not None:
            head.register_forward_hook(lambda *arguments: pytest.fail("the head was run"))
        most = most_states_at_once(layers)
        torch.testing.assert_close(encoder.encode(TEXTS), expected, rtol=0, atol=0)
        assert most[0] <= 2, "a layer's input and its output"

    def test_statistics_are_of_all_layers(self):
        model = language_model("llama")
        most = most_states_at_once(model.model.layers)
        assert StatisticsEncoder(model, tokenizer(), "tiny").encode(TEXTS).shape == (3, 2 * 7 * 16)
        assert most[0] == 6

    def test_so_many_tokens_at_once(self):
        model, sizes = language_model("llama", layers=1), []
        model.model.layers[0].register_forward_hook(lambda layer, inputs, output: sizes.append(tuple(inputs[0].shape[:2])))
        encoder = HiddenStateEncoder(model, tokenizer(), "tiny")
        rows = encoder.encode(["x" * 40] * 70 + ["x" * 1024] * 20 + ["x" * 3000])
        # Six short ones are padded to the ten beside them; of the last text the model's 2,048 tokens are read.
        assert sizes == [(64, 40), (16, 1024), (10, 1024), (1, 2048)] and MAX_TOKENS == 16 * 1024
        torch.testing.assert_close(rows[:1].expand(70, -1), rows[:70], rtol=1e-4, atol=1e-5)

    def test_so_many_tokens_of_pictures_at_once(self, tmp_path):
        encoder, counts = florence_encoder(tmp_path), []
        encoder.model.get_encoder().register_forward_hook(lambda module, inputs, output: counts.append(len(output[0])))
        assert encoder.picture_tokens == 17
        encoder.picture_tokens = MAX_TOKENS // 2
        encoder.encode(pictures())
        assert counts == [2, 1]


class TestHiddenStateOfPictures:
    """Figure 2: the last state of Florence-2's decoder."""

    def test_is_the_state_at_the_end_of_the_answer(self, tmp_path):
        encoder = florence_encoder(tmp_path)
        assert encoder.accepts == ("images",) and encoder.dim == 16 and encoder.config["prompt"] == "<OD>"
        rows = encoder.encode(pictures())
        assert (
            rows.shape == (3, 16) and torch.cdist(rows, rows)[0, 1] > 0.1 and not torch.allclose(rows.norm(dim=1), torch.ones(3), atol=1e-2)
        )
        lengths = set()
        for row, picture in zip(rows, pictures(), strict=True):
            inputs = encoder.processor(text="<OD>", images=picture, return_tensors="pt")
            answer = encoder.model.generate(**inputs, do_sample=False, max_new_tokens=1023)
            lengths.add(answer.shape[1])
            with torch.no_grad():
                output = encoder.model(**inputs, decoder_input_ids=answer[:, :-1], output_hidden_states=True)
            torch.testing.assert_close(row, output.decoder_hidden_states[-1][0, -1], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(encoder.encode(pictures(), batch_size=1), rows, rtol=1e-3, atol=1e-4)
        assert len(lengths) > 1, "the answers are to end at different steps"

    def test_travels_with_its_prompt(self, tmp_path):
        encoder = florence_encoder(tmp_path / "base", prompt="<CAPTION>")
        encoder.save_pretrained(tmp_path / "copy")
        loaded = load_task_encoder(encoder.config, tmp_path / "copy")
        assert loaded.config["prompt"] == "<CAPTION>"
        torch.testing.assert_close(loaded.encode(pictures(1)), encoder.encode(pictures(1)))
        assert not torch.allclose(loaded.encode(pictures(1)), florence_encoder(tmp_path / "base").encode(pictures(1)), atol=1e-4)

    def test_reads_the_unadapted_base(self, tmp_path):
        plain = florence_encoder(tmp_path)
        expected = plain.encode(pictures(1))
        model = get_peft_model(plain.model, LoraConfig(r=2, target_modules=FLORENCE_TARGETS, task_type=None))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        torch.testing.assert_close(HiddenStateEncoder(model, plain.processor, "tiny").encode(pictures(1)), expected)

    def test_is_a_generators_encoder(self, tmp_path):
        encoder = florence_encoder(tmp_path)
        model = generator(condition_dim=encoder.dim, encoder=encoder.config)
        torch.testing.assert_close(model.task_vector(images=pictures()), encoder.encode(pictures()).mean(0))
        with pytest.raises(ValueError, match="hidden_state encoder reads, images=, or task_vector= alone; found text="):
            model.task_vector("detect sofas")
        with pytest.raises(ValueError, match="Expected a list of PIL images for the hidden_state encoder, found 'detect sofas'"):
            encoder.encode(["detect sofas"])


def test_sentence_is_the_mean_over_the_tokens(tmp_path):
    encoder = sentence(tmp_path)
    ids = encoder.tokenizer(LINES[1], return_tensors="pt")
    with torch.no_grad():
        state = encoder.model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).last_hidden_state[0].mean(0)
    torch.testing.assert_close(encoder.encode([LINES[1]])[0], F.normalize(state, dim=0), rtol=1e-4, atol=1e-5)


def test_an_unknown_kind():
    with pytest.raises(ValueError, match="Unknown task encoder 'bert': choose one of clip, hidden_state, joined, sentence, statistics"):
        load_task_encoder({"kind": "bert", "checkpoint": "x"})
