"""AdapterLayout: derived, ordered, bit-exact, strict."""

import json
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from tiny import FLORENCE_TARGETS, filled, florence, florence_lora, llama, llama_lora
from transformers import Florence2Config, Florence2ForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from peft_icm import AdapterLayout


@pytest.mark.parametrize("build", [llama_lora, florence_lora])
class TestBothBases:
    def test_flatten_and_unflatten_are_inverse(self, build):
        layout = AdapterLayout.from_peft_model(build())
        state_dict = filled(layout)
        vector = layout.flatten(state_dict)
        assert vector.shape == (layout.numel,)
        back = layout.unflatten(vector)
        assert list(back) == list(layout.keys)
        assert all(torch.equal(back[key], state_dict[key]) for key in layout.keys)

    def test_saved_folder_model_and_state_dict_give_one_layout(self, build, tmp_path):
        model = build()
        layout = AdapterLayout.from_peft_model(model)
        model.save_pretrained(tmp_path, save_embedding_layers=False)
        saved = AdapterLayout.from_pretrained(tmp_path)
        assert (saved.keys, saved.shapes, saved.dtype, saved.fingerprint) == (
            layout.keys, layout.shapes, layout.dtype, layout.fingerprint,
        )  # fmt: skip
        state_dict = get_peft_model_state_dict(model, save_embedding_layers=False)
        assert AdapterLayout.from_state_dict(state_dict, model.peft_config["default"]).fingerprint == layout.fingerprint

    def test_json_round_trip(self, build):
        layout = AdapterLayout.from_peft_model(build())
        assert AdapterLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout

    def test_its_config_injects_the_same_layout_again(self, build):
        model = build()
        layout = AdapterLayout.from_peft_model(model)
        again = get_peft_model(model.unload(), layout.lora_config())
        assert AdapterLayout.from_peft_model(again).fingerprint == layout.fingerprint

    def test_accepts_its_own_base_bare_and_wrapped(self, build):
        model = build()
        layout = AdapterLayout.from_peft_model(model)
        layout.check_base(model.get_base_model())
        layout.check_base(model.unload())


def florence_lora_in(r, targets, dtype):
    config = LoraConfig(r=r, target_modules=FLORENCE_TARGETS[-targets:], task_type=None)
    return get_peft_model(florence().to(dtype), config, autocast_adapter_dtype=False)


@pytest.mark.parametrize("build", [llama_lora, florence_lora_in])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    r=st.integers(1, 5),
    extent=st.integers(1, len(FLORENCE_TARGETS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 9),
)
def test_every_bit_survives_in_every_dtype(build, r, extent, dtype, seed):
    layout = AdapterLayout.from_peft_model(build(r, extent, dtype))
    assert layout.torch_dtype == dtype
    torch.manual_seed(seed)
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    bits = torch.randint(-(2**15), 2**15, (layout.numel,), dtype=integer)  # NaN payloads and infinities among them
    back = layout.flatten(layout.unflatten(bits.view(dtype)))
    assert torch.equal(back.view(integer), bits)


def test_layers_stand_in_numeric_order(tmp_path):
    model = llama_lora(layers=11)
    model.save_pretrained(tmp_path)
    keys = AdapterLayout.from_pretrained(tmp_path).keys
    layers = [int(key.split("layers.")[1].split(".")[0]) for key in keys]
    assert layers == sorted(layers)


def test_llama_3_8b_has_851968_parameters_at_rank_2():
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    assert AdapterLayout.from_peft_model(model).numel == 851_968


def florence_2_base(vocab_size):
    text = {
        "d_model": 768, "encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 12, "decoder_attention_heads": 12,
        "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072, "vocab_size": vocab_size,
    }  # fmt: skip
    config = Florence2Config(vision_config={"projection_dim": 768}, text_config=text)
    with torch.device("meta"):
        return Florence2ForConditionalGeneration(config)


def paper_lora(base):
    return get_peft_model(base, LoraConfig(r=1, target_modules=FLORENCE_TARGETS, task_type=None))


@pytest.mark.parametrize(("vocab_size", "numel"), [(51289, 241_241), (51328, 241_280)])
def test_florence_2_base_has_the_papers_241241_parameters_at_rank_1(vocab_size, numel):
    assert AdapterLayout.from_peft_model(paper_lora(florence_2_base(vocab_size))).numel == numel


