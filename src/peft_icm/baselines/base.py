"""What every source of adapters has in common, and how many bytes each one keeps."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from ..adapters.layout import AdapterLayout
from ..generator.sampling import Generators


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
    >>> stored_bytes(nn.Linear(3, 2))
    32

    ```
    """
    if isinstance(source, nn.Module):
        return sum(tensor_bytes(tensor) for tensor in source.state_dict().values())
    return source.nbytes


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of the elements of a tensor."""
    return tensor.numel() * tensor.itemsize
