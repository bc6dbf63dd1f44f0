"""A LoRA of its own for each sample of a batch, on a base that stays as it is."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .layout import AdapterLayout


class PerSampleLora:
    r"""Adds `s B_b A_b x` to what each target of a base gives for sample b: `[B, P]` adapters work on a batch of B at once.

    Equal to what peft computes for each sample with its adapter alone, and differentiable in the adapters. Two batched products in a
    forward hook of each target; the base's weights are read, never written, and need no gradient.
    Where a module sees more rows than the batch has samples - windows of a picture, tokens in one row - those of a sample lie together, as
    transformers' models keep them.

    With gradient checkpointing a layer runs once more in the backward pass: the adapters in use then must be those of its forward pass, and
    `use_reentrant=False`, as adapters are no input of the layer.

    Args:
        base (`nn.Module`): The base model, without an adapter.
        layout (`AdapterLayout`): Of the adapters; its targets must be `nn.Linear` or transformers' `Conv1D`.

    Raises:
        `ValueError`: If the base does not fit the layout, or a target is no linear layer.

    Example:

    ```python
    >>> from peft import LoraConfig, get_peft_model
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    >>> model = get_peft_model(LlamaForCausalLM(small), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    >>> layout, base = AdapterLayout.from_peft_model(model), model.unload()
    >>> with PerSampleLora(base, layout) as lora:
    ...     lora.use(torch.randn(3, layout.numel))
    ...     base(input_ids=torch.zeros(3, 5, dtype=torch.long)).logits.shape
    torch.Size([3, 5, 64])

    ```
    """

    def __init__(self, base: nn.Module, layout: AdapterLayout):
        layout.check_base(base)
        self.layout, self.count = layout, 0
        self._found: dict[str, tuple[Tensor, Tensor]] = {}
        modules = dict(base.named_modules())
        for name in layout.modules:
            if not isinstance(modules[name], nn.Linear | Conv1D):
                kind = type(modules[name]).__name__
                raise ValueError(f"{name} is a {kind}: adapters of a batch work on linear layers alone, take it out of target_modules.")
        self._hooks = [modules[name].register_forward_hook(self._hook(name)) for name in layout.modules]

    def use(self, adapters: Tensor | None) -> None:
        """Choose the adapters of the next forward passes.

        Args:
            adapters (`Tensor`, *optional*): `[B, P]` for a batch of B samples, or `[1, P]` for all of them; `None` for the base as it is.

        Raises:
            `ValueError`: If the vectors are not of the layout's length.
        """
        self._found = {}
        if adapters is None:
            return
        if adapters.ndim != 2 or adapters.shape[1] != self.layout.numel:
            raise ValueError(f"Expected adapters of shape (B, {self.layout.numel}), found {tuple(adapters.shape)}.")
        self.count = len(adapters)
        parts = [
            part.view(self.count, *shape) for part, shape in zip(adapters.split(self.layout.sizes, dim=1), self.layout.shapes, strict=True)
        ]
        # In natural order the A of a module stands before its B.
        for name, scale, a, b in zip(self.layout.modules, self.layout.scales, parts[::2], parts[1::2], strict=True):
            self._found[name] = (a.transpose(1, 2), scale * b.transpose(1, 2))

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if name not in self._found:
                return output
            a, b = self._found[name]
            x = inputs[0]
            rows = x.reshape(self.count, -1, x.shape[-1]).to(a.dtype)
            return output + torch.bmm(torch.bmm(rows, a), b).view(output.shape).to(output.dtype)

        return add

    def remove(self) -> None:
        """Take the hooks off: the base is as it was."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()
