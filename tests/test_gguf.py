"""The GGUF that llama.cpp reads: the adapter's own numbers, rows of q and k in its order, every scale in one alpha.

examples/serving/in_llama_cpp.py has llama.cpp itself open such files.
"""

import math
import sys

import gguf
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from tiny import florence_lora, llama
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from peft_icm import AdapterLayout, save_adapter
from peft_icm.adapters.gguf import turn

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HEADS, HEAD = 4, 8


def lora(base=None, dtype=torch.float32, **config):
    base = base or llama(hidden_size=HEADS * HEAD, num_attention_heads=HEADS, num_key_value_heads=2, tie_word_embeddings=False)
    config = LoraConfig(**{"r": 4, "target_modules": LINEARS, "task_type": "CAUSAL_LM", **config})
    model = get_peft_model(base.to(dtype), config, autocast_adapter_dtype=False).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def read(folder):
    reader = gguf.GGUFReader(folder / "adapter_model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}


def updates(model):
    """dW of each module, as peft computes it."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default")
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def rotated(projected, heads, neighbours):
    """q or k `[L, heads * d]` after the rotary embedding: its pairs are the two halves of a head, or neighbours, as in llama.cpp."""
    length, d = len(projected), projected.shape[1] // heads
    angles = torch.arange(length)[:, None] * 10000 ** (-torch.arange(0, d, 2) / d)
    states = projected.view(length, heads, d).transpose(0, 1)
    if not neighbours:
        cos, sin = (torch.cat([part, part], 1)[None] for part in (angles.cos(), angles.sin()))
        return apply_rotary_pos_emb(states[None], states[None], cos, sin)[0][0]
    pairs = torch.view_as_complex(states.reshape(heads, length, d // 2, 2).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def test_turned_rows_give_the_same_attention_under_llama_cpps_rotary_embedding():
    torch.manual_seed(0)
    states, weights = torch.randn(6, 16), torch.randn(2, HEADS * HEAD, 16)
    ours, theirs, unturned = (
        torch.stack([rotated(states @ (turn(weight, HEADS) if turned else weight).T, HEADS, neighbours) for weight in weights])
        for turned, neighbours in ((False, False), (True, True), (False, True))
    )
    scores = [found[0] @ found[1].transpose(1, 2) for found in (ours, theirs, unturned)]
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scores[2], scores[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapters_own_numbers(tmp_path, dtype):
    model = lora(dtype=dtype, lora_alpha=6)
    fields, found = read(save_adapter(model, tmp_path / "a", format="gguf"))
    assert fields["general.architecture"] == "llama" and fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora" and fields["adapter.lora.alpha"] == 6
    expected, names = {}, gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for key, tensor in get_peft_model_state_dict(model).items():
        module, matrix = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        if matrix == "lora_B" and module.endswith(("q_proj", "k_proj")):
            tensor = turn(tensor, HEADS if module.endswith("q_proj") else 2)
        expected[f"{names.get_name(module)}.weight.{matrix.lower()}"] = tensor.float()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert "blk.0.attn_q.weight.lora_a" in found and [file.name for file in (tmp_path / "a").iterdir()] == ["adapter_model.gguf"]


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 8}},
        {"alpha_pattern": {"v_proj": 3, "o_proj": 0}, "use_rslora": True, "rank_pattern": {"up_proj": 1}},
        {"lora_alpha": 0, "alpha_pattern": {"v_proj": -3}},
    ],
)
def test_every_scale_in_one_alpha(tmp_path, config):
    model = lora(**config)
    fields, found = read(save_adapter(model, tmp_path, format="gguf"))
    if config == {"use_rslora": True}:
        assert fields["adapter.lora.alpha"] == 8 * math.sqrt(4)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for module, update in updates(model).items():
        a, b = (found[f"{names.get_name(module)}.weight.lora_{matrix}"] for matrix in "ab")
        if module.endswith(("q_proj", "k_proj")):
            update = turn(update, HEADS if module.endswith("q_proj") else 2)
        torch.testing.assert_close(b @ a * fields["adapter.lora.alpha"] / b.shape[1], update, rtol=1e-5, atol=1e-6)


def test_an_untied_head_and_embedding(tmp_path):
    model = lora(target_modules=["lm_head", "embed_tokens"])
    state_dict = get_peft_model_state_dict(model, save_embedding_layers=False)
    _, found = read(save_adapter(model, tmp_path, format="gguf"))
    assert found["output.weight.lora_b"].shape == (64, 4) and found["token_embd.weight.lora_a"].shape == (64, 4)
    assert torch.equal(found["token_embd.weight.lora_b"], state_dict["base_model.model.model.embed_tokens.lora_embedding_B"])


def test_rows_of_qwen_stay_where_they_are(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = lora(Qwen2ForCausalLM(Qwen2Config(**sizes, vocab_size=64)))
    fields, found = read(save_adapter(model, tmp_path, format="gguf"))
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    assert fields["general.architecture"] == "qwen2" and torch.equal(
        found["blk.0.attn_q.weight.lora_b"], get_peft_model_state_dict(model)[key]
    )


def tied(target):
    return lora(llama(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True), target_modules=[target])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (florence_lora, "the base is a Florence2ForConditionalGeneration, and adapters of LlamaForCausalLM, "),
        (lambda: lora(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2)), target_modules=["c_attn"]), "the base is a GPT2LMHead"),
        (lambda: tied("lm_head"), "lm_head: llama.cpp has one weight for the tied head and embedding"),
        (lambda: tied("embed_tokens"), "embed_tokens: llama.cpp has one weight for the tied head and embedding"),
        (lambda: lora(lora_alpha=0), "lora_alpha is 0, the adapter does nothing"),
    ],
    ids=["florence", "gpt2", "tied head", "tied embedding", "alpha 0"],
)
def test_what_llama_cpp_cannot_hold(tmp_path, model, message):
    with pytest.raises(ValueError, match=message):
        save_adapter(model(), tmp_path / "a", format="gguf")
    assert not list(tmp_path.iterdir())


def test_without_the_package_and_with_another_format(tmp_path, monkeypatch):
    model = lora()
    with pytest.raises(ValueError, match="format='onnx' is unknown: choose one of peft, gguf"):
        save_adapter(model, tmp_path / "a", format="onnx")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(OSError, match=r"pip install 'peft-icm\[gguf\]'"):
        save_adapter(model, tmp_path / "a", format="gguf")
    assert not list(tmp_path.iterdir())


def test_the_other_adapter_of_two_and_beside_a_peft_folder(tmp_path):
    model = lora()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    save_adapter(model, tmp_path)
    _, found = read(save_adapter(model, tmp_path, "other", format="gguf"))
    assert found["blk.0.attn_q.weight.lora_a"].shape == (2, 32) and len(found) == 4
    assert AdapterLayout.from_pretrained(tmp_path).ranks["model.layers.0.self_attn.q_proj"] == 4
