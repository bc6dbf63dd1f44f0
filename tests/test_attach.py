"""Attaching to whatever base there is: as peft does it, whole or not at all."""

import json
import re

import pytest
import torch
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from tiny import CONDITION_DIM, filled, generator, llama, llama_layout
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from peft_icm import AdapterCollection, AdapterLayout
from peft_icm.adapters import attach
from peft_icm.adapters.attach import unchanged_on_failure
from peft_icm.adapters.fidelity import compare_adapters
from peft_icm.adapters.saving import push_adapter

TOKENS = torch.arange(5, 25)[None]


@torch.no_grad()
def out(model, given=TOKENS):
    found = model(given)
    return getattr(found, "logits", found)


def tensors(model, name):
    return {key: value.clone() for key, value in get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False).items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def seeded(build, *args, **kwargs):
    torch.manual_seed(0)
    return build(*args, **kwargs).eval()


def gpt2():
    return seeded(GPT2LMHeadModel, GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=64))


def experts():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen3MoeConfig(**sizes, head_dim=8, vocab_size=64, num_experts=3, num_experts_per_tok=1, moe_intermediate_size=8)
    return seeded(Qwen3MoeForCausalLM, config)


def saved_lora(base, folder, changes=None, **config):
    """A LoRA of random values that peft alone saved, with changes to its adapter_config.json."""
    model = get_peft_model(base, LoraConfig(r=4, **config))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder, save_embedding_layers=False)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **(changes or {})}))
    return folder


# ---------------------------------------------------------------------- as peft does it
class ConvConfig(PreTrainedConfig):
    model_type = "one_convolution"


class OneConvolution(PreTrainedModel):
    """A base of one convolution over 8 channels, in one, two or three dimensions."""

    config_class = ConvConfig

    def __init__(self, dimensions, groups):
        super().__init__(ConvConfig())
        self.conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1](8, 8, 3, padding=1, groups=groups)
        self.post_init()

    def forward(self, given):
        return self.conv(given)


KINDS = {
    **{
        f"Conv{dimensions}d, {groups} groups": (
            lambda dimensions=dimensions, groups=groups: seeded(OneConvolution, dimensions, groups),
            {"target_modules": ["conv"]},
            {},
            torch.randn(2, 8, *[5] * dimensions, generator=torch.Generator().manual_seed(2)),
        )
        for dimensions, groups in [(1, 1), (1, 4), (2, 1), (2, 2), (3, 1), (3, 2)]
    },
    "transformers' Conv1D": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}, {}, TOKENS),
    "embedding": (lambda: seeded(llama), {"target_modules": ["embed_tokens", "q_proj"]}, {}, TOKENS),
    "attention of a mixture of experts": (experts, {"target_modules": ["q_proj", "v_proj"]}, {}, TOKENS),
    "a regex with an end": (lambda: seeded(llama), {"target_modules": r".*\.(q|v)_proj"}, {}, TOKENS),
    "a regex without one": (lambda: seeded(llama), {"target_modules": r".*(q|v)_proj.*"}, {}, TOKENS),
    "a regex of one layer": (lambda: seeded(llama), {"target_modules": r"model\.layers\.1\..*_proj"}, {}, TOKENS),
    "all-linear": (lambda: seeded(llama), {"target_modules": "all-linear"}, {"target_modules": "all-linear"}, TOKENS),
    # peft corrects both of these when it injects, in its own copy of the configuration
    "fan_in_fan_out of a Linear": (lambda: seeded(llama), {"target_modules": ["q_proj"]}, {"fan_in_fan_out": True}, TOKENS),
    "no fan_in_fan_out of a Conv1D": (gpt2, {"target_modules": ["c_attn"]}, {"fan_in_fan_out": False}, TOKENS),
}


@pytest.mark.parametrize("gauge", [False, True], ids=["as found", "aligned"])
@pytest.mark.parametrize("kind", KINDS)
def test_added_twice_and_swapped_it_computes_what_peft_s_own_load_does(kind, gauge, tmp_path):
    make, config, changes, given = KINDS[kind]
    folder = saved_lora(make(), tmp_path / "lora", changes, **config)
    want = out(PeftModel.from_pretrained(make(), folder), given)
    assert not torch.allclose(want, out(make(), given), atol=1e-3)
    collection = AdapterCollection.from_adapters([folder], ["x"], gauge=gauge)
    values = collection.layout.unflatten(collection.final("lora"))
    model = attach(make(), collection.layout, values, adapter_name="one")
    torch.testing.assert_close(out(model, given), want, rtol=1e-5, atol=1e-5)
    attach(model, collection.layout, {key: 0 * value for key, value in values.items()}, adapter_name="two")
    torch.testing.assert_close(out(model, given), out(make(), given))
    attach(model, collection.layout, values, adapter_name="two")
    torch.testing.assert_close(out(model, given), want, rtol=1e-5, atol=1e-5)
    assert equal(tensors(model, "one"), tensors(model, "two"))


