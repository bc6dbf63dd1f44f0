"""What of a LoRA configuration makes the function: the scale of each module; what else would change it is refused."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from typing import Any

import regex
from peft import LoraConfig

MAX_TEXT = 20_000  # characters of a name or pattern of a configuration
MAX_ALPHA = 1e6
MATCHING_SECONDS = 5.0

# Every field of peft.LoraConfig is in exactly one of these; a test fails when peft adds one.
SCALE = frozenset({"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"})
# Tensors or steps beyond s BA, or a base that is rewritten: taken only where they are off.
REFUSED = frozenset(
    {
        "alora_invocation_tokens", "arrow_config", "bias", "ensure_weight_tying", "kasa_config", "layer_replication", "lora_bias",
        "megatron_config", "modules_to_save", "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora",
        "use_qalora",
    }
)  # fmt: skip
INITIALISATION = frozenset({"init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"})
TRAINING = frozenset({"lora_dropout", "velora_config", "runtime_config", "qalora_group_size", "megatron_core"})
NAMING = frozenset({"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"})
ABOUT = frozenset({"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"})

_LEAVE_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


def normal_config(values: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    """A LoRA configuration checked and spelt in one way: numbers, not their look-alikes; exact module names, not foreign regexes.

    Args:
        values (`Mapping[str, Any]`): Fields of `peft.LoraConfig`, as JSON has them; missing ones have peft's defaults.
        ranks (`Mapping[str, int]`): Rank of the tensors of each module.

    Returns:
        `dict[str, Any]`: For `LoraConfig.from_peft_type`; without what names the base and what only matters in training.

    Raises:
        `ValueError`: One line that names the field, what it is and what is allowed.
    """
    if values.get("peft_type") != "LORA":
        raise ValueError(f"peft_type={_short(values.get('peft_type'))} must be 'LORA': only LoRA adapters have a layout.")
    check_fields(values)
    rank, alpha = _integer("r", values.get("r", 8)), _alpha("lora_alpha", values.get("lora_alpha", 8))
    rslora = _flag("use_rslora", values.get("use_rslora"))
    said = _by_module("rank_pattern", values.get("rank_pattern"), ranks)
    for module, found in ranks.items():
        wanted = _integer("rank_pattern", said.get(module, rank))
        if wanted != found:
            raise ValueError(f"r={wanted} (r and rank_pattern) must be the rank of the tensors: those of {module} have rank {found}.")
    alphas = {
        module: _alpha("alpha_pattern", value) for module, value in _by_module("alpha_pattern", values.get("alpha_pattern"), ranks).items()
    }
    dropout = values.get("lora_dropout") or 0.0
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"lora_dropout={_short(dropout)} must be a number in [0, 1).")
    task_type = values.get("task_type")
    if task_type is not None and not isinstance(task_type, str):
        raise ValueError(f"task_type={_short(task_type)} must be a string or null.")
    normal = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "rank_pattern": {exactly(module): found for module, found in ranks.items() if found != rank},
        "alpha_pattern": {exactly(module): value for module, value in alphas.items() if value != alpha},
        "fan_in_fan_out": _flag("fan_in_fan_out", values.get("fan_in_fan_out")),
        **({"task_type": task_type} if task_type else {}),
        **({"lora_dropout": float(dropout)} if dropout else {}),
        **_naming(values, list(ranks)),
    }
    try:
        LoraConfig.from_peft_type(**normal)
    except (TypeError, ValueError) as error:
        raise ValueError(f"peft refuses the configuration: {' '.join(str(error).split())[:200]}") from error
    return normal


def scales(config: Mapping[str, Any], ranks: Mapping[str, int]) -> list[float]:
    """s of each module, `alpha / r` or `alpha / sqrt(r)`, of a configuration that [`normal_config`] returned."""
    alphas, default = config.get("alpha_pattern") or {}, config.get("lora_alpha", 8)
    root = math.sqrt if config.get("use_rslora") else float
    return [alphas.get(exactly(module), default) / root(rank) for module, rank in ranks.items()]


def exactly(module: str) -> str:
    """A key of peft's `rank_pattern` and `alpha_pattern` that matches this module alone, and no other that ends like it."""
    return f"^{re.escape(module)}"


