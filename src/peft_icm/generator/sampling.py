"""What every source of adapters does before it samples: check its arguments, repeat the conditions, draw z."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None


def as_conditions(condition: Tensor, num_samples: int, temperature: float, dim: int | None = None) -> Tensor:
    """Check the arguments of `sample` and repeat the task vectors.

    Args:
        condition (`Tensor`): `[d]` or `[n, d]`.
        num_samples (`int`): Adapters for each.
        temperature (`float`): Factor on the noise.
        dim (`int`, *optional*): d; not checked where it is not given.

    Returns:
        `Tensor`: `[n * num_samples, d]`.

    Raises:
        `ValueError`: If the task vectors are no finite real numbers, or the shape, `num_samples` or `temperature` does not fit.
    """
    if not isinstance(condition, Tensor):
        raise ValueError(f"Expected task vectors as a torch.Tensor, found {type(condition).__name__}.")
    rows = condition[None] if condition.ndim == 1 else condition
    if rows.ndim != 2 or not len(rows) or (dim is not None and rows.shape[1] != dim):
        raise ValueError(f"Expected task vectors of shape (n, {dim or 'd'}), found {tuple(condition.shape)}.")
    if condition.is_complex() or condition.dtype == torch.bool or not condition.isfinite().all():
        raise ValueError(f"Expected task vectors of finite real numbers, found NaN, infinite or other values of {condition.dtype}.")
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not math.isfinite(temperature) or temperature < 0:
        raise ValueError(f"temperature={temperature!r} must be a finite number >= 0.")
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"num_samples={num_samples!r} must be an integer >= 1.")
    return rows[:, None].expand(-1, num_samples, -1).flatten(0, 1)  # of one task vector without a copy


def draw_noise(count: int, size: int, generator: Generators, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal noise: a row for each adapter, the same for the same seed, alone or in a batch.

    Args:
        count (`int`): Rows.
        size (`int`): Numbers in each.
        generator (`torch.Generator` or a list of them, *optional*): One for all, or one for each row.
        device (`torch.device` or `str`, defaults to `"cpu"`): Where the noise is wanted.

    Returns:
        `Tensor`: `[count, size]` fp32.

    Raises:
        `ValueError`: If `generator` is neither a `torch.Generator` nor a list of one for each row.
    """
    given = generator if isinstance(generator, Sequence) else [] if generator is None else [generator]
    wrong = next((g for g in given if not isinstance(g, torch.Generator)), None)
    if isinstance(generator, str) or wrong is not None:
        raise ValueError(f"generator={generator!r} must be a torch.Generator or a list of them: torch.Generator().manual_seed(0).")
    if isinstance(generator, Sequence):
        if len(generator) != count:
            raise ValueError(f"Expected one torch.Generator or {count}, found {len(generator)}.")
        return torch.stack([torch.randn(size, generator=g, device=g.device).to(device) for g in generator])
    drawn_on = device if generator is None else generator.device
    return torch.randn(count, size, generator=generator, device=drawn_on).to(device)
