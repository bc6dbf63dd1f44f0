"""PeftModel -> GGUF: one adapter as the file that llama.cpp, and what is built on it, reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from .attach import check_finite
from .layout import AdapterLayout
from .tensors import module_of

# Of a base's class: its architecture in GGUF, and whether llama.cpp turns the rows of q and k around (its rotary embedding takes neighbours
# for pairs, transformers' the two halves of a head). Checked against llama.cpp's converter: examples/serving/in_llama_cpp.py.
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", True),
    "MistralForCausalLM": ("llama", True),
    "Qwen2ForCausalLM": ("qwen2", False),
    "Qwen3ForCausalLM": ("qwen3", False),
}


def write_gguf(model: PeftModel, file: Path, adapter_name: str) -> None:
    """Write one adapter as a GGUF file, in float32.

    llama.cpp scales each B A by alpha / rank, with one alpha for all: rsLoRA and alphas of single modules go into that alpha, and where one
    does not do, into B.

    Args:
        model (`PeftModel`): Carries the adapter.
        file (`Path`): Where to; its folder exists.
        adapter_name (`str`): Which adapter.

    Raises:
        `OSError`: If the package gguf is missing.
        `ValueError`: If llama.cpp has no such base or no place for one of the matrices, or does nothing with them, or a value is not
            finite; nothing is written then.
    """
    try:
        import gguf
    except ImportError as error:
        raise OSError("format='gguf' needs the package gguf: pip install 'peft-icm[gguf]'.") from error
    base, layout = model.get_base_model(), AdapterLayout.from_peft_model(model, adapter_name)
    if type(base).__name__ not in ARCHITECTURES:
        raise ValueError(
            f"format='gguf': the base is a {type(base).__name__}, and adapters of {', '.join(ARCHITECTURES)} are exported. Where"
            " llama.cpp has such a model at all, it runs the merged one: merge_and_unload, and convert that."
        )
    architecture, turned = ARCHITECTURES[type(base).__name__]
    config: Any = base.config
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    alphas = {module: scale * rank for (module, rank), scale in zip(layout.ranks.items(), layout.scales, strict=True)}
    alpha = max(alphas.values(), key=abs)
    if not alpha:  # and llama.cpp takes 0 for no alpha at all
        raise ValueError("format='gguf': lora_alpha is 0, the adapter does nothing.")
    state_dict = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    check_finite(layout, state_dict)
    tensors = {}
    for key in layout.keys:
        module, name = module_of(key), names.get_name(module_of(key))
        if name is None or (config.tie_word_embeddings and name in ("output", "token_embd")):
            reason = "llama.cpp has no such weight" if name is None else "llama.cpp has one weight for the tied head and embedding"
            raise ValueError(f"format='gguf': {module}: {reason}. Train the adapter without it, or merge it (untie, merge_and_unload).")
        matrix = state_dict[key].float()
        if key.endswith(("lora_A.weight", "lora_embedding_A")):
            tensors[f"{name}.weight.lora_a"] = matrix.T if "lora_embedding" in key else matrix
            continue
        if turned and module.endswith(("q_proj", "k_proj")):
            matrix = turn(matrix, config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads)
        tensors[f"{name}.weight.lora_b"] = matrix * (alphas[module] / alpha)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.contiguous().cpu().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def turn(rows: Tensor, heads: int) -> Tensor:
    """The rows of q or k in llama.cpp's order: of each head, in turn one of its first half and one of its second.

    Args:
        rows (`Tensor`): `[out, ...]`, of a weight or of a LoRA's B.
        heads (`int`): Heads of q, or key-value heads of k.

    Returns:
        `Tensor`: Of the same shape.
    """
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
