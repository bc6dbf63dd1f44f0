"""Hashes that tell whether an encoder is the one that task vectors were made with."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# What transformers writes beside the model itself, or changes without changing what the model computes.
UNRELATED = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
BEHAVIOUR = ("added_tokens", "model", "normalizer", "post_processor", "pre_tokenizer")  # of a tokenizer.json: not how it last padded
PREPARATION = ("crop_size", "do_center_crop", "do_normalize", "do_rescale", "do_resize", "image_mean", "image_std", "resample", "size")


def weights_sha256(module: nn.Module) -> str:
    """Hex digest over names, shapes and values of all weights, independent of the dtype they are held in.

    Values are hashed in fp32, to which fp16 and bf16 widen exactly: a model that was saved in bf16 and loaded in fp32 keeps its hash.

    Args:
        module (`nn.Module`): A model.

    Returns:
        `str`
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def config_sha256(**parts: Any) -> str:
    """Hex digest over what the weights do not say: the tokenizer, the model's config, how pictures are prepared.

    Args:
        **parts: What JSON can hold.

    Returns:
        `str`
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=dict).encode()).hexdigest()


def model_parts(config: PreTrainedConfig) -> Any:
    """A model's config, without what does not change its function.

    Args:
        config (`PreTrainedConfig`): Of a model.

    Returns:
        `dict`
    """

    def related(value: Any) -> Any:
        return {key: related(item) for key, item in value.items() if key not in UNRELATED} if isinstance(value, dict) else value

    return related(json.loads(config.to_json_string()))


def processor_parts(processor: Any) -> dict[str, Any]:
    """What a tokenizer or a processor does, however it pads and wherever its files are.

    Args:
        processor (`PreTrainedTokenizerBase` or `ProcessorMixin`): Of a model.

    Returns:
        `dict`
    """
    tokenizer: PreTrainedTokenizerBase = processor if isinstance(processor, PreTrainedTokenizerBase) else processor.tokenizer
    if tokenizer.is_fast:
        whole = json.loads(tokenizer.backend_tokenizer.to_str())
        parts = {name: whole.get(name) for name in BEHAVIOUR}
    else:
        parts = {"vocab": tokenizer.get_vocab()}
    if processor is not tokenizer:
        prepared = json.loads(processor.image_processor.to_json_string())
        parts |= {name: prepared.get(name) for name in PREPARATION}
    return parts
