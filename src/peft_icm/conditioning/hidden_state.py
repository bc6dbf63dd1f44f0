"""`hidden_state`: Eq. 1 on the unadapted base model."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .base import TaskEncoder, weights_sha256


class HiddenStateEncoder(TaskEncoder):
    r"""The last layer's state of the last token of each example: `v_task = 1/N \sum_i h_i^last` is their mean (Eq. 1).

    The paper reads the states of the fine-tuned model; here the base is *unadapted*, so that a new task needs no LoRA of its own.

    Args:
        model (`PreTrainedModel` or `PeftModel`): A causal language model; the adapters of a `PeftModel` are switched off.
        tokenizer (`PreTrainedTokenizerBase`): Of that model; needs a padding or an EOS token.
        checkpoint (`str`): Where it came from.
        revision (`str`, *optional*): Its revision on the Hub.
    """

    kind: ClassVar[str] = "hidden_state"
    accepts: ClassVar[str] = "examples"

    def __init__(
        self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, checkpoint: str, revision: str | None = None
    ):
        self.model, self.tokenizer = model.eval(), tokenizer
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.config = {
            "kind": self.kind,
            "checkpoint": checkpoint,
            "revision": revision,
            "dim": base.config.get_text_config().hidden_size,
            "sha256": weights_sha256(base),
        }

    @classmethod
    def from_pretrained(cls, checkpoint: str, *, revision: str | None = None, **_: Any) -> HiddenStateEncoder:
        """Load the base model as an encoder.

        Args:
            checkpoint (`str`): Hub id or folder of a causal language model.
            revision (`str`, *optional*): Of the Hub repo.
        """
        model = AutoModelForCausalLM.from_pretrained(checkpoint, revision=revision or "main")
        return cls(model, AutoTokenizer.from_pretrained(checkpoint, revision=revision or "main"), checkpoint, revision)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model and tokenizer as transformers does."""
        self.model.save_pretrained(str(folder))
        self.tokenizer.save_pretrained(folder)

    def _embed(self, items: list[str]) -> Tensor:
        limit = self.model.config.get_text_config().max_position_embeddings
        batch = self.tokenizer(items, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(self.model.device)
        unadapted = self.model.disable_adapter() if isinstance(self.model, PeftModel) else nullcontext()
        with unadapted:
            inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            states = self.model(**inputs, output_hidden_states=True).hidden_states[-1]
        positions = torch.arange(states.shape[1], device=states.device)
        last = (batch["attention_mask"] * positions).argmax(1)  # right whichever side the padding is on
        return states[torch.arange(len(states)), last]