def test_florence_2_of_another_vocabulary_is_refused_by_the_head_s_shape():
    layout = AdapterLayout.from_peft_model(paper_lora(florence_2_base(51289)))
    key = r"base_model\.model\.lm_head\.lora_B\.weight"
    with pytest.raises(ValueError, match=rf"{key}: expected shape \(51289, 1\), found a base model that needs \(51328, 1\)"):
        layout.check_base(florence_2_base(51328))
    layout = AdapterLayout.from_peft_model(florence_lora())
    with pytest.raises(ValueError, match=rf"{key}: expected shape \(128, 1\), found a base model that needs \(96, 1\)"):
        layout.check_base(florence(vocab_size=96))


@pytest.mark.parametrize("build", [llama_lora, florence_lora])
class TestTensorsThatDoNotFit:
    def test_missing_key(self, build):
        layout = AdapterLayout.from_peft_model(build())
        state_dict = filled(layout)
        del state_dict[layout.keys[3]]
        with pytest.raises(ValueError, match=re.escape(f"lacks {layout.keys[3]}: expected shape {layout.shapes[3]}")):
            layout.flatten(state_dict)

    def test_unknown_key(self, build):
        layout = AdapterLayout.from_peft_model(build())
        with pytest.raises(ValueError, match="stranger: expected no such key"):
            layout.flatten({**filled(layout), "stranger": torch.zeros(3)})

    def test_other_shape(self, build):
        layout = AdapterLayout.from_peft_model(build())
        state_dict = filled(layout)
        state_dict[layout.keys[0]] = torch.zeros(3, 15)
        with pytest.raises(ValueError, match=re.escape(f"{layout.keys[0]}: expected shape {layout.shapes[0]}, found (3, 15)")):
            layout.flatten(state_dict)

    def test_other_dtype(self, build):
        layout = AdapterLayout.from_peft_model(build())
        state_dict = {key: value.half() for key, value in filled(layout).items()}
        with pytest.raises(ValueError, match="expected dtype float32"):
            layout.flatten(state_dict)

    def test_vector_of_another_length(self, build):
        with pytest.raises(ValueError, match="Expected a vector of shape"):
            AdapterLayout.from_peft_model(build()).unflatten(torch.zeros(3))


class TestRefusals:
    layout = AdapterLayout.from_peft_model(llama_lora())

    @pytest.mark.parametrize(
        ("base", "message"),
        [
            (lambda: llama(layers=1), "found no module model.layers.1"),
            (lambda: llama(layers=3), "layers.2.self_attn.q_proj.* expected no such module"),
            (lambda: llama(hidden_size=32), r"expected shape \(2, 16\), found a base model that needs \(2, 32\)"),
            (florence, "are for a LlamaForCausalLM, found a Florence2"),
        ],
    )
    def test_another_base(self, base, message):
        with pytest.raises(ValueError, match=message):
            self.layout.check_base(base())

    def test_rank_zero(self):
        config = LoraConfig(r=2, target_modules=["q_proj"])
        config.r = 0
        with pytest.raises(ValueError, match="r=0"):
            AdapterLayout.from_state_dict(filled(self.layout), config)

    @pytest.mark.parametrize("build", [llama_lora, florence_lora])
    def test_truncated_file(self, tmp_path, build):
        build().save_pretrained(tmp_path)
        file = tmp_path / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:100])
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            AdapterLayout.from_pretrained(tmp_path)

    def test_not_a_peft_model_or_adapter(self):
        with pytest.raises(ValueError, match=r"Expected a peft\.PeftModel"):
            AdapterLayout.from_peft_model(llama())
        with pytest.raises(ValueError, match="No adapter named 'other'"):
            AdapterLayout.from_peft_model(llama_lora(), "other")

    def test_dora_is_no_plain_lora(self):
        model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
        with pytest.raises(ValueError, match="is not a LoRA matrix"):
            AdapterLayout.from_peft_model(model)


def test_a_peft_model_that_was_loaded_names_its_base(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    layout = AdapterLayout.from_peft_model(model)
    assert layout.base_model_name_or_path == str(tmp_path / "base")
    assert layout.base_model_class == "LlamaForCausalLM"
    model.save_pretrained(tmp_path / "adapter")
    assert isinstance(PeftModel.from_pretrained(base.__class__.from_pretrained(tmp_path / "base"), tmp_path / "adapter"), PeftModel)
