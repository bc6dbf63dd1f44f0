"""Examples of tasks as a base reads them: put into one batch, and scored one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def collate(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack samples; answers and texts of different lengths are padded at the end, labels with -100, which is no target.

    Args:
        samples (`Sequence[dict[str, Tensor]]`): With the same names; what has one dimension may have another length in each.

    Returns:
        `dict[str, Tensor]`

    Example:

    ```python
    >>> collate([{"labels": torch.tensor([5, 6])}, {"labels": torch.tensor([7])}])["labels"]
    tensor([[   5,    6],
            [   7, -100]])

    ```
    """
    columns = {name: [torch.as_tensor(sample[name]) for sample in samples] for name in samples[0]}
    return {
        name: torch.stack(rows)
        if rows[0].ndim != 1
        else pad_sequence(rows, batch_first=True, padding_value=-100 if name == "labels" else 0)
        for name, rows in columns.items()
    }


def example_losses(base: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What a base makes of each example of a batch.

    Args:
        base (`PreTrainedModel`): A causal language model, or an encoder-decoder.
        inputs (`dict[str, Tensor]`): As it takes them, with `labels` `[B, T]`, -100 where nothing is to be said.

    Returns:
        `tuple[Tensor, Tensor]`: Nats `[B]`, summed over the targets, and the number of targets `[B]`.

    Raises:
        `ValueError`: If there are no labels, or the base gives no logits.
    """
    if "labels" not in inputs:
        raise ValueError(f"An example has {', '.join(inputs)} and no labels: nothing can be learnt from it.")
    labels = inputs["labels"]
    if base.config.is_encoder_decoder:
        outputs = base(**inputs)
    else:
        outputs = base(**{name: value for name, value in inputs.items() if name != "labels"})
        labels = labels[:, 1:]
    logits = getattr(outputs, "logits", None)
    if logits is None:
        raise ValueError(f"A {type(base).__name__} gives no logits: pass a base with a language modelling head.")
    logits = logits[:, : labels.shape[1]].float()
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
    return losses.view(labels.shape).sum(1), (labels != -100).sum(1)
