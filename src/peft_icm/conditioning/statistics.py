"""`statistics`: what a base's own states are like over an example, a picture or a text."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig

from .hidden_state import HiddenStateEncoder


class StatisticsEncoder(HiddenStateEncoder):
    r"""Mean and standard deviation of the unadapted base's states over the tokens of an example.

    Of a text, those of the states of every layer, the embeddings among them: `d = 2 (layers + 1) hidden_size`. Of a picture, those of the
    image tokens that a vision-language model hands to its language model, and its first token, which is their pooled one in Florence-2:
    `d = 3 hidden_size`. More of an example is left than in its last state (Eq. 1): a task without a LoRA is read from these.

    It is made as a [`HiddenStateEncoder`] is; `prompt` has no effect, as pictures are seen before anything is asked.
    """

    kind: ClassVar[str] = "statistics"

    def _width(self, text: PreTrainedConfig) -> int:
        return text.hidden_size * (3 if self.accepts == ("images",) else 2 * (text.num_hidden_layers + 1))

    def _embed(self, items: list[Any]) -> Tensor:
        with self._unadapted():
            return self._states(items) if self.accepts == ("examples",) else self._tokens(items)

    def _states(self, texts: list[str]) -> Tensor:
        output, tokens = self._body(texts, output_hidden_states=True)
        mask = tokens[..., None].float()
        parts = []
        for layer in output.hidden_states:  # the embeddings first
            mean = (layer.float() * mask).sum(1) / mask.sum(1)
            deviation = (((layer.float() - mean[:, None]).square() * mask).sum(1) / mask.sum(1)).sqrt()
            parts += [mean, deviation]
        return torch.cat(parts, dim=1)

    def _tokens(self, images: list[Image.Image]) -> Tensor:
        model: Any = self.model
        pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
        tokens = model.get_image_features(pixels).pooler_output.float()
        return torch.cat([tokens.mean(1), tokens.std(1, correction=0), tokens[:, 0]], dim=1)