def check_fields(values: Mapping[str, Any]) -> None:
    """Refuse the fields of a LoRA configuration that make it more than matrices of a rank and a scale on an unchanged base.

    Args:
        values (`Mapping`): `peft.LoraConfig.to_dict()`.

    Raises:
        `ValueError`: Names the field.
    """
    known = SCALE | REFUSED | INITIALISATION | TRAINING | NAMING | ABOUT
    for name, value in values.items():
        off = value is None or value is False or value in ("none", [], {})
        if name == "target_parameters" and not off:  # peft's own name for what it makes of all-linear, or of gate, up and down_proj
            raise ValueError(
                f"target_parameters={_short(value)}: LoRAs on the experts or the router of a mixture of experts are not supported. Train it"
                " again on modules outside of them, as target_modules=['q_proj', 'v_proj'] are."
            )
        if name in REFUSED and not off:
            raise ValueError(
                f"{name}={_short(value)}: this changes what the adapter computes beyond s BA, or which tensors it has;"
                " only plain LoRAs are supported. Train it again without."
            )
        if name not in known and not off:
            raise ValueError(f"{_short(name)} is no field of this peft's LoraConfig: upgrade peft, or take it out if it changes nothing.")
    initial = values.get("init_lora_weights")
    if not any(initial is allowed or (isinstance(initial, str) and initial == allowed) for allowed in _LEAVE_THE_BASE):
        raise ValueError(
            f"init_lora_weights={_short(initial)} may rewrite the base model's weights, and the adapter fits that base alone. Convert it to"
            " a plain LoRA: save it with PeftModel.save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )


def _naming(values: Mapping[str, Any], modules: list[str]) -> dict[str, Any]:
    """How peft finds the modules again. A regex of a stranger is never run: the layout knows its modules, and names them."""
    target, exclude = values.get("target_modules"), values.get("exclude_modules")
    layers, pattern = values.get("layers_to_transform"), values.get("layers_pattern")
    for name, value in (("target_modules", target), ("exclude_modules", exclude), ("layers_pattern", pattern)):
        if not (value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value))):
            raise ValueError(f"{name}={_short(value)} must be a string, a list of strings or null.")
    numbers = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if not all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in numbers):
        raise ValueError(f"layers_to_transform={_short(layers)} must be layer numbers from 0.")
    if isinstance(target, list) and not isinstance(exclude, str) and not pattern:
        endings = tuple(f".{name}" for name in target)
        if all(f".{module}".endswith(endings) for module in modules):
            rules = {"exclude_modules": sorted(exclude or []), "layers_to_transform": sorted(numbers)}
            return {"target_modules": sorted(target), **{name: value for name, value in rules.items() if value}}
    return {"target_modules": "|".join(map(re.escape, modules))}  # a list would take each module that ends like one of them


def _by_module(name: str, pattern: Any, modules: Mapping[str, int]) -> dict[str, Any]:
    """What `rank_pattern` or `alpha_pattern` says of each module that it says something of, as peft's `get_pattern_key` matches."""
    if not pattern:
        return {}
    if not isinstance(pattern, dict) or sum(len(str(key)) + 1 for key in pattern) > MAX_TEXT * (1 + len(modules)):
        raise ValueError(f"{name}={_short(pattern)} must be an object of module names and numbers.")
    exact = {exactly(module): module for module in modules}
    if pattern.keys() <= exact.keys():
        return {exact[key]: value for key, value in pattern.items()}
    found, end = {}, time.monotonic() + MATCHING_SECONDS
    for key, value in pattern.items():
        try:
            compiled = regex.compile(rf"(.*\.)?({key})$")
            for module in modules:
                if module not in found and compiled.match(module, timeout=max(1e-3, end - time.monotonic())):
                    found[module] = value
        except TimeoutError as error:
            raise ValueError(f"{name}: matching {_short(key)} takes too long. Name the modules in full.") from error
        except (regex.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{name}: {_short(key)} is no regular expression ({error}).") from error
    return found


def _flag(name: str, value: Any) -> bool:
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name}={_short(value)} must be true, false or null.")
    return bool(value)


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0 or value != value // 1 or value > 2**20:
        raise ValueError(f"{name}={_short(value)} must be a positive integer, the LoRA rank.")
    return int(value)


def _alpha(name: str, value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_ALPHA:
        raise ValueError(f"{name}={_short(value)} must be a number, finite and at most {MAX_ALPHA:.0e}.")
    return int(value) if value == int(value) else value


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
