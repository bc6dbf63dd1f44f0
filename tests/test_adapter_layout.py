"""AdapterLayout: derived, ordered, bit-exact, strict."""

import dataclasses
import json
import re
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from tiny import FLORENCE_TARGETS, filled, florence, florence_lora, llama, llama_lora
from torch import nn
from transformers import Florence2Config, Florence2ForConditionalGeneration, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from peft_icm import AdapterLayout
from peft_icm.adapters import functional
from peft_icm.adapters.layout import same_function


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


class TestWhatALayoutIsMadeOf:
    """Each change of one field is refused in one line, whether it comes from a config.json or from an adapter_config.json."""

    values = json.loads(json.dumps(AdapterLayout.from_peft_model(llama_lora()).to_dict()))

    @pytest.mark.parametrize(
        "change",
        [
            {"keys": ["/etc/passwd"] * 8},
            {"keys": values["keys"][:3]},
            {"keys": values["keys"][:1] + values["keys"][:7]},
            {"keys": values["keys"][:7], "shapes": values["shapes"][:7]},
            {"keys": [], "shapes": []},
            {"keys": "abc"},
            {"keys": [key.replace("base_model.model.", "") for key in values["keys"]]},
            {"keys": [1, *values["keys"][1:]]},
            {"shapes": [["2", 16]] * 8},
            {"shapes": [[-2, -16]] * 8},
            {"shapes": [[True, 16]] * 8},
            {"shapes": [[2.0, 16]] * 8},
            {"shapes": [[2, 16]] * 8},
            {"shapes": [[2, 2**50], *values["shapes"][1:]]},
            {"shapes": None},
            {"dtype": "float64"},
            {"dtype": ["float32"]},
            {"unknown": 1},
            {"base_model_class": 3},
            {"revision": ["main"]},
            {"base_model_name_or_path": {"a": 1}},
            {"peft_config": None},
        ],
    )
    def test_fields(self, change):
        with pytest.raises(ValueError) as caught:
            AdapterLayout.from_dict({**self.values, **change})
        assert "\n" not in str(caught.value) and "zip" not in str(caught.value)

    @pytest.mark.parametrize("name", ["keys", "shapes", "dtype", "peft_config"])
    def test_missing(self, name):
        with pytest.raises(ValueError, match=f"'{name}' is missing"):
            AdapterLayout.from_dict({key: value for key, value in self.values.items() if key != name})

    @pytest.mark.parametrize(
        "change",
        [
            {"r": 4}, {"r": "2"}, {"r": True}, {"r": 2.5}, {"r": None}, {"r": -2}, {"rank_pattern": {"q_proj": 4}}, {"rank_pattern": [2]},
            {"rank_pattern": {"(": 2}}, {"lora_alpha": float("nan")}, {"lora_alpha": float("inf")}, {"lora_alpha": 1e308},
            {"lora_alpha": 10**400}, {"lora_alpha": [8]}, {"lora_alpha": None}, {"alpha_pattern": {"q_proj": float("nan")}},
            {"alpha_pattern": {"q_proj": "8"}}, {"use_rslora": "yes"}, {"fan_in_fan_out": 1}, {"lora_dropout": 2}, {"task_type": "NO_SUCH"},
            {"task_type": []}, {"peft_type": "LOHA"}, {"peft_type": None}, {"target_modules": 3}, {"target_modules": ["q_proj", 3]},
            {"exclude_modules": 3}, {"layers_to_transform": "0"}, {"init_lora_weights": "pissa_niter_4"}, {"init_lora_weights": "olora"},
            {"init_lora_weights": "loftq"}, {"init_lora_weights": "corda"}, {"init_lora_weights": "lora_ga"}, {"bias": "all"},
            {"alora_invocation_tokens": [5]}, {"use_dora": True}, {"lora_bias": True}, {"layer_replication": [[0, 2]]},
            {"trainable_token_indices": [1]}, {"target_parameters": ["experts"]}, {"modules_to_save": ["lm_head"]}, {"use_qalora": True},
            {"megatron_config": {"a": 1}}, {"ensure_weight_tying": True}, {"of_a_later_peft": True},
        ],
    )  # fmt: skip
    def test_configurations(self, change, tmp_path):
        with pytest.raises(ValueError):
            AdapterLayout.from_dict({**self.values, "peft_config": {**self.values["peft_config"], **change}})
        llama_lora().save_pretrained(tmp_path)
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
        with pytest.raises(ValueError, match=re.escape(str(tmp_path))) as caught:
            AdapterLayout.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "change",
        [
            {"lora_alpha": 8.0}, {"r": 2.0}, {"use_rslora": None}, {"use_dora": None}, {"fan_in_fan_out": True}, {"bias": None},
            {"rank_pattern": None}, {"alpha_pattern": None}, {"alpha_pattern": {"q_proj": 8}}, {"rank_pattern": {"q_proj": 2}},
            {"target_modules": ["v_proj", "q_proj"]}, {"target_modules": "all-linear"}, {"lora_dropout": 0.1}, {"of_a_later_peft": None},
            {"init_lora_weights": "gaussian"}, {"init_lora_weights": "mica"},
            {"r": 16, "lora_alpha": 64, "rank_pattern": {"self_attn": 3, ".*": 2}, "alpha_pattern": {".*": 8}},
        ],
    )  # fmt: skip
    def test_the_same_function_spelt_otherwise(self, change):
        layout = AdapterLayout.from_dict(self.values)
        other = AdapterLayout.from_dict({**self.values, "peft_config": {**self.values["peft_config"], **change}})
        assert other.fingerprint == layout.fingerprint
        assert AdapterLayout.from_dict(json.loads(json.dumps(other.to_dict()))) == other
        assert same_function(other.lora_config(), layout)

    @pytest.mark.parametrize("change", [{"lora_alpha": 9}, {"use_rslora": True}, {"alpha_pattern": {"layers.1.*q_proj": 3}}])
    def test_another_function(self, change):
        layout = AdapterLayout.from_dict(self.values)
        other = AdapterLayout.from_dict({**self.values, "peft_config": {**self.values["peft_config"], **change}})
        assert other.fingerprint != layout.fingerprint and next(iter(change)) in layout.difference(other)
        assert not same_function(other.lora_config(), layout)

    def test_every_field_of_peft_has_its_class(self):
        classes = (
            functional.SCALE,
            functional.REFUSED,
            functional.INITIALISATION,
            functional.TRAINING,
            functional.NAMING,
            functional.ABOUT,
        )
        known = [name for each in classes for name in each]
        assert len(known) == len(set(known))
        assert {field.name for field in dataclasses.fields(LoraConfig)} <= set(known)  # an older peft has fewer


