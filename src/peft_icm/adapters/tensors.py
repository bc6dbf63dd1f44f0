"""The keys and shapes of a LoRA's tensors, as peft names and makes them."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

PREFIX = "base_model.model."
KeyMap = Sequence[tuple[str, str]]
T = TypeVar("T")
_PARAMETER = re.compile(r"\.(?:lora_([AB])\.weight|lora_embedding_([AB]))$")
MAX_NUMEL, MAX_TENSORS, MAX_KEY = 2**40, 2**17, 500
GROUP = 2**18  # numbers that a walk over an adapter takes together, where its tensors are smaller
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_IN_OUT = (
    ("in_features", "out_features"),
    ("in_channels", "out_channels"),
    ("num_embeddings", "embedding_dim"),
    ("nx", "nf"),  # transformers' Conv1D
)


def natural(key: str) -> list[tuple[int, int | str]]:
    """Sort key that puts `layers.2` before `layers.10`: safetensors files come back in alphabetical order."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", key) if part]


def map_keys(tensors: Mapping[str, T], key_map: KeyMap) -> dict[str, T]:
    """Rename the tensors of an adapter that was trained on another module tree of the same model.

    Args:
        tensors (`Mapping`): By their keys.
        key_map (`Sequence[tuple[str, str]]`): (regex, replacement) pairs, applied to each key in turn as `re.sub` does. A key that
            becomes empty is left out.

    Returns:
        `dict`: The same values by their new keys.
    """
    mapped = {}
    for key, value in tensors.items():
        for pattern, replacement in key_map:
            key = re.sub(pattern, replacement, key)
        if key:
            mapped[key] = value
    return mapped


def check_tensors(keys: Any, shapes: Any) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """The keys and shapes of a layout, if they are those of whole LoRA pairs."""
    if not isinstance(keys, list | tuple) or not isinstance(shapes, list | tuple) or len(keys) != len(shapes):
        raise ValueError("keys and shapes of a layout must be lists of one length.")
    if not 0 < len(keys) <= MAX_TENSORS:
        raise ValueError(f"The adapter holds {len(keys) or 'no'} tensors: expected 1 to {MAX_TENSORS}.")
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in zip(keys, shapes, strict=True):
        module, matrix = _check_tensor(key, shape)
        if matrix in pairs.setdefault(module, {}):
            raise ValueError(f"{key} stands twice in the layout.")
        pairs[module][matrix] = tuple(shape)
    if (total := sum(math.prod(shape) for shape in shapes)) > MAX_NUMEL:
        raise ValueError(f"The adapter has {total} numbers: expected at most 2^40.")
    for module, pair in pairs.items():
        _check_pair(module, pair)
    return tuple(keys), tuple(tuple(shape) for shape in shapes)


def _check_tensor(key: Any, shape: Any) -> tuple[str, str]:
    """The module and the matrix that a key names, if it is a LoRA's key and `shape` is a shape."""
    if not isinstance(key, str) or not (match := _PARAMETER.search(key)) or len(key) > MAX_KEY or not key.isprintable():
        raise ValueError(
            f"{str(key)[:100]} is not a LoRA matrix. Save the adapter without DoRA, trained biases or modules_to_save, and with"
            " save_embedding_layers=False."
        )
    if not key.startswith(PREFIX) or match.start() <= len(PREFIX):
        raise ValueError(f"{key} must begin with {PREFIX!r} and name a module: save the adapter with PeftModel.save_pretrained.")
    if not isinstance(shape, list | tuple) or not 2 <= len(shape) <= 5 or any(type(size) is not int or size <= 0 for size in shape):
        raise ValueError(f"{key}: shape {str(shape)[:60]} must be two to five positive integers.")
    return key[: match.start()], match.group(0)[1:].removesuffix(".weight")


def _check_pair(module: str, pair: dict[str, tuple[int, ...]]) -> None:
    if pair.keys() not in ({"lora_A", "lora_B"}, {"lora_embedding_A", "lora_embedding_B"}):
        raise ValueError(f"{module} must have one pair of LoRA matrices A and B, found {', '.join(sorted(pair))}.")
    a, b = (pair[matrix] for matrix in sorted(pair))
    groups, rest = divmod(a[0], b[1])  # in a grouped convolution each row of B meets the r / groups rows of A of its group
    if rest or len(a) != len(b) or any(size != 1 for size in b[2:]) or (groups > 1 and (len(a) < 3 or b[0] % groups)):
        raise ValueError(f"{module}: A of shape {a} and B of shape {b} do not multiply: expected one rank.")


def outside_adapters(model: nn.Module) -> dict[str, nn.Module]:
    """A model's `named_modules()` without what adapters add inside of their layers: a walk that takes as long however many there are."""
    found: dict[str, nn.Module] = {}
    seen: set[nn.Module] = set()
    waiting: list[tuple[str, Any]] = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        found[name] = module
        layer: Any = module
        inner = [("base_layer", layer.base_layer)] if isinstance(module, BaseTunerLayer) else module.named_children()
        waiting += [(f"{name}.{child}" if name else child, part) for child, part in reversed(list(inner))]
    return found


class Unfilled(TorchFunctionMode):
    """Linear layers are made without drawing their first random numbers: on the meta device that takes longer than all the rest."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return kwargs["tensor"] if func is nn.init.kaiming_uniform_ else func(*args, **(kwargs or {}))


def groups(sizes: Sequence[int]) -> Iterator[slice]:
    """A walk over tensors in few steps and little memory: those in a row of at most 2^18 numbers together, or a single one."""
    first, numbers = 0, 0
    for index, size in enumerate(sizes):
        if index > first and numbers + size > GROUP:
            yield slice(first, index)
            first, numbers = index, 0
        numbers += size
    yield slice(first, len(sizes))


def all_finite(tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether a tensor has neither NaN nor infinite values, nor would have after a cast: by its extremes, which take a tenth of
    `isfinite`'s time and no memory."""
    return bool(torch.stack(tensor.aminmax()).to(dtype or tensor.dtype).isfinite().all())


@functools.lru_cache(2**14)  # a swap asks for each key several times
def module_of(key: str) -> str:
    """Name of the base's module that a key belongs to."""
    return _PARAMETER.sub("", key).removeprefix(PREFIX)


def ranks_of(keys: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
    """Rank of each module of a layout, in the order of the keys."""
    found = zip(keys, shapes, strict=True)
    return {module_of(key): shape[0] for key, shape in found if key.endswith(("lora_A.weight", "lora_embedding_A"))}


def expected_shape(key: str, shape: tuple[int, ...], rank: int, module: nn.Module) -> tuple[int, ...]:
    """The shape that the LoRA matrix `key` of rank and kernel as in `shape` must have on `module`."""
    for names in _IN_OUT:
        if all(name in module.__dict__ for name in names):
            inputs, outputs = (getattr(module, name) for name in names)
            break
    else:
        raise ValueError(f"{key}: expected a linear, convolution or embedding module, found {type(module).__name__}.")
    if ".lora_embedding_A" in key:
        return (shape[0], inputs)
    if ".lora_embedding_B" in key:
        return (outputs, shape[1])
    if ".lora_A" in key:
        return (shape[0], inputs, *(module.kernel_size if isinstance(module, _CONVOLUTIONS) else ()))
    if isinstance(module, _CONVOLUTIONS):
        return (outputs, rank // module.groups, *(1 for _ in module.kernel_size))
    return (outputs, rank)
