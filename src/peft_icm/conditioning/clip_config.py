"""`open_clip_config.json` of a folder or a repo: what it may say, so that it runs no code and takes no memory beyond its weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm

Rule = tuple[Callable[[Any], bool], str]


def _whole(high: int, low: int = 1) -> Rule:
    return lambda value: type(value) is int and low <= value <= high, f"a whole number from {low} to {high}"


def _number(low: float, high: float) -> Rule:
    return lambda value: type(value) in (int, float) and low <= value <= high, f"a number from {low:g} to {high:g}"


def _one_of(*values: Any) -> Rule:
    return lambda value: any(type(value) is type(one) and value == one for one in values), f"one of {json.dumps(values)[1:-1]}"


def _several(rule: Rule, *lengths: int) -> Rule:
    return (
        lambda value: isinstance(value, list | tuple) and len(value) in lengths and all(rule[0](item) for item in value),
        f"a list of {' or '.join(map(str, lengths))}, each {rule[1]}",
    )


def _either(*rules: Rule) -> Rule:
    return lambda value: any(allowed(value) for allowed, _ in rules), " or ".join(text for _, text in rules)


def _fields(**rules: Rule) -> Rule:
    return (
        lambda value: isinstance(value, dict) and all(key in rules and rules[key][0](item) for key, item in value.items()),
        f"an object with {' and '.join(f'{key} ({text})' for key, (_, text) in rules.items())}",
    )


FLAG, NOTHING, SIZE = _one_of(True, False), _one_of(None), _whole(4096)
SIDES = _either(SIZE, _several(SIZE, 1, 2))
BLOCK: dict[str, Rule] = {  # of a layer of either tower
    "width": _whole(16384),
    "mlp_ratio": _number(0.1, 16),
    "ls_init_value": _either(NOTHING, _number(0, 10)),
    "final_ln_after_pool": FLAG,
    "output_tokens": _one_of(False),
    "act_kwargs": _either(NOTHING, _fields(approximate=_one_of("none", "tanh"))),
    "norm_kwargs": _either(NOTHING, _fields(eps=_number(0, 1))),
    "block_type": _one_of(None, "default", "custom"),
    **dict.fromkeys(("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"), FLAG),
}
TEXT: dict[str, Rule] = BLOCK | {
    "context_length": _whole(2048),
    "vocab_size": _whole(2_000_000),
    "heads": _whole(1024),
    "layers": _whole(256),
    "embed_cls": FLAG,
    "pad_id": _whole(2_000_000, 0),
    "eos_id": _whole(2_000_000, 0),
    "no_causal_mask": FLAG,
    "pool_type": _one_of("first", "last", "argmax", "eos"),
    "proj_bias": FLAG,
    "proj_type": _one_of("linear", "none"),
}
# A text tower of transformers lies beside the weights, in a folder of this name: nothing is read by another.
TEXT_FOLDER = "text"
TEXT |= {
    "hf_model_name": _one_of(None, TEXT_FOLDER),
    "hf_tokenizer_name": _one_of(None, TEXT_FOLDER),
    "hf_model_pretrained": _one_of(False),
    "hf_pooler_type": _one_of("mean_pooler", "max_pooler", "cls_last_hidden_state_pooler"),
    "hf_proj_type": _one_of(None, "linear", "mlp"),
}
VISION: dict[str, Rule] = BLOCK | {
    "image_size": SIDES,
    "patch_size": _either(NOTHING, _whole(1024)),
    "layers": _either(_whole(256), _several(_whole(256), 4)),
    "head_width": _whole(4096),
    "patch_dropout": _number(0, 1),
    "attentional_pool": FLAG,
    "attn_pooler_queries": _whole(4096),
    "attn_pooler_heads": _whole(1024),
    "no_ln_pre": FLAG,
    "pos_embed_type": _one_of("learnable", "sin_cos_2d"),
    "pool_type": _one_of("tok", "avg"),
    # A plain name: timm follows "hf-hub:" and "local-dir:" to other places.
    "timm_model_name": _either(NOTHING, (lambda name: isinstance(name, str) and timm.is_model(name), "a model of timm")),
    "timm_model_pretrained": _one_of(False),
    "timm_pool": _one_of("", "avg", "max", "avgmax", "token", "map", "abs_attn", "rot_attn"),
    "timm_proj": _one_of(None, "", "linear", "mlp", "none"),
    "timm_proj_bias": FLAG,
    "timm_drop": _number(0, 1),
    "timm_drop_path": _either(NOTHING, _number(0, 1)),
}
MODEL: dict[str, Rule] = {
    "embed_dim": _whole(16384),
    "quick_gelu": FLAG,
    "custom_text": FLAG,
    "init_logit_scale": _number(-100, 100),
    "init_logit_bias": _either(NOTHING, _number(-100, 100)),
    "nonscalar_logit_scale": FLAG,
}
PREPROCESS: dict[str, Rule] = {
    "size": SIDES,
    "mode": _one_of("RGB"),
    "mean": _several(_number(-1e3, 1e3), 3),
    "std": _several(_number(1e-3, 1e3), 3),
    "interpolation": _one_of("bicubic", "bilinear", "nearest"),
    "resize_mode": _one_of("shortest", "longest", "squash"),
    "fill_color": _whole(255, 0),
}
TABLES = {"model_cfg": MODEL, "model_cfg.text_cfg": TEXT, "model_cfg.vision_cfg": VISION, "preprocess_cfg": PREPROCESS}


def read_clip_config(file: Path) -> dict[str, Any]:
    """Read a checked `open_clip_config.json`.

    Args:
        file (`Path`): The file.

    Returns:
        `dict`: `model_cfg` and, where it is given, `preprocess_cfg`.

    Raises:
        `ValueError`: If the file is no JSON, or [`check_clip_config`] refuses it.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON ({error}): download the checkpoint again.") from error
    check_clip_config(config, str(file))
    return config


def check_clip_config(config: Any, where: str) -> None:
    """Refuse a config of open_clip with any field that is not known to be harmless.

    Tokenizers and text towers that are loaded by name are not: they come with code of their own where the config says so. One of
    transformers is read from the folder `text` beside the weights, and nowhere else.

    Args:
        config (`dict`): `model_cfg` and, optionally, `preprocess_cfg`.
        where (`str`): Its file, for the message.

    Raises:
        `ValueError`: That names the field, its value and what is allowed.
    """
    for path, rules in TABLES.items():
        part: Any = config
        for name in path.split("."):
            part = part.get(name) if isinstance(part, Mapping) else None
        if path == "preprocess_cfg" and part is None:
            continue
        if not isinstance(part, Mapping):
            raise ValueError(f"{where}: {path} is {str(part)[:80]!r}, it must be an object of open_clip's fields.")
        for field, value in part.items():
            if f"{path}.{field}" in TABLES:
                continue
            if field not in rules:
                raise ValueError(f"{where}: {path}.{field} is not read: it may name code or files. Allowed are {', '.join(sorted(rules))}.")
            allowed, text = rules[field]
            if not allowed(value):
                raise ValueError(f"{where}: {path}.{field} is {str(value)[:80]!r}, it must be {text}.")
    if "embed_dim" not in config["model_cfg"]:
        raise ValueError(f"{where}: model_cfg.embed_dim is missing, the width of the space that text and pictures share.")
