"""Compression as a baseline: every task's LoRA is kept, in fewer bits or of a lower rank."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapters.collection import AdapterCollection
from ..adapters.gauge import balanced_factors
from ..adapters.layout import AdapterLayout
from ..generator.sampling import Generators
from .stored import StoredAdapters

Method = Literal["int8", "int4", "svd"]
GROUP = 64  # numbers that share one scale
LEVELS = {"int8": 127, "int4": 7}


class CompressedAdapters(StoredAdapters):
    """The final LoRA of the nearest task, compressed.

    `"int8"` and `"int4"`: symmetric, in groups of 64 numbers with one fp16 scale, their largest absolute value. `"svd"`: every product
    BA is cut to its leading singular directions, kept as balanced fp16 factors; a sample has the shapes of the layout, the directions
    that were cut are zeros. All is kept as it is counted in `nbytes`: int8 numbers, two int4 numbers to a byte, fp16 factors.

    Args:
        collection ([`AdapterCollection`]): With task vectors.
        method (`str`): `"int8"`, `"int4"` or `"svd"`.
        rank (`int`, *optional*): `"svd"` only: singular directions that are kept. Half the rank of each module by default.

    Raises:
        `ValueError`: If the method is unknown, or the rank does not fit the LoRA.

    Example:

    ```python
    >>> from peft_icm import AdapterCollection, AdapterLayout
    >>> layout = AdapterLayout(("m.lora_A.weight", "m.lora_B.weight"), ((2, 32), (32, 2)), "float32", {})
    >>> collection = AdapterCollection(layout, {"cats": torch.randn(4, 128)}, {}, {"cats": torch.ones(1, 2)})
    >>> [CompressedAdapters(collection, method).nbytes - 12 for method in ("int8", "int4", "svd")]  # 8 + 4: the task vector
    [132, 68, 128]

    ```
    """

    def __init__(self, collection: AdapterCollection, method: Method, rank: int | None = None):
        if method not in get_args(Method):
            raise ValueError(f"method={method!r} is unknown: choose one of {', '.join(get_args(Method))}.")
        if rank is not None and method != "svd":
            raise ValueError(f"rank={rank} is for method='svd': leave it out for {method!r}.")
        super().__init__(collection)
        self.method = method
        finals = torch.stack([collection.final(task).float() for task in self.tasks])
        if method == "svd":
            self.pairs = factor_pairs(self.layout, rank)
            self.factors = torch.stack([self._truncate(vector) for vector in finals])
        else:
            self.codes, self.scales = quantize(finals, method)

    def _answer(self, tasks: Tensor, generator: Generators, temperature: float) -> Tensor:
        if self.method == "svd":
            return torch.stack([self._restore(factors) for factors in self.factors[tasks]])
        return dequantize(self.codes[tasks], self.scales[tasks], self.method)[:, : self.layout.numel]

    def _stored(self) -> list[Tensor]:
        return [self.factors] if self.method == "svd" else [self.codes, self.scales]

    # ------------------------------------------------------------------ svd
    def _truncate(self, vector: Tensor) -> Tensor:
        """`[P]` -> the leading factors of each module, A then B, in one fp16 vector."""
        parts = [part.view(shape) for part, shape in zip(vector.split(self.layout.sizes), self.layout.shapes, strict=True)]
        kept: list[Tensor] = []
        for index_a, index_b, rank in self.pairs:
            a, b = balanced_factors(parts[index_a].flatten(1), parts[index_b].flatten(1))
            kept += [a[:rank].flatten(), b[:, :rank].flatten()]
        return torch.cat(kept).half()

    def _restore(self, factors: Tensor) -> Tensor:
        """The inverse of `_truncate`: `[P]` fp32, with zeros for what was cut."""
        parts = [torch.empty(0)] * len(self.layout.shapes)
        start = 0
        for index_a, index_b, rank in self.pairs:
            for index, rows in ((index_a, True), (index_b, False)):
                shape = self.layout.shapes[index]
                full = torch.zeros(shape).flatten(1)
                part = full[:rank] if rows else full[:, :rank]
                part.copy_(factors[start : start + part.numel()].view(part.shape))
                start += part.numel()
                parts[index] = full.flatten()
        return torch.cat(parts)


def factor_pairs(layout: AdapterLayout, rank: int | None) -> list[tuple[int, int, int]]:
    """Positions of A and B of each module in the layout, and the rank that is kept of it.

    Args:
        layout ([`AdapterLayout`]): Of the adapters.
        rank (`int`, *optional*): Half the rank of each module by default.

    Returns:
        `list[tuple[int, int, int]]`: (position of A, position of B, rank) for each module.

    Raises:
        `ValueError`: If there is nothing to cut from a module, or nothing would be left of it.
    """
    position = {key: index for index, key in enumerate(layout.keys)}
    pairs = []
    for key, index in position.items():
        if ".lora_A" not in key and ".lora_embedding_A" not in key:
            continue
        partner = key.replace(".lora_A", ".lora_B").replace(".lora_embedding_A", ".lora_embedding_B")
        full = layout.shapes[index][0]
        kept = full // 2 if rank is None else rank
        if full < 2:
            raise ValueError(f"method='svd' needs a LoRA of rank 2 or more, {key} has rank {full}: choose 'int8' or 'int4'.")
        if not 0 < kept < full:
            raise ValueError(f"rank={rank} must be between 1 and {full - 1}, {key} has rank {full}.")
        pairs.append((index, position[partner], kept))
    return pairs


def quantize(vectors: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """Round to 8 or 4 bits, symmetric about zero, with a scale for every 64 numbers.

    The scale that is kept is the group's largest absolute value and not the step, which is 7 to 127 times smaller and would leave
    fp16's normal range earlier.

    Args:
        vectors (`Tensor`): `[T, P]`.
        method (`str`): `"int8"` or `"int4"`.

    Returns:
        `tuple[Tensor, Tensor]`: Codes, int8 `[T, G, 64]` or two to a byte in uint8 `[T, G, 32]`, and fp16 scales `[T, G]`; P is padded with
        zeros to G groups.
    """
    levels = LEVELS[method]
    groups = F.pad(vectors.float(), (0, -vectors.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    scales = groups.abs().amax(2).half()
    # Rounded with the scale that is kept; a group of zeros has the scale 0, and any step will do for it.
    step = scales.float()[..., None] / levels
    codes = (groups / step.where(step > 0, torch.ones(()))).round().clamp(-levels, levels).to(torch.int8)
    if method == "int4":
        low, high = (codes + 8).to(torch.uint8).unflatten(2, (-1, 2)).unbind(3)
        codes = low | (high << 4)
    return codes, scales


def dequantize(codes: Tensor, scales: Tensor, method: str) -> Tensor:
    """The inverse of [`quantize`], up to rounding.

    Args:
        codes (`Tensor`): int8 `[n, G, 64]` or uint8 `[n, G, 32]`.
        scales (`Tensor`): `[n, G]` fp16.
        method (`str`): `"int8"` or `"int4"`.

    Returns:
        `Tensor`: `[n, 64 G]` fp32.
    """
    if method == "int4":
        codes = torch.stack([codes & 15, codes >> 4], dim=3).flatten(2).to(torch.int8) - 8
    return (codes.float() * (scales.float()[..., None] / LEVELS[method])).flatten(1)
