"""Tiny instances of the real classes, built in milliseconds."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import Florence2Config, Florence2ForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from peft_icm import AdapterLayout, ICMConfig, ICMGenerator

FLORENCE_TARGETS = ["q_proj", "o_proj", "k_proj", "v_proj", "linear", "Conv2d", "lm_head", "fc2"]
CONDITION_DIM = 8


def llama(layers=2, **kwargs):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 64, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **{**sizes, **kwargs}))


def llama_lora(r=2, layers=2, dtype=torch.float32, **kwargs):
    config = LoraConfig(r=r, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(llama(layers, **kwargs).to(dtype), config, autocast_adapter_dtype=False)


def florence(vocab_size=128):
    tiny = {
        "vision_config": {
            "embed_dim": [8, 16], "depths": [1, 1], "num_heads": [1, 2], "num_groups": [1, 2], "patch_size": [7, 3],
            "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True], "window_size": 4, "projection_dim": 16,
        },
        "text_config": {
            "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
            "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": vocab_size,
        },
    }  # fmt: skip
    return Florence2ForConditionalGeneration(Florence2Config(**tiny))


def florence_lora(r=1):
    return get_peft_model(florence(), LoraConfig(r=r, target_modules=FLORENCE_TARGETS, task_type=None))


def filled(layout, seed=0):
    torch.manual_seed(seed)
    return {key: torch.randn(shape).to(layout.torch_dtype) for key, shape in zip(layout.keys, layout.shapes, strict=True)}


def llama_layout():
    return AdapterLayout.from_peft_model(llama_lora())


def florence_layout():
    return AdapterLayout.from_peft_model(florence_lora())


def generator(layout=None, **kwargs):
    """A generator of random weights: small, but every part of it works."""
    torch.manual_seed(0)
    options = {"condition_dim": CONDITION_DIM, "latent_size": 4, "hidden_size": 16, "num_components": 6, **kwargs}
    tasks = [{"name": name, "description": f"about {name}"} for name in ("cats", "dogs", "sofas")]
    model = ICMGenerator(ICMConfig(layout=(layout or llama_layout()).to_dict(), tasks=tasks, **options))
    return model.eval()
