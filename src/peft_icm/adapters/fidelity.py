"""How near two adapters are, measured on dW = s BA: A and B alone mean nothing, since GL(r) changes them and not the product."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..hub.files import resolve
from .layout import ADAPTER_FILES, AdapterLayout

_BLOCK = 2**24  # numbers of the [g, n, m, r, r] products held at once: 128 MiB in double precision


@dataclass(frozen=True)
class _Factors:
    """Where one module's A and B lie in a vector, and s.

    A grouped convolution has B's rows of a group meet A's rows of that group only; everything else is one group.
    """

    a: slice
    b: slice
    rank: int
    groups: int
    scaling: float

    def take(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """`[n, P]` -> A `[n, g, r / g, in]` and B `[n, g, out / g, r / g]` in double precision."""
        width = self.rank // self.groups
        a = vectors[:, self.a].double().reshape(len(vectors), self.groups, width, -1)
        b = vectors[:, self.b].double().reshape(len(vectors), self.groups, -1, width)
        return a, b


def _factors(layout: AdapterLayout) -> Iterator[_Factors]:
    """Those of each module, in the order of the layout; s = alpha / r, or alpha / sqrt(r) with `use_rslora`, as peft sets it."""
    ends = list(itertools.accumulate(layout.sizes))
    places = {key: slice(end - size, end) for key, size, end in zip(layout.keys, layout.sizes, ends, strict=True)}
    shapes = dict(zip(layout.keys, layout.shapes, strict=True))
    keys = [key for key in layout.keys if ".lora_A" in key or ".lora_embedding_A" in key]
    for key, scaling in zip(keys, layout.scales, strict=True):
        partner = key.replace(".lora_A", ".lora_B").replace(".lora_embedding_A", ".lora_embedding_B")
        rank = shapes[key][0]
        yield _Factors(places[key], places[partner], rank, rank // shapes[partner][1], scaling)


def _check(layout: AdapterLayout, *vectors: Tensor) -> None:
    for tensor in vectors:
        if tensor.ndim != 2 or tensor.shape[1] != layout.numel:
            raise ValueError(f"Expected adapters of shape (n, {layout.numel}), found {tuple(tensor.shape)}: stack flattened adapters.")


# ---------------------------------------------------------------------- on vectors
def inner_products(layout: AdapterLayout, first: Tensor, second: Tensor) -> Tensor:
    r"""Frobenius inner products of the updates dW of every adapter of one stack with every one of another.

    $$\langle dW_i, dW_j \rangle_F = \sum_{modules} s^2 \, \mathrm{tr}(A_i^T B_i^T B_j A_j)
    = \sum_{modules} s^2 \sum_{k,l} (B_i^T B_j)_{kl} (A_i A_j^T)_{kl}$$

    Only r x r products are formed, never a dW. Each module weighs with its own s = alpha / r (`alpha_pattern`, `rank_pattern` and
    `use_rslora` as peft reads them). Linear, convolution (flattened to `[out, in * kernel]`) and embedding modules.

    Args:
        layout ([`AdapterLayout`]): Of all of them.
        first (`Tensor`): `[n, P]` flattened adapters, in any floating dtype.
        second (`Tensor`): `[m, P]`.

    Returns:
        `Tensor`: `[n, m]`, in double precision, on the device of the adapters.

    Raises:
        `ValueError`: If a stack is not of shape `[n, P]`.

    Example:

    ```python
    >>> from peft_icm import ICMGenerator, bundled_generator
    >>> generator = ICMGenerator.from_pretrained(bundled_generator("text"))
    >>> adapters = generator.sample(generator.task_vector("continue a Shakespeare play"), num_samples=3)
    >>> inner_products(generator.layout, adapters, adapters[:2]).shape
    torch.Size([3, 2])

    ```
    """
    _check(layout, first, second)
    total = torch.zeros(len(first), len(second), dtype=torch.float64, device=first.device)
    for factors in _factors(layout):
        a2, b2 = factors.take(second)
        rows = max(1, _BLOCK * factors.groups // max(1, len(second) * factors.rank**2))
        for start in range(0, len(first), rows):
            a1, b1 = factors.take(first[start : start + rows])
            outer = torch.einsum("ngor,mgos->gnmrs", b1, b2) * torch.einsum("ngri,mgsi->gnmrs", a1, a2)
            total[start : start + rows] += factors.scaling**2 * outer.sum((0, 3, 4))
    return total


def norms(layout: AdapterLayout, adapters: Tensor) -> Tensor:
    """`||dW||_F` over all modules: the root of an adapter's inner product with itself ([`inner_products`]).

    Args:
        layout ([`AdapterLayout`]): Of the adapters.
        adapters (`Tensor`): `[n, P]` flattened adapters.

    Returns:
        `Tensor`: `[n]`, in double precision.

    Raises:
        `ValueError`: If `adapters` is not of shape `[n, P]`.
    """
    _check(layout, adapters)
    total = torch.zeros(len(adapters), dtype=torch.float64, device=adapters.device)
    for factors in _factors(layout):
        a, b = factors.take(adapters)
        total += factors.scaling**2 * ((b.mT @ b) * (a @ a.mT)).sum((1, 2, 3))
    return total.clamp(min=0).sqrt()


def distances(layout: AdapterLayout, first: Tensor, second: Tensor) -> Tensor:
    """`||dW_i - dW_j||_F` of every adapter of one stack to every one of another.

    `||dW_i||^2 - 2 <dW_i, dW_j> + ||dW_j||^2` cancels for equal adapters: below 1e-7 of the norms a distance is rounding. Two fp32
    adapters that differ by a gauge are that far apart by their own rounding.

    Args:
        layout ([`AdapterLayout`]): Of all of them.
        first (`Tensor`): `[n, P]` flattened adapters.
        second (`Tensor`): `[m, P]`.

    Returns:
        `Tensor`: `[n, m]`, in double precision.

    Raises:
        `ValueError`: If a stack is not of shape `[n, P]`.
    """
    squares = norms(layout, first).square()[:, None] + norms(layout, second).square() - 2 * inner_products(layout, first, second)
    return squares.clamp(min=0).sqrt()


def relative_error(layout: AdapterLayout, generated: Tensor, reference: Tensor) -> Tensor:
    """`||dW_g - dW_r||_F / ||dW_r||_F`: 0 for the same function, 1 for an adapter that does nothing; see [`distances`].

    Args:
        layout ([`AdapterLayout`]): Of all of them.
        generated (`Tensor`): `[n, P]` flattened adapters.
        reference (`Tensor`): `[m, P]`.

    Returns:
        `Tensor`: `[n, m]`, in double precision; infinite for a reference of norm 0, unless the generated one is 0 too.

    Raises:
        `ValueError`: If a stack is not of shape `[n, P]`.

    Example:

    ```python
    >>> from peft_icm import ICMGenerator, bundled_generator
    >>> generator = ICMGenerator.from_pretrained(bundled_generator("text"))
    >>> adapter = generator.sample(generator.task_vector("continue a Shakespeare play"), temperature=0.0)
    >>> round(relative_error(generator.layout, 0 * adapter, adapter).item(), 3)
    1.0

    ```
    """
    distance = distances(layout, generated, reference)
    return torch.where(distance == 0, distance, distance / norms(layout, reference))


def cosine(layout: AdapterLayout, generated: Tensor, reference: Tensor) -> Tensor:
    """`<dW_g, dW_r>_F / (||dW_g||_F ||dW_r||_F)`, over all modules at once.

    Args:
        layout ([`AdapterLayout`]): Of all of them.
        generated (`Tensor`): `[n, P]` flattened adapters.
        reference (`Tensor`): `[m, P]`.

    Returns:
        `Tensor`: `[n, m]` in [-1, 1], in double precision; 0 where one of the two has norm 0.

    Raises:
        `ValueError`: If a stack is not of shape `[n, P]`.
    """
    scale = norms(layout, generated)[:, None] * norms(layout, reference)
    products = inner_products(layout, generated, reference)
    return torch.where(scale == 0, 0.0, products / scale).clamp(-1, 1)


# ---------------------------------------------------------------------- on folders
def compare_adapters(generated: str | Path, reference: str | Path, **hub_kwargs: Any) -> dict[str, float]:
    """[`relative_error`] and [`cosine`] of two saved PEFT adapters.

    Args:
        generated (`str` or `Path`): A folder or a Hub id.
        reference (`str` or `Path`): The same; its norm is the unit of the error.
        **hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, for both.

    Returns:
        `dict[str, float]`: `relative_error` and `cosine`.

    Raises:
        `ValueError`: If one of them is no safetensors LoRA, or their layouts differ; dtypes may.
        `OSError`: If one of them is neither a folder nor on the Hub.

    Example:

    ```python
    >>> import tempfile
    >>> from peft_icm import ICMGenerator, bundled_generator, save_adapter
    >>> folder = tempfile.mkdtemp()
    >>> generator = ICMGenerator.from_pretrained(bundled_generator("text"))
    >>> for name in ("play", "novel"):
    ...     _ = save_adapter(generator.generate_adapter(f"continue a {name}"), f"{folder}/{name}")
    >>> sorted(compare_adapters(f"{folder}/play", f"{folder}/novel"))
    ['cosine', 'relative_error']

    ```
    """
    layout, first = _load(generated, **hub_kwargs)
    other, second = _load(reference, **hub_kwargs)
    if layout.fingerprint != other.fingerprint:
        raise ValueError(f"{generated} has another layout than {reference}: {other.difference(layout)}. Compare adapters of one layout.")
    return {
        "relative_error": relative_error(layout, first[None], second[None]).item(),
        "cosine": cosine(layout, first[None], second[None]).item(),
    }


def _load(adapter: str | Path, **hub_kwargs: Any) -> tuple[AdapterLayout, Tensor]:
    folder = resolve(str(adapter), allow_patterns=ADAPTER_FILES, **hub_kwargs)
    layout = AdapterLayout.from_pretrained(folder)
    return layout, layout.flatten(load_file(folder / "adapter_model.safetensors"))