def test_an_fp32_adapter_keeps_its_bits_on_a_bf16_base():
    layout = llama_layout()
    values = filled(layout)
    model = attach(llama().to(torch.bfloat16), layout, values)
    assert equal(tensors(model, "default"), values)
    attach(model, layout, filled(layout, 1))
    assert equal(tensors(model, "default"), filled(layout, 1))


def test_a_swap_leaves_adapters_alone_whose_names_contain_its_own():
    layout = llama_layout()
    model = llama()
    for seed, name in enumerate(("cat", "cats", "ca")):
        model = attach(model, layout, filled(layout, seed), adapter_name=name)
    for name in ("cat", "ca"):
        attach(model, layout, filled(layout, 5), adapter_name=name)
    assert equal(tensors(model, "cats"), filled(layout, 1))
    assert equal(tensors(model, "cat"), filled(layout, 5)) and equal(tensors(model, "ca"), filled(layout, 5))


# ---------------------------------------------------------------------- bases without their weights
@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_on_an_offloaded_base_it_computes_the_same(where, tmp_path):
    layout = llama_layout()
    seeded(llama).save_pretrained(tmp_path / "base")
    want = out(attach(LlamaForCausalLM.from_pretrained(tmp_path / "base"), layout, filled(layout)))
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    if where == "disk":
        places = {name: "cpu" for name in ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.1")}
        options = {"device_map": {**places, "model.layers.0": "disk"}, "offload_folder": tmp_path / "offloaded"}
        base = LlamaForCausalLM.from_pretrained(tmp_path / "base", **options)
    else:
        from accelerate import cpu_offload

        cpu_offload(base, torch.device("cpu"))
    assert base.model.layers[0].self_attn.q_proj.weight.is_meta
    model = attach(base, layout, filled(layout))
    torch.testing.assert_close(out(model), want)
    attach(model, layout, filled(layout, 1))
    attach(model, layout, filled(layout), adapter_name="second")
    torch.testing.assert_close(out(model), want)


def test_a_base_without_weights_is_refused():
    layout = llama_layout()
    base = llama()
    base.model.layers[1].self_attn.v_proj.to("meta")
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_proj\.lora_A\.weight of 'default' is on the meta device") as caught:
        attach(base, layout, filled(layout))
    assert "\n" not in str(caught.value)
    assert [name for name, _ in base.named_modules()] == names


def test_an_adapter_that_peft_left_without_values_is_refused():
    layout = llama_layout()
    model = get_peft_model(llama(), layout.lora_config())
    model.add_adapter("empty", layout.lora_config(), low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match="of 'empty' is on the meta device"):
        attach(model, layout, filled(layout), adapter_name="empty")


# ---------------------------------------------------------------------- whole or not at all
class OwnLinear(nn.Module):
    """A linear layer of somebody's own: it looks like one, and peft refuses it when it gets there."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.weight = linear.in_features, linear.out_features, linear.weight

    def forward(self, given):
        return nn.functional.linear(given, self.weight)


def with_own_linear(model):
    attention = model.get_submodule("model.layers.1.self_attn")
    attention.v_proj = OwnLinear(attention.v_proj)


def without_weights(model):
    model.get_submodule("model.layers.1.self_attn.v_proj").to("meta")


def one_adapter(model, layout):
    return attach(model, layout, filled(layout), adapter_name="first", is_trainable=True)


def two_active(model, layout):
    model = attach(one_adapter(model, layout), layout, filled(layout, 1), adapter_name="other")
    model.base_model.set_adapter(["first", "other"])
    return model


def second_active(model, layout):
    model = attach(one_adapter(model, layout), layout, filled(layout, 1), adapter_name="other")
    return attach(model, layout, filled(layout, 2), adapter_name="third")


def merged(model, layout):
    model = one_adapter(model, layout)
    model.merge_adapter()
    return model


def all_of(model):
    """What an injection might have changed."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    fields = ("r", "lora_alpha", "scaling", "use_rslora", "use_dora", "lora_bias")
    return {
        "modules": [(name, type(module), module.training) for name, module in model.named_modules()],
        "parameters": [(name, id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()],
        "layers": {name: [dict(getattr(layer, field)) for field in fields] for name, layer in layers.items()},
        "active": {name: (layer.active_adapters, layer.merged_adapters[:], layer.disable_adapters) for name, layer in layers.items()},
        "adapters": {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()},
        "provenance": dict(vars(model).get("peft_icm_provenance", {})),
        "chosen": getattr(model, "active_adapters", None) if isinstance(model, PeftModel) else None,
    }


@pytest.mark.parametrize(
    ("spoil", "message", "state"),
    [
        *((with_own_linear, "OwnLinear.* is not supported", state) for state in (None, one_adapter, two_active, second_active, merged)),
        *((without_weights, "is on the meta device", state) for state in (None, one_adapter, two_active, second_active)),
    ],
)
def test_a_failure_half_way_leaves_the_model_as_it_was(spoil, message, state):
    targets = ["embed_tokens", "q_proj", "k_proj"]
    small, large = (
        AdapterLayout.from_peft_model(get_peft_model(llama(), LoraConfig(r=2, target_modules=found, task_type="CAUSAL_LM")))
        for found in (targets, [*targets, "v_proj"])
    )
    base = seeded(llama)
    spoil(base)
    model = state(base, small) if state else base
    before, expected = all_of(model), out(model) if spoil is with_own_linear else None
    with pytest.raises(ValueError, match=message):
        attach(model, large, filled(large, 7), adapter_name="new")
    assert all_of(model) == before
    if expected is not None:
        assert torch.equal(out(model), expected)
    again = attach(model, small, filled(small, 8), adapter_name="new")
    assert equal(tensors(again, "new"), filled(small, 8)) and again.active_adapters == ["new"]


@pytest.mark.parametrize("state", [one_adapter, two_active, second_active, merged])
def test_an_interrupt_leaves_the_model_as_it_was(state):
    layout = llama_layout()
    model = state(seeded(llama), layout)
    before, expected = all_of(model), out(model)
    with pytest.raises(KeyboardInterrupt), unchanged_on_failure(model):
        attach(model, layout, filled(layout, 7), adapter_name="new", is_trainable=True)
        raise KeyboardInterrupt
    found = all_of(model)
    torch.testing.assert_close(out(model), expected, rtol=1e-5, atol=1e-5 if state is merged else 0)
    if state is merged:  # peft took it out of the base's weights before the interrupt: there it does the same
        assert not any(layer[1] for layer in found["active"].values())
        del before["active"], found["active"]
    assert found == before


@pytest.mark.parametrize("names", [["one", "two", "train"], ["one", "two", "other"]], ids=["no name", "a name that is taken"])
def test_of_many_adapters_all_are_attached_or_none(names):
    icm = generator()
    other = AdapterLayout.from_peft_model(get_peft_model(llama(), LoraConfig(r=3, target_modules=["o_proj"])))
    model = attach(seeded(llama), other, filled(other), adapter_name="other")
    before, expected = all_of(model), out(model)
    icm.config.encoder = None
    icm.task_vector = lambda text: torch.zeros(CONDITION_DIM)  # this generator has no encoder, and the names are what is tested
    with pytest.raises(ValueError, match="'train'|The adapter 'other' is there"):
        icm.generate_adapters(["a", "b", "c"], model, adapter_names=names)
    assert all_of(model) == before
    assert torch.equal(out(model), expected)


# ---------------------------------------------------------------------- what is no base, and no adapter
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.compile(llama()),
        lambda: get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]), mixed=True),
        lambda: nn.Linear(2, 2),
        lambda: LlamaForCausalLM,
        lambda: {"model": 1},
    ],
    ids=["compiled", "mixed", "linear", "class", "dict"],
)
def test_what_is_no_base_is_named_and_not_printed(make):
    base, layout = make(), llama_layout()
    for call in (
        lambda: attach(base, layout, filled(layout)),
        lambda: generator().generate_adapter(task_vector=torch.zeros(CONDITION_DIM), base_model=base),
    ):
        with pytest.raises(ValueError, match=rf"base.model is a {re.escape(type(base).__name__)}, must be") as caught:
            call()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
        {"target_modules": ["q_proj", "gate"]},
        {"target_modules": "all-linear"},
    ],
    ids=["said", "experts by name", "router by name", "all-linear"],
)
def test_loras_on_experts_are_refused_before_anything_is_made_of_them(config, tmp_path):
    model = get_peft_model(experts(), LoraConfig(r=4, task_type="CAUSAL_LM", **config))
    model.save_pretrained(tmp_path)
    advice = r"^.*target_parameters=\[.*of a mixture of experts .* not supported\. Train it again .*target_modules=\['q_proj', 'v_proj'\]"
    for read in (
        lambda: AdapterLayout.from_peft_model(model),
        lambda: AdapterLayout.from_pretrained(tmp_path),
        lambda: AdapterCollection.from_adapters([tmp_path], ["x"]),
        lambda: push_adapter(tmp_path, "me/lora"),
    ):
        with pytest.raises(ValueError, match=advice) as caught:
            read()
        assert "\n" not in str(caught.value)


READERS = {
    "layout": AdapterLayout.from_pretrained,
    "collection": lambda folder: AdapterCollection.from_adapters([folder], ["x"]),
    "compare": lambda folder: compare_adapters(folder, folder),
    "push": lambda folder: push_adapter(folder, "me/lora"),
}


@pytest.fixture
def named_adapters(tmp_path):
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="cats")
    model.add_adapter("dogs", LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("reader", READERS)
def test_a_folder_of_named_adapters_says_where_they_are(reader, named_adapters):
    with pytest.raises(ValueError, match="its adapters lie in cats/, dogs/: name that folder"):
        READERS[reader](named_adapters)


@pytest.mark.parametrize("reader", ["layout", "collection", "compare"])
def test_so_does_a_repo_of_them(reader, named_adapters, hub, token):
    api = HfApi(token=token)
    api.create_repo("me/many")
    api.upload_folder(repo_id="me/many", folder_path=named_adapters)
    with pytest.raises(ValueError, match="its adapters lie in cats/, dogs/: name that folder"):
        READERS[reader]("me/many")
