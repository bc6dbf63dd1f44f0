"""What the decoder of a `"principal"` generator hears in task vectors: a few products, since what is constant is multiplied out once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .condition_space import ConditionSpace
from .kept import Kept
from .networks import ContextAttention
from .statistics import Statistics


class Heard:
    """Task vectors `[B, d]` -> `condition(context(normalised v))` `[B, h]`, in fp32 and without gradients.

    Condition space, statistics, context and the linear layer are affine but for the softmax over the T tasks: one map gives its logits
    and what passes by, another one adds what it chooses.
    """

    def __init__(self) -> None:
        self._kept = Kept()

    def __call__(
        self, v: Tensor, space: ConditionSpace | None, statistics: Statistics, context: ContextAttention | None, layer: nn.Linear
    ) -> Tensor:
        """Those of a generator: they may have been trained, moved or replaced since the last call."""
        made_of = [statistics.condition_mean, statistics.condition_std, layer.weight, layer.bias]
        if space is not None:
            made_of += [space.center, space.projection]
        if context is not None:
            made_of += [part for each in (context.query, context.key, context.value) for part in (each.weight, each.bias)]
            made_of += [context.output.weight, context.conditions, context.latents]
        offset, projection, values = self._kept(lambda: _fold(space, statistics, context, layer), *made_of)
        found = torch.addmm(offset, v, projection)
        passing, logits = found.split([len(layer.weight), len(values)], dim=1)
        return torch.addmm(passing, logits.softmax(-1), values)


def _fold(
    space: ConditionSpace | None, statistics: Statistics, context: ContextAttention | None, layer: nn.Linear
) -> tuple[Tensor, Tensor, Tensor]:
    """`[h + T]` and `[d, h + T]` of the first map, `[T, h]` of the second."""
    weight, bias, values = layer.weight, layer.bias, layer.weight.new_zeros(0, len(layer.weight))
    if context is not None:
        keys = context.key(context.conditions) / context.key.out_features**0.5
        weight, bias = torch.cat([weight, keys @ context.query.weight]), torch.cat([bias, keys @ context.query.bias])
        values = layer.weight @ context.output.weight @ context.value(context.latents).T
    scaled, mean = weight.T / statistics.condition_std, statistics.condition_mean
    if space is None:
        return bias - mean @ scaled, scaled.contiguous(), values.T.contiguous()
    return bias - (space.center @ space.projection + mean) @ scaled, space.projection @ scaled, values.T.contiguous()
