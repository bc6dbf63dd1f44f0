"""The linear half of a decoder, `l = c + a U`: whole, or some columns at a time, with U in floating point or in 8 bits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .configuration_icm import ICMConfig


class LinearDecoder(nn.Module):
    """`l = c + a U` with c `[P]` (`center`) and U `[R, P]` (`basis`).

    With `basis_dtype="int8"` U is kept as int8 codes with one scale a row, `row_scale` `[R]`, and is turned to fp32 some columns at a time.
    Not by torchao: it has a scale for each row of a Linear's weight, which here are the P numbers of an adapter and not the R components.
    """

    center: nn.Parameter
    basis: nn.Parameter
    row_scale: Tensor

    def start(self, config: ICMConfig, basis: Tensor, trained: bool) -> None:
        """Make the parameters of a new decoder; what is trained or estimated is never of 8 bits.

        Args:
            config ([`ICMConfig`]): Of the generator.
            basis (`Tensor`): `[R, P]`, its first values.
            trained (`bool`): Whether they take gradients.
        """
        self.center = nn.Parameter(torch.zeros(basis.shape[1]), requires_grad=trained)
        if config.basis_dtype == "int8":
            codes, scale = to_int8(basis)
            self.basis = nn.Parameter(codes, requires_grad=False)
            self.register_buffer("row_scale", scale)
        else:
            self.basis = nn.Parameter(basis, requires_grad=trained)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LinearDecoder:
        """The scales stay in fp32 whatever the rest is cast to: fp16 has too few digits for those of a large adapter."""
        scale = self._buffers.get("row_scale")
        super()._apply(fn, recurse)
        if scale is not None:
            self.row_scale = scale.to(fn(scale).device)
        return self

    @property
    def rows(self) -> Tensor:
        """U in floating point, `[R, P]`: the parameter itself, or of 8 bits an fp32 copy, four times its size."""
        return self.basis if self.basis.is_floating_point() else self.basis * self.row_scale.float()[:, None]

    def combine(self, coordinates: Tensor) -> Tensor:
        """`[B, R]` -> normalised `[B, P]`, differentiable."""
        return torch.addmm(self.center, coordinates, self.rows.to(coordinates.dtype))

    @torch.no_grad()
    def write(self, coordinates: Tensor, first: int, mean: Tensor, std: Tensor, out: Tensor) -> None:
        """Write some columns of the adapters, in their own units.

        Mean and deviation go into these columns of U where that is less work than into those of the result.

        Args:
            coordinates (`Tensor`): `[B, R]`.
            first (`int`): The first column.
            mean (`Tensor`): `[n / p, 1]`, one for p columns.
            std (`Tensor`): `[n / p, 1]`.
            out (`Tensor`): `[B, n]` fp32.
        """
        columns, pieces = slice(first, first + out.shape[1]), (len(mean), -1)
        center, basis = self.center[columns], self.basis[:, columns]
        if not basis.is_floating_point():
            coordinates, center, basis = coordinates.float() * self.row_scale.float(), center.float(), basis.float()
        if basis.dtype == torch.float32 and len(basis) < 3 * len(coordinates):  # one pass over U against three over the result
            folded = basis.new_empty(len(basis) + 1, basis.shape[1])
            torch.mul(basis.unflatten(1, pieces), std, out=folded[:-1].unflatten(1, pieces))
            torch.mul(center.unflatten(0, pieces), std, out=folded[-1].unflatten(0, pieces)).add_(mean)
            torch.mm(torch.cat([coordinates, coordinates.new_ones(len(coordinates), 1)], dim=1), folded, out=out)
        else:
            if basis.dtype == torch.float32:
                torch.addmm(center, coordinates, basis, out=out)
            else:
                out.copy_(torch.addmm(center, coordinates, basis))
            out.unflatten(1, pieces).mul_(std).add_(mean)  # addcmul is five times as slow where it broadcasts


@torch.no_grad()
def to_int8(basis: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a basis in 8 bits, a row at a time.

    Args:
        basis (`Tensor`): `[R, P]` in floating point.

    Returns:
        `tuple[Tensor, Tensor]`: `[R, P]` int8 from -127 to 127, and `[R]` fp32, which bf16 holds exactly.
    """
    codes, scales = torch.empty_like(basis, dtype=torch.int8), basis.new_ones(len(basis), dtype=torch.float32)
    for row, found, scale in zip(basis, codes, scales, strict=True):
        low, high = row.aminmax()
        largest = torch.maximum(-low, high).float()
        scale.copy_(torch.where(largest > 0, largest / 127, torch.ones_like(largest)).bfloat16())
        found.copy_((row.float() / scale).round_().clamp_(-127, 127))
    return codes, scales
