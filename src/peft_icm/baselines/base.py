"""What every source of adapters has in common, and how many bytes each one keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ..adapter_layout import AdapterLayout
from ..generation import Generators


class AdapterSource(Protocol):
    """The side of an [`ICMGenerator`] that a comparison needs: a condition in, adapters out.

    Attributes:
        layout ([`AdapterLayout`]): Of the adapters.
    """

    layout: AdapterLayout

    def sample(self, condition: Tensor, num_samples: int = 1, generator: Generators = None, temperature: float = 1.0) -> Tensor:
        """Adapters for task vectors, as [`ICMGenerator.sample`]; a source without chance has no use for `generator`, `temperature`.

        Args:
            condition (`Tensor`): `[d]` or `[n, d]` task vectors.
            num_samples (`int`, defaults to 1): Adapters for each task vector.
            generator (`torch.Generator` or a list of them, *optional*): One for all, or one for each adapter.
            temperature (`float`, defaults to 1.0): Factor on the noise.

        Returns:
            `Tensor`: `[n * num_samples, P]` fp32; the samples of one task vector stand together.
        """
        ...


class StoredSource(AdapterSource, Protocol):
    """A source that is no module and knows its own size.

    Attributes:
        nbytes (`int`): See [`stored_bytes`].
    """

    @property
    def nbytes(self) -> int:
        """Bytes that have to be kept to go on answering."""
        ...


def stored_bytes(source: StoredSource | nn.Module) -> int:
    """Bytes that have to be kept to go on answering.

    Args:
        source (`StoredSource` or `nn.Module`): Task vectors that are looked up count too. Of a module, such as an [`ICMGenerator`], every
            tensor of the state dict counts.

    Returns:
        `int`

    Example:

    ```python
    >>> stored_bytes(torch.nn.Linear(3, 2))
    32

    ```
    """
    if isinstance(source, nn.Module):
        return sum(tensor_bytes(tensor) for tensor in source.state_dict().values())
    return source.nbytes


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of the elements of a tensor."""
    return tensor.numel() * tensor.itemsize


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
        `ValueError`: If the shape, `num_samples` or `temperature` does not fit.
    """
    rows = condition[None] if condition.ndim == 1 else condition
    if rows.ndim != 2 or (dim is not None and rows.shape[1] != dim):
        raise ValueError(f"Expected task vectors of shape (n, {dim or 'd'}), found {tuple(condition.shape)}.")
    if temperature < 0 or num_samples < 1:
        raise ValueError(f"temperature={temperature} must be >= 0 and num_samples={num_samples} >= 1.")
    return rows.repeat_interleave(num_samples, 0)


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
        `ValueError`: If a list does not have one generator for each row.
    """
    if isinstance(generator, Sequence):
        if len(generator) != count:
            raise ValueError(f"Expected one torch.Generator or {count}, found {len(generator)}.")
        return torch.stack([torch.randn(size, generator=g, device=g.device).to(device) for g in generator])
    drawn_on = device if generator is None else generator.device
    return torch.randn(count, size, generator=generator, device=drawn_on).to(device)
