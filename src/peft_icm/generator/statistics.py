"""Statistics: the units of adapters and task vectors."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..adapters.snapshots import SnapshotMatrix

PIECE = 2**14  # the most numbers that one mean and deviation are looked up for together


class Statistics(nn.Module):
    """Mean and standard deviation of each tensor of the layout and of the task vectors, pooled over the training collection.

    Persistent buffers that stay in fp32 whatever the weights are cast to: `mean`, `std` `[num_tensors]`, `condition_mean` `[d]` and
    `condition_std` `[]`. A tensor of zero variance gets a standard deviation of one.

    Args:
        sizes (`list[int]`): Elements of each tensor of the layout.
        condition_dim (`int`): d.
        each (`bool`, defaults to `False`): Whether each number of a task vector has a deviation of its own, `condition_std` `[d]`. A number
            that is exactly 0 says nothing then, and is taken for the mean: what a request leaves out.
    """

    mean: Tensor
    std: Tensor
    condition_mean: Tensor
    condition_std: Tensor

    def __init__(self, sizes: list[int], condition_dim: int, each: bool = False):
        super().__init__()
        self.sizes, self.each = sizes, each
        self.piece = math.gcd(PIECE, *sizes)
        self.register_buffer("mean", torch.zeros(len(sizes), dtype=torch.float32))
        self.register_buffer("std", torch.ones(len(sizes), dtype=torch.float32))
        self.register_buffer("condition_mean", torch.zeros(condition_dim, dtype=torch.float32))
        self.register_buffer("condition_std", torch.ones(condition_dim if each else (), dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Statistics:
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    @torch.no_grad()
    def fit(self, parameters: Tensor | SnapshotMatrix, conditions: Tensor) -> None:
        """Pool the statistics over snapshots `[N, P]`, in one pass over them, and task vectors `[M, d]`."""
        sizes = torch.tensor(self.sizes)
        count, mean, squares = 0, torch.zeros(len(sizes), dtype=torch.float64), torch.zeros(len(sizes), dtype=torch.float64)
        for _, block in SnapshotMatrix.of(parameters).rows("statistics"):  # blocks are put together as by Chan et al. (1979)
            parts = block.split(self.sizes, dim=1)
            sums = torch.stack([part.sum(1).double().sum() for part in parts])
            variances = torch.stack([part.var(correction=0) for part in parts])
            step, total = sums / (len(block) * sizes) - mean, count + len(block)
            squares += (variances * len(block) + step.square() * count * len(block) / total) * sizes
            mean += step * len(block) / total
            count = total
        std = (squares / (count * sizes)).sqrt()
        varies = std > 1e-6 * mean.abs()  # below it lies the rounding of numbers that are equal
        self.mean.copy_(mean)
        self.std.copy_(torch.where(varies, std, torch.ones_like(std)))
        self.fit_conditions(conditions)

    @torch.no_grad()
    def fit_conditions(self, conditions: Tensor) -> None:
        """Pool the statistics of task vectors `[M, d]` alone: adapters keep their units."""
        rows = conditions.float()
        if self.each:
            said = rows != 0
            count = said.sum(0).clamp(min=1)
            self.condition_mean.copy_(rows.sum(0) / count)
            std = (((rows - self.condition_mean) * said).square().sum(0) / count).sqrt()
        else:
            self.condition_mean.copy_(rows.mean(0))
            std = (rows - self.condition_mean).std(correction=0)
        self.condition_std.copy_(torch.where(std > 0, std, torch.ones_like(std)))

    def spread(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every coordinate, `[P]` each."""
        sizes = torch.tensor(self.sizes, device=self.mean.device)
        total = sum(self.sizes)  # given, because a tensor on the meta device cannot tell it
        return self.mean.repeat_interleave(sizes, output_size=total), self.std.repeat_interleave(sizes, output_size=total)

    def normalize(self, parameters: Tensor) -> Tensor:
        """`[..., P]` in the units of the adapters -> zero mean, unit variance for each tensor, fp32."""
        mean, std = self.spread()
        return (parameters.float() - mean) / std

    def units(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation for each `piece` numbers in turn, all of them of one tensor: `[P / piece, 1]` each."""
        counts = torch.tensor([size // self.piece for size in self.sizes], device=self.mean.device)
        both = torch.stack([self.mean, self.std]).repeat_interleave(counts, 1, output_size=sum(self.sizes) // self.piece)
        return both[0, :, None], both[1, :, None]

    def denormalize(self, parameters: Tensor) -> Tensor:
        """The inverse of [`~Statistics.normalize`]; fp32."""
        mean, std = self.units()
        return (parameters.float().unflatten(-1, (len(mean), -1)) * std + mean).flatten(-2)

    def normalize_condition(self, condition: Tensor) -> Tensor:
        """`[..., d]` task vectors -> zero mean, pooled unit variance (or that of each number), fp32."""
        normal = (condition.float() - self.condition_mean) / self.condition_std
        return normal * (condition != 0) if self.each else normal
