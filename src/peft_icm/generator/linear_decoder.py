"""The linear half of a decoder, `l = c + a U`: whole, or some columns at a time, with U in floating point or in 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .configuration_icm import ICMConfig
from .statistics import Statistics

BLOCK = 2**21  # numbers that are worked on at once: they stay in a processor's cache


class LinearDecoder(nn.Module):
    """`l = c + a U` with c `[P]` (`center`) and U `[R, P]` (`basis`).

    With `basis_dtype="int8"` U is kept as int8 codes with one scale a row, `row_scale` `[R]`, and is turned to fp32 some columns at a time.
    Not by torchao: it has a scale for each row of a Linear's weight, which here are the P numbers of an adapter and not the R components.
    """

    center: nn.Parameter
    basis: nn.Parameter
    row_scale: Tensor

    def start(self, config: ICMConfig, deviation: float, trained: bool) -> None:
        """Make the parameters of a new decoder.

        Args:
            config ([`ICMConfig`]): Of the generator.
            deviation (`float`): Of U, which begins as noise.
            trained (`bool`): Whether they take gradients; in 8 bits U does not.
        """
        eight_bits = config.basis_dtype == "int8"
        shape = (config.num_components or 0, config.adapter_layout.numel)
        basis = torch.randn(shape, dtype=torch.bfloat16 if eight_bits else None).mul_(deviation)
        self.center = nn.Parameter(torch.zeros(shape[1]), requires_grad=trained)
        self.basis = nn.Parameter(basis, requires_grad=trained and not eight_bits)
        if eight_bits:
            self.quantize()

    def quantize(self) -> None:
        """Turn U, in floating point, to 8 bits."""
        codes, scale = to_int8(self.basis)
        self.basis = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("row_scale", scale)

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

    def columns(self) -> Iterator[tuple[slice, Tensor]]:
        """The columns of U and which they are: all, or of 8 bits some at a time, in fp32."""
        if self.basis.is_floating_point():
            yield slice(None), self.basis
            return
        step = max(1, BLOCK // len(self.basis))
        for first in range(0, self.basis.shape[1], step):
            part = slice(first, first + step)
            yield part, self.basis[:, part] * self.row_scale[:, None]

    def combine(self, coordinates: Tensor) -> Tensor:
        """`[B, R]` -> normalised `[B, P]`, differentiable."""
        return torch.addmm(self.center, coordinates, self.rows.to(coordinates.dtype))

    @torch.no_grad()
    def writer(self, coordinates: Tensor, statistics: Statistics) -> Callable[[int, Tensor], Tensor]:
        """What writes columns of adapters in their own units, so that nothing of the size of an adapter is made beside it.

        Args:
            coordinates (`Tensor`): `[B, R]` of the adapters.
            statistics ([`Statistics`]): Their units.

        Returns:
            `Callable[[int, Tensor], Tensor]`: Takes the first column, where a tensor begins, and `[B, n]` fp32 to write; returns that.
        """
        (mean, std), piece = statistics.units(), statistics.piece
        if not self.basis.is_floating_point():
            coordinates = coordinates.float() * self.row_scale
        step = max(1, BLOCK // (len(coordinates) + len(self.basis)) // piece) * piece

        def write(first: int, out: Tensor) -> Tensor:
            for part in out.split(step, 1):
                last = first + part.shape[1]
                center, basis = (columns[..., first:last].to(coordinates.dtype) for columns in (self.center, self.basis))
                if coordinates.dtype == part.dtype:
                    torch.addmm(center, coordinates, basis, out=part)
                else:
                    part.copy_(torch.addmm(center, coordinates, basis))
                places = slice(first // piece, last // piece)
                part.unflatten(1, (-1, piece)).mul_(std[places]).add_(mean[places])  # addcmul is five times as slow where it broadcasts
                first = last
            return out

        return write


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
