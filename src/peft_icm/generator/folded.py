"""A small generator as few products: what is constant in it is multiplied out once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .condition_space import ConditionSpace
from .networks import ContextAttention, PrincipalNetwork
from .statistics import Statistics

LARGEST = 2**26  # bytes of U, of which there are two then


class Folded:
    """The decoder of a `"principal"` generator in fp32, by the numbers that its parts have when it is made.

    Condition space, statistics, context and the layer behind them are affine but for the softmax over the T tasks: one map of the task
    vector gives its logits and what passes it by, another one adds what it chooses. Scale, deviation and mean of the adapters are in U and
    c, and c is the last row of U.
    """

    @torch.no_grad()
    def __init__(self, network: PrincipalNetwork, statistics: Statistics, space: ConditionSpace | None, context: ContextAttention | None):
        parts = [each for each in (network.condition, network.decoder, statistics, space, context) if each is not None]
        modules = [network, *(module for part in parts for module in part.modules())]
        self._registers = [tensors for module in modules for tensors in (module._parameters, module._buffers) if tensors]
        self._memory = [tensor.detach() for tensors in self._registers for tensor in tensors.values() if tensor is not None]
        self._state = self._now()
        self.vector_map, self.offset, self.chosen = _condition_maps(network.condition, statistics, space, context)
        self.perceptron = network.decoder
        weight, output = network.decoder.input.weight, network.decoder.output
        of_latent, of_heard = weight.split([weight.shape[1] - len(network.condition.weight), len(network.condition.weight)], dim=1)
        self.of_latent, self.of_heard = of_latent.T.contiguous(), of_heard.T.contiguous()
        self.output, self.output_bias = F.pad(output.weight.T, (0, 1)), F.pad(output.bias, (0, 1), value=1.0)
        mean, std = statistics.spread()
        self.columns = torch.cat([network.basis * network.scale[:, None], network.center[None]]).mul_(std)
        self.columns[-1] += mean

    def _now(self) -> list[tuple[int, int]] | None:
        """Address, which `_memory` keeps from being given away, and number of writes of each tensor."""
        try:
            return [(part.data_ptr(), part._version) for tensors in self._registers for part in tensors.values() if part is not None]
        except RuntimeError:  # of inference mode: its tensors do not count
            return None

    def holds(self) -> bool:
        """Whether the parts have these numbers still: none was trained, loaded, moved or replaced. What is written through a tensor's
        `.data` is not seen."""
        return self._state is not None and self._state == self._now()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a generator, or one from a pickle, makes its own."""
        return type(None), ()

    def writer(self, latent: Tensor, condition: Tensor) -> Callable[[int, Tensor], Tensor]:
        """As [`LinearDecoder.writer`], of z `[B, k]` and task vectors `[B, d]`; without gradients."""
        z, v = latent.to(self.columns), condition.to(self.columns)
        v = v[:1] if v.stride(0) == 0 else v  # of many samples of one task
        passing, logits = torch.addmm(self.offset, v, self.vector_map).split([len(self.of_heard), len(self.chosen)], dim=1)
        heard = F.gelu(torch.addmm(passing, logits.softmax(-1), self.chosen))
        x = F.gelu(torch.addmm(torch.addmm(self.perceptron.input.bias, heard, self.of_heard), z, self.of_latent))
        x = x + F.gelu(self.perceptron.block(self.perceptron.norm(x)))
        coordinates = torch.addmm(self.output_bias, x, self.output)
        return lambda first, out: torch.mm(coordinates, self.columns[:, first : first + out.shape[1]], out=out)


def _condition_maps(
    layer: nn.Linear, statistics: Statistics, space: ConditionSpace | None, context: ContextAttention | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`[d, h + T]` and `[h + T]` of the first map, `[T, h]` of the second; T is 0 without a context."""
    weight: Tensor = layer.weight
    bias: Tensor = layer.bias
    chosen = weight.new_zeros(0, len(weight))
    if context is not None:
        keys = context.key(context.conditions) / context.key.out_features**0.5
        chosen = context.value(context.latents) @ (weight @ context.output.weight).T
        weight, bias = torch.cat([weight, keys @ context.query.weight]), torch.cat([bias, keys @ context.query.bias])
    scaled, mean = (weight / statistics.condition_std).T.contiguous(), statistics.condition_mean
    if space is None:
        return scaled, bias - mean @ scaled, chosen
    return space.projection @ scaled, bias - (space.center @ space.projection + mean) @ scaled, chosen


def folded(
    kept: Folded | None, network: nn.Module, statistics: Statistics, space: ConditionSpace | None, context: ContextAttention | None
) -> Folded | None:
    """The one that is kept while it holds, else a new one.

    Args:
        kept ([`Folded`], *optional*): That of an earlier call.
        network, statistics, space, context: Of the generator.

    Returns:
        [`Folded`], *optional*: `None` of a generator that is large, not in fp32, of another architecture, or made in inference mode.
    """
    if kept is not None and kept.holds():
        return kept
    if not isinstance(network, PrincipalNetwork) or network.basis.dtype != torch.float32 or network.basis.nbytes > LARGEST:
        return None
    if network.basis.is_inference():
        return None
    made = Folded(network, statistics, space, context)
    return made if made.holds() else None
