"""A LoRA of its own for each sample of a batch: equal to peft's, one sample at a time."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import florence_processor, florence_reader, llama
from transformers import GPT2Config, GPT2LMHeadModel

from peft_icm import AdapterLayout
from peft_icm.adapters import attach
from peft_icm.adapters.per_sample import PerSampleLora

NO_DROPOUT = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
IDS = torch.arange(18).view(3, 6) + 5


def gpt2(layers=2):
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=layers, n_head=2, **NO_DROPOUT))


def seen():
    """Three scenes, a prompt and answers."""
    processor = florence_processor()
    pixels = torch.rand(3, 3, 32, 32)
    ids = torch.tensor([[processor.image_token_id] * 17 + [0, 40, 41, 2]] * 3)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": IDS}


CONV1D = LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM")
WITH_TOWER = LoraConfig(r=2, use_rslora=True, target_modules=["q_proj", "qkv", "proj", "fc1", "fc2", "linear", "lm_head"])
BASES = {
    "llama": (llama, LoraConfig(r=2, lora_alpha=3, target_modules="all-linear", task_type="CAUSAL_LM"), lambda: {"input_ids": IDS}),
    "gpt2": (gpt2, CONV1D, lambda: {"input_ids": IDS}),
    "florence": (florence_reader, WITH_TOWER, seen),
}  # fmt: skip


@pytest.fixture(params=BASES)
def case(request):
    """Base, layout, three adapters and inputs."""
    torch.manual_seed(0)
    make, config, inputs = BASES[request.param]
    model = get_peft_model(make().eval(), config)
    layout = AdapterLayout.from_peft_model(model)
    return model.unload().eval(), layout, 0.3 * torch.randn(3, layout.numel), inputs()


def one(inputs, index):
    return {name: value[index : index + 1] for name, value in inputs.items()}


def test_each_sample_sees_its_own_adapter_as_peft_computes_it(case):
    base, layout, adapters, inputs = case
    with PerSampleLora(base, layout) as lora, torch.no_grad():
        plain = base(**inputs).logits
        lora.use(adapters)
        together = base(**inputs).logits
        lora.use(None)
        assert torch.equal(base(**inputs).logits, plain)
    assert torch.equal(base(**inputs).logits, plain), "the hooks are off"
    model = base
    for index, adapter in enumerate(adapters):
        model = attach(model, layout, layout.unflatten(adapter))
        with torch.no_grad():
            alone = model(**one(inputs, index)).logits
        assert (together[index : index + 1] - alone).abs().max() < 1e-5
        assert (alone - plain[index : index + 1]).abs().max() > 1e-3, "the adapter does something"


def test_one_adapter_serves_a_whole_batch(case):
    base, layout, adapters, inputs = case
    with PerSampleLora(base, layout) as lora, torch.no_grad():
        lora.use(adapters[:1])
        shared = base(**inputs).logits
        lora.use(adapters[:1].expand(3, -1))
        assert torch.allclose(base(**inputs).logits, shared, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_peft(case, checkpointing):
    base, layout, adapters, inputs = case
    base.requires_grad_(False)
    adapters.requires_grad_()
    with PerSampleLora(base, layout) as lora:
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.train("pixel_values" not in inputs)  # a Florence-2 drops paths at random
        lora.use(adapters)
        base(**inputs).logits.square().mean(dim=(1, 2)).sum().backward()
    base.gradient_checkpointing_disable()
    model = attach(base.eval(), layout, layout.unflatten(adapters[0].detach()), is_trainable=True).eval()
    model(**one(inputs, 0)).logits.square().mean().backward()
    named = dict(model.named_parameters())
    wanted = torch.cat([named[key.replace(".weight", ".default.weight")].grad.flatten() for key in layout.keys])
    assert wanted.abs().max() > 1e-4
    assert torch.allclose(adapters.grad[0], wanted, atol=1e-5 * float(wanted.abs().max()), rtol=1e-3)


def test_bf16(case):
    base, layout, adapters, inputs = case
    with PerSampleLora(base, layout) as lora, torch.no_grad():
        lora.use(adapters)
        exact = base(**inputs).logits
        with torch.autocast("cpu", torch.bfloat16):
            rough = base(**inputs).logits
    assert (rough.float() - exact).abs().mean() < 0.03 * exact.abs().mean().clamp(min=1)


def test_other_layers_are_named():
    model = get_peft_model(florence_reader(), LoraConfig(r=2, target_modules=["q_proj", "conv"]))
    layout = AdapterLayout.from_peft_model(model)
    with pytest.raises(ValueError, match=r"conv is a Conv2d: .*take it out of target_modules"):
        PerSampleLora(model.unload(), layout)


def test_vectors_of_another_length_are_refused(case):
    base, layout, *_ = case
    with PerSampleLora(base, layout) as lora, pytest.raises(ValueError, match=rf"shape \(B, {layout.numel}\), found \(3, 2\)"):
        lora.use(torch.zeros(3, 2))
