"""One gauge for LoRAs from elsewhere: BA is invariant under GL(r), the vector [A; B] is not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


def balanced_factors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The balanced factors of the product BA: `B' = U sqrt(S)`, `A' = sqrt(S) V^T` of its singular value decomposition.

    Singular values stand in falling order; the largest entry of each column of B' is positive. The `[out, in]` product is never formed:
    two QR decompositions leave an r x r matrix.

    Args:
        a (`Tensor`): `[r, in]`.
        b (`Tensor`): `[out, r]`.

    Returns:
        `tuple[Tensor, Tensor]`: A' `[r, in]` and B' `[out, r]`, in the dtypes of `a` and `b`.

    Example:

    ```python
    >>> a, b = torch.randn(2, 5), torch.randn(7, 2)
    >>> new_a, new_b = balanced_factors(a, b)
    >>> torch.allclose(new_b @ new_a, b @ a, atol=1e-5)
    True

    ```
    """
    rank = a.shape[0]
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = s.sqrt()
    new_b = (q_b @ u) * root
    new_a = root[:, None] * (vt @ q_a.T)
    peak = new_b.gather(0, new_b.abs().argmax(0, keepdim=True)).sign()
    peak[peak == 0] = 1
    pad = rank - len(s)  # a module narrower than the rank has fewer singular values
    new_a = torch.nn.functional.pad(new_a * peak.T, (0, 0, 0, pad))
    new_b = torch.nn.functional.pad(new_b * peak, (0, pad))
    return new_a.to(a.dtype), new_b.to(b.dtype)


def canonicalize(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put every pair of LoRA matrices of an adapter into the balanced gauge; their products stay what they are.

    Args:
        state_dict (`Mapping[str, Tensor]`): Of a LoRA on linear, convolution or embedding modules.

    Returns:
        `dict[str, Tensor]`: The same keys and shapes.

    Raises:
        `ValueError`: If a matrix has no partner, or a value is not finite.
    """
    result = dict(state_dict)
    for key, partner in _pairs(state_dict):
        pieces = [balanced_factors(a, b) for a, b in _by_group(state_dict[key], state_dict[partner])]
        for name, parts in zip((key, partner), zip(*pieces, strict=True), strict=True):
            result[name] = torch.cat(parts).reshape(state_dict[name].shape)
    return result


def align(state_dict: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn every pair of LoRA matrices of an adapter as near to a reference's as its products allow.

    The balanced gauge fixes a basis by singular values, whose order changes from adapter to adapter. Here both are balanced first, and
    the basis is the orthogonal R that is best for A and B at once (Procrustes): `min ||RA - A_ref||^2 + ||BR^T - B_ref||^2`, with
    `R = UV^T` of the SVD of `A_ref A^T + B_ref^T B`. Adapters of one product become equal, adapters of near products stay near.

    Args:
        state_dict (`Mapping[str, Tensor]`): Of a LoRA on linear, convolution or embedding modules.
        reference (`Mapping[str, Tensor]`): The same keys and shapes; one for all adapters of a collection.

    Returns:
        `dict[str, Tensor]`: The same keys and shapes; the products BA do not change.

    Raises:
        `ValueError`: If a matrix has no partner, or a value is not finite.

    Example:

    ```python
    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <torch...>
    >>> a, b = torch.randn(2, 5), torch.randn(7, 2)
    >>> mix = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    >>> one = {"m.lora_A.weight": a, "m.lora_B.weight": b}
    >>> two = {"m.lora_A.weight": mix @ a, "m.lora_B.weight": b @ mix.inverse()}
    >>> torch.allclose(align(one, one)["m.lora_A.weight"], align(two, one)["m.lora_A.weight"], atol=1e-5)
    True

    ```
    """
    mine = canonicalize({key: tensor.double() for key, tensor in state_dict.items()})
    theirs = canonicalize({key: tensor.double() for key, tensor in reference.items()})
    for key, partner in _pairs(mine):
        pieces = []
        groups = zip(_by_group(mine[key], mine[partner]), _by_group(theirs[key], theirs[partner]), strict=True)
        for (a, b), (a_reference, b_reference) in groups:
            u, _, vt = torch.linalg.svd(a_reference @ a.T + b_reference.T @ b)
            rotation = u @ vt
            pieces.append((rotation @ a, b @ rotation.T))
        for name, parts in zip((key, partner), zip(*pieces, strict=True), strict=True):
            mine[name] = torch.cat(parts).reshape(mine[name].shape)
    return {key: mine[key].to(tensor.dtype) for key, tensor in state_dict.items()}


def _pairs(state_dict: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """The keys of A and B of each module."""
    for key, tensor in state_dict.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key} holds NaN or infinite values: train the adapter again.")
    for key in state_dict:
        for a, b in ((".lora_A", ".lora_B"), (".lora_embedding_A", ".lora_embedding_B")):
            if a in key:
                if (partner := key.replace(a, b)) not in state_dict:
                    raise ValueError(f"{key} has no partner {partner}.")
                yield key, partner


def _by_group(a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
    """`[r / g, in]` and `[out / g, r / g]` of each of g groups of a convolution; one group elsewhere."""
    groups = a.shape[0] // b.shape[1]
    return list(zip(a.flatten(1).chunk(groups), b.flatten(1).chunk(groups), strict=True))
