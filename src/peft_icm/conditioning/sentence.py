"""`sentence`: a transformers sentence encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .base import TaskEncoder, weights_sha256


class SentenceEncoder(TaskEncoder):
    """The mean of the last layer's states over the tokens of a text, of unit length (the sentence-transformers recipe).

    Args:
        model (`PreTrainedModel`): An encoder.
        tokenizer (`PreTrainedTokenizerBase`): Of that model.
        checkpoint (`str`): Where it came from.
        revision (`str`, *optional*): Its revision on the Hub.
    """

    kind: ClassVar[str] = "sentence"
    accepts = ("text",)

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, checkpoint: str, revision: str | None = None):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.config = {
            "kind": self.kind,
            "checkpoint": checkpoint,
            "revision": revision,
            "dim": model.config.hidden_size,
            "sha256": weights_sha256(model),
        }

    @classmethod
    def from_pretrained(cls, checkpoint: str, *, revision: str | None = None, **_: Any) -> SentenceEncoder:
        """Load a sentence encoder.

        Args:
            checkpoint (`str`): Hub id (`"sentence-transformers/all-MiniLM-L6-v2"`) or folder.
            revision (`str`, *optional*): Of the Hub repo.
        """
        model = AutoModel.from_pretrained(checkpoint, revision=revision or "main")
        return cls(model, AutoTokenizer.from_pretrained(checkpoint, revision=revision or "main"), checkpoint, revision)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model and tokenizer as transformers does."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _embed(self, items: list[Any]) -> Tensor:
        batch = self.tokenizer(items, padding=True, truncation=True, return_tensors="pt").to(self.model.device)
        states = self.model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"][..., None]
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