EVIL = "(([a-z0-9._]+)+)+[A-Z]"


@pytest.mark.parametrize(
    "change", [{"target_modules": EVIL}, {"exclude_modules": EVIL}, {"layers_to_transform": [0, 1], "layers_pattern": EVIL}]
)
def test_a_regex_of_a_stranger_is_never_run(change):
    values = AdapterLayout.from_peft_model(llama_lora()).to_dict()
    layout = AdapterLayout.from_dict({**values, "peft_config": {**values["peft_config"], **change}})
    start = time.monotonic()
    layout.check_base(llama())
    assert AdapterLayout.from_peft_model(get_peft_model(llama(), layout.lora_config())).fingerprint == layout.fingerprint
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_takes_too_long_is_refused(name, monkeypatch):
    monkeypatch.setattr(functional, "MATCHING_SECONDS", 0.2)
    values = AdapterLayout.from_peft_model(llama_lora()).to_dict()
    with pytest.raises(ValueError, match=rf"{name}: matching .* takes too long"):
        AdapterLayout.from_dict({**values, "peft_config": {**values["peft_config"], name: {r"(?:(.|..|...)*)*\1[A-Z]": 2}}})


def test_a_regex_leaves_what_ends_alike_alone():
    class Nested(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(4, 4)
            self.inner = torch.nn.ModuleDict({"head": torch.nn.Linear(4, 4)})

    layout = AdapterLayout.from_peft_model(get_peft_model(Nested(), LoraConfig(r=2, target_modules=r"^head$")))
    assert layout.modules == ["head"]
    layout.check_base(Nested())
    assert AdapterLayout.from_peft_model(get_peft_model(Nested(), layout.lora_config())).modules == ["head"]


@pytest.mark.parametrize(
    ("make", "r"),
    [
        (lambda: nn.Conv1d(8, 4, 3), 2), (lambda: nn.Conv2d(8, 4, (3, 5)), 2), (lambda: nn.Conv3d(8, 4, 3), 2),
        (lambda: nn.Conv2d(8, 4, 3, groups=2), 4), (lambda: nn.Conv1d(8, 8, 3, groups=4), 4), (lambda: Conv1D(6, 8), 2),
        (lambda: nn.Embedding(9, 5), 2),
    ],
)  # fmt: skip
def test_modules_as_peft_does_them(make, r):
    layout = AdapterLayout.from_peft_model(get_peft_model(nn.Sequential(make()), LoraConfig(r=r, target_modules=["0"])))
    layout.check_base(nn.Sequential(make()))


def test_where_the_weights_lie(tmp_path):
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="task1")
    model.save_pretrained(tmp_path / "named")
    with pytest.raises(ValueError, match="its adapters lie in task1/"):
        AdapterLayout.from_pretrained(tmp_path / "named")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "adapter_model.bin").touch()
    with pytest.raises(ValueError, match=r"convert its adapter_model\.bin"):
        AdapterLayout.from_pretrained(tmp_path / "bin")
    for text in ("[]", '{"r": 4,', "\x00", "[" * 100_000):
        (tmp_path / "named" / "task1" / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=r"adapter_config\.json"):
            AdapterLayout.from_pretrained(tmp_path / "named" / "task1")
