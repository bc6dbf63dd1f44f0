"""`statistics`: what a base's own states are like over an example, a picture or a text."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from .hidden_state import HiddenStateEncoder


class StatisticsEncoder(HiddenStateEncoder):
    r"""Mean and standard deviation of the unadapted base's states over the tokens of an example.

    Of a text, those of the states of every layer, the embeddings among them: `d = 2 (layers + 1) hidden_size`. Of a picture, those of the
    image tokens that a vision-language model hands to its language model, and its first token, which is their pooled one in Florence-2:
    `d = 3 hidden_size`. More of an example is left than in its last state (Eq. 1): a task without a LoRA is read from these.

    Args:
        model (`PreTrainedModel` or `PeftModel`): A language model that reads texts, or an encoder-decoder vision-language model that
            reads pictures; the adapters of a `PeftModel` are switched off.
        processor (`PreTrainedTokenizerBase` or `ProcessorMixin`): Its tokenizer or processor.
        checkpoint (`str`): Where it came from.
        revision (`str`, *optional*): Its revision on the Hub.
        prompt (`str`, defaults to `"<OD>"`): Not read: pictures are seen before anything is asked.
    """

    kind: ClassVar[str] = "statistics"
    options: ClassVar[tuple[str, ...]] = ("revision",)

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        processor: PreTrainedTokenizerBase | ProcessorMixin,
        checkpoint: str,
        revision: str | None = None,
        prompt: str = "<OD>",
    ):
        super().__init__(model, processor, checkpoint, revision, prompt)
        self.config.pop("prompt", None)
        self.config["accepts"] = list(self.accepts)
        text = self.model.config.get_text_config()
        self.config["dim"] *= 3 if self.accepts == ("images",) else 2 * (text.num_hidden_layers + 1)

    def _embed(self, items: list[Any]) -> Tensor:
        model: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        with self._unadapted():
            return self._states(model, items) if self.accepts == ("examples",) else self._tokens(model, items)

    def _states(self, model: Any, texts: list[str]) -> Tensor:
        cut: dict[str, Any] = {"truncation": self.max_tokens is not None, "max_length": self.max_tokens}
        batch = self.processor(texts, padding=True, return_tensors="pt", **cut).to(model.device)
        reader: Any = model.get_encoder() if model.config.is_encoder_decoder else model
        states = reader(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True).hidden_states
        mask = batch["attention_mask"][..., None].float()
        parts = []
        for layer in states:
            mean = (layer.float() * mask).sum(1) / mask.sum(1)
            deviation = (((layer.float() - mean[:, None]).square() * mask).sum(1) / mask.sum(1)).sqrt()
            parts += [mean, deviation]
        return torch.cat(parts, dim=1)

    def _tokens(self, model: Any, images: list[Image.Image]) -> Tensor:
        pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
        tokens = model.get_image_features(pixels).pooler_output.float()
        return torch.cat([tokens.mean(1), tokens.std(1, correction=0), tokens[:, 0]], dim=1)
