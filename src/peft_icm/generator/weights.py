"""The weight files of a saved generator: found, hashed, and checked against what its config asks for, before anything is built."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..adapters.tensors import all_finite
from ..disk import safe_name
from .linear_decoder import to_int8

_DTYPES = {"F64", "F32", "F16", "BF16"}
# What stays in fp32, whatever the others are cast to: modules, and the scales of a basis of 8 bits.
EXACT = ("statistics", "space", "reader", "text_reader", "row_scale")
SAVED_DTYPES = ("float32", "bfloat16", "float16", "int8")


def weight_names(variant: str | None) -> tuple[str, str]:
    """Names of the one weight file, and of the index of many, as transformers gives them.

    Args:
        variant (`str`, *optional*): As `from_pretrained` and `save_pretrained` take it.

    Returns:
        `tuple[str, str]`
    """
    dotted = f".{variant}" if variant else ""
    return f"model{dotted}.safetensors", f"model.safetensors.index{dotted}.json"


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files that transformers loads from a folder.

    Args:
        folder (`Path`): Where the generator is saved.
        variant (`str`, *optional*): As `from_pretrained` takes it.

    Returns:
        `list[Path]`

    Raises:
        `OSError`: If there are none.
        `ValueError`: If the index of shards is none.
    """
    single, index = (folder / name for name in weight_names(variant))
    if single.is_file():
        return [single]
    if not index.is_file():
        raise OSError(f"{folder} has no {single.name}: is it a generator that save_pretrained wrote?")
    try:
        names = sorted({safe_name(name, "weight file") for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of weights ({error}): download or save the generator again.") from error
    missing = next((name for name in names if not name.endswith(".safetensors") or not (folder / name).is_file()), None)
    if missing or not names:
        raise OSError(f"{folder} lacks {missing}, which {index.name} names: download or save the generator again.")
    return [folder / name for name in names]


def check_weights(files: Sequence[Path], expected: Mapping[str, Tensor]) -> str:
    """Read every tensor once: refuse what is missing, unexpected, of another shape or not finite.

    Args:
        files (`Sequence[Path]`): See [`weight_files`].
        expected (`Mapping[str, Tensor]`): The state dict of the generator, on the meta device.

    Returns:
        `str`: sha256 over names, dtypes, shapes and bytes of the tensors, however they are cut into files.

    Raises:
        `ValueError`: Names the file and the first tensor that is wrong.
    """
    advice = "Download or save the generator again."
    digests: dict[str, bytes] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                names = sorted(file.keys())
                unknown = next((name for name in names if name not in expected or name in digests), None)
                if unknown is not None:
                    raise ValueError(f"{path} holds {unknown}, a tensor that its config.json does not ask for. {advice}")
                for name in names:
                    header = file.get_slice(name)
                    shape, wanted = tuple(header.get_shape()), tuple(expected[name].shape)
                    if shape != wanted:
                        raise ValueError(f"{path}: {name} has shape {shape}, its config.json asks for {wanted}. {advice}")
                    dtypes = _DTYPES if expected[name].is_floating_point() else {"I8"}
                    if header.get_dtype() not in dtypes:
                        kind = "I8" if dtypes == {"I8"} else "floating point"
                        raise ValueError(f"{path}: {name} is of {header.get_dtype()}, must be {kind}. {advice}")
                    tensor = file.get_tensor(name)
                    if not all_finite(tensor):
                        raise ValueError(f"{path}: {name} holds NaN or infinite values. {advice}")
                    digests[name] = _digest(name, tensor)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is corrupted ({' '.join(str(error).split())}). {advice}") from error
    missing = next((name for name in expected if name not in digests), None)
    if missing is not None:
        raise ValueError(f"{files[0]} lacks {missing}, shape {tuple(expected[missing].shape)}, which its config.json asks for. {advice}")
    return _together(digests)


def in_dtype(state_dict: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The tensors of a generator as they are saved in a dtype.

    Args:
        state_dict (`Mapping[str, Tensor]`): Of the generator. A basis of 8 bits stays so.
        dtype (`str`): One of `SAVED_DTYPES`; `"int8"` is for the basis, and leaves the others as they are.

    Returns:
        `dict[str, Tensor]`
    """
    if dtype != "int8":
        wanted = getattr(torch, dtype)
        cast = {name for name, tensor in state_dict.items() if tensor.is_floating_point() and not set(EXACT) & set(name.split("."))}
        return {name: tensor.to(wanted) if name in cast else tensor for name, tensor in state_dict.items()}
    found, basis = dict(state_dict), state_dict["network.basis"]
    if basis.is_floating_point():
        found["network.basis"], found["network.row_scale"] = to_int8(basis)
    return found


def hash_weights(files: Sequence[Path]) -> str:
    """sha256 over names, dtypes, shapes and bytes of the tensors, however they are cut into files; what [`check_weights`] finds.

    Args:
        files (`Sequence[Path]`): See [`weight_files`].

    Returns:
        `str`

    Raises:
        `ValueError`: If a tensor is not finite: what could not be loaded is not saved.
    """
    digests: dict[str, bytes] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                tensor = file.get_tensor(name)
                if not all_finite(tensor):
                    raise ValueError(
                        f"{name} holds NaN or infinite values: such a generator is not saved. Train it at a lower learning rate, or"
                        " save it in bfloat16."
                    )
                digests[name] = _digest(name, tensor)
    return _together(digests)


def _together(digests: Mapping[str, bytes]) -> str:
    return hashlib.sha256(b"".join(digests[name] for name in sorted(digests))).hexdigest()


def _digest(name: str, tensor: Tensor) -> bytes:
    digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()
