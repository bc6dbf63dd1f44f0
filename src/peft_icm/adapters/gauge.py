"""One gauge for LoRAs from elsewhere: BA is invariant under GL(r), the vector [A; B] is not."""

from __future__ import annotations

from collections.abc import Mapping

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
        state_dict (`Mapping[str, Tensor]`): Of a LoRA on linear or convolution modules.

    Returns:
        `dict[str, Tensor]`: The same keys and shapes.

    Raises:
        `ValueError`: If a matrix has no partner.
    """
    result = dict(state_dict)
    for key, a in state_dict.items():
        if ".lora_A" not in key:
            continue
        partner = key.replace(".lora_A", ".lora_B")
        if partner not in state_dict:
            raise ValueError(f"{key} has no partner {partner}.")
        b = state_dict[partner]
        new_a, new_b = balanced_factors(a.flatten(1), b.flatten(1))
        result[key], result[partner] = new_a.reshape(a.shape), new_b.reshape(b.shape)
    return result
