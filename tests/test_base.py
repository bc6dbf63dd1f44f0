"""The base model from wherever it lies: GGUF files, subfolders, and files that can't be read."""

import dataclasses
import json

import gguf
import pytest
import torch
from tiny import CONDITION_DIM, filled, generator, llama, llama_layout

from peft_icm.adapters import attach, load_base

TOKENS = torch.arange(5, 25)[None]
GGUF_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
GGUF_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@torch.no_grad()
def out(model):
    return model(TOKENS).logits


def save_gguf(model, file):
    """A Llama as llama.cpp keeps it, in fp32: rotary halves of q and k lie side by side there."""
    config, writer = model.config, gguf.GGUFWriter(str(file), "llama")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for key, tensor in model.state_dict().items():
        name, values = key.removesuffix(".weight"), tensor.numpy()
        if name in GGUF_NAMES:
            name = GGUF_NAMES[name]
        else:
            layer, part = name.removeprefix("model.layers.").split(".", 1)
            part = GGUF_PARTS[part]
            if part in heads:
                values = values.reshape(heads[part], 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape).copy()
            name = f"blk.{layer}.{part}"
        writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def base():
    torch.manual_seed(0)
    return llama().eval()


@pytest.fixture(params=["LlamaForCausalLM", None], ids=["class known", "class from the base's config"])
def layout(request):
    return dataclasses.replace(llama_layout(), base_model_class=request.param)


@pytest.mark.parametrize("whole", [False, True], ids=["its name", "its path"])
def test_from_a_gguf_file(base, layout, whole, tmp_path):
    save_gguf(base, tmp_path / "m.gguf")
    loaded = load_base(layout, str(tmp_path), None, gguf_file=str(tmp_path / "m.gguf") if whole else "m.gguf")
    assert type(loaded) is type(base) and not loaded.training
    torch.testing.assert_close(out(loaded), out(base))
    torch.testing.assert_close(out(attach(loaded, layout, filled(layout))), out(attach(base, layout, filled(layout))))


def test_a_generator_takes_one(base, layout, tmp_path):
    save_gguf(base, tmp_path / "m.gguf")
    vector, icm = torch.ones(CONDITION_DIM), generator(layout)
    options = {"base_model": tmp_path, "base_model_kwargs": {"gguf_file": "m.gguf"}}
    model = icm.generate_adapter(task_vector=vector, temperature=0.0, **options)
    torch.testing.assert_close(out(model), out(icm.generate_adapter(task_vector=vector, temperature=0.0, base_model=base)))


def test_from_a_subfolder(base, layout, tmp_path):
    base.save_pretrained(tmp_path / "inner")
    torch.testing.assert_close(out(load_base(layout, str(tmp_path), None, subfolder="inner")), out(base))


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])


def change(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize(
    ("spoil", "options", "kind", "message"),
    [
        (lambda folder: cut(folder / "m.gguf", 500), {"gguf_file": "m.gguf"}, ValueError, "requires a buffer"),
        (lambda folder: cut(folder / "m.gguf", 3000), {"gguf_file": "m.gguf"}, ValueError, "size"),
        (lambda folder: (folder / "m.gguf").write_bytes(b"x" * 99), {"gguf_file": "m.gguf"}, ValueError, "GGUF|magic"),
        (lambda folder: None, {"gguf_file": "other.gguf"}, OSError, r"a file named other\.gguf"),
        (lambda folder: cut(folder / "model.safetensors", -100), {}, ValueError, "file not fully covered"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), {}, ValueError, "header too small"),
        (lambda folder: (folder / "model.safetensors").unlink(), {}, OSError, r"no file named model\.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), {}, OSError, "not a valid JSON"),
        (lambda folder: change(folder / "config.json", hidden_size=32), {}, ValueError, "ignore_mismatched_sizes"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(base, layout, spoil, options, kind, message, tmp_path):
    base.save_pretrained(tmp_path)
    save_gguf(base, tmp_path / "m.gguf")
    spoil(tmp_path)
    with pytest.raises(kind, match=message) as caught:
        load_base(layout, str(tmp_path), None, **options)
    assert str(caught.value).startswith(f"The base model {tmp_path}: ") and "\n" not in str(caught.value)


def test_a_file_in_the_place_of_its_folder(base, layout, tmp_path):
    save_gguf(base, tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=r"m\.gguf is a file: pass its folder, and .*gguf_file"):
        load_base(layout, str(tmp_path / "m.gguf"), None)
