"""`hidden_state`: Eq. 1 on the unadapted base model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Unpack

import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from ..disk import replacing_folder
from .base import HubOptions, TaskEncoder, context_length, load_config, loading
from .hashes import config_sha256, model_parts, processor_parts, weights_sha256


class HiddenStateEncoder(TaskEncoder):
    r"""The last layer's state at the last token of each example: `v_task = 1/N \sum_i h_i^last` is their mean (Eq. 1).

    A language model of any class reads texts, and the last token is that of the text (of an encoder-decoder such as T5, in its encoder). An
    encoder-decoder vision-language model (Florence-2, Figure 2) reads pictures: it answers `prompt` greedily, and the last token is the
    one that ends its answer.

    The paper reads the states of the fine-tuned model; here the base is *unadapted*, so that a new task needs no LoRA of its own.

    Args:
        model (`PreTrainedModel` or `PeftModel`): Either of the two; the adapters of a `PeftModel` are switched off.
        processor (`PreTrainedTokenizerBase` or `ProcessorMixin`): The tokenizer of a language model, which needs a padding or an EOS
            token, or the processor of a vision-language model.
        checkpoint (`str`): Where it came from.
        revision (`str`, *optional*): Its revision on the Hub.
        prompt (`str`, defaults to `"<OD>"`): What a vision-language model is asked about each picture.
    """

    kind: ClassVar[str] = "hidden_state"
    options: ClassVar[tuple[str, ...]] = ("revision", "prompt")

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        processor: PreTrainedTokenizerBase | ProcessorMixin,
        checkpoint: str,
        revision: str | None = None,
        prompt: str = "<OD>",
    ):
        self.model, self.processor = model.eval(), processor
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        sees = isinstance(processor, ProcessorMixin)
        if sees and not base.config.is_encoder_decoder:
            raise ValueError(f"{checkpoint} has no decoder of its own: pass its tokenizer, and it reads examples.")
        self.accepts = ("images",) if sees else ("examples",)
        self.max_tokens = None if isinstance(processor, ProcessorMixin) else context_length(base.config, processor)
        self.picture_tokens = getattr(processor, "num_image_tokens", 1)
        if isinstance(processor, PreTrainedTokenizerBase) and processor.pad_token_id is None:
            processor.pad_token = processor.eos_token
        self.config = {
            "kind": self.kind,
            "checkpoint": checkpoint,
            "revision": revision,
            "dim": self._width(base.config.get_text_config()),
            "sha256": weights_sha256(base),
            "config_sha256": config_sha256(model=model_parts(base.config), processor=processor_parts(processor)),
        } | ({"prompt": prompt} if sees else {})

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, checkpoint: str, *, revision: str | None = None, prompt: str = "<OD>", **hub: Unpack[HubOptions]
    ) -> HiddenStateEncoder:
        """Load the base model as an encoder.

        Args:
            checkpoint (`str`): Hub id or folder of a language model, or of an encoder-decoder vision-language model.
            revision (`str`, *optional*): Of the Hub repo.
            prompt (`str`, defaults to `"<OD>"`): See the class.
            **hub: `token`, `cache_dir` and `local_files_only`.

        Raises:
            `ValueError`: If the checkpoint has no weights in safetensors, or needs code of its own.
            `OSError`: If the checkpoint cannot be found or read.
        """
        places: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": False, **hub}
        config = load_config(checkpoint, **{name: value for name, value in places.items() if name != "trust_remote_code"})
        sees = config.is_encoder_decoder and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        auto: Any = AutoModel
        if sees or (type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING):
            auto = AutoModelForImageTextToText
        elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not config.is_encoder_decoder:
            auto = AutoModelForCausalLM
        with loading(checkpoint):
            model = auto.from_pretrained(checkpoint, use_safetensors=True, **places)
            processor = (AutoProcessor if sees else AutoTokenizer).from_pretrained(checkpoint, **places)
        return cls(model, processor, checkpoint, revision, prompt)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model and tokenizer or processor as transformers does.

        Args:
            folder (`str` or `Path`): Where to; replaced in one step.
        """
        with replacing_folder(folder) as path:
            self.model.save_pretrained(str(path))
            self.processor.save_pretrained(path)

    def average(self, rows: Tensor) -> Tensor:
        """Eq. 1: the mean as it is."""
        return rows.mean(0)

    def _embed(self, items: list[Any]) -> Tensor:
        with self._unadapted():
            states, last = self._read(items) if self.accepts == ("examples",) else self._look(items)
        return states[torch.arange(len(states)), last]

    def _unadapted(self) -> AbstractContextManager[Any]:
        return self.model.disable_adapter() if isinstance(self.model, PeftModel) else nullcontext()

    def count_tokens(self, texts: list[str]) -> list[int]:
        """Tokens of each text, those that start and end it too."""
        return [len(ids) for ids in self.processor(texts, verbose=False)["input_ids"]]

    def _width(self, text: PreTrainedConfig) -> int:
        """d, of a base with this text config."""
        return text.hidden_size

    def _read(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """States `[n, T, d]` of the texts, and where each ends."""
        output, mask = self._body(texts)
        positions = torch.arange(mask.shape[1], device=mask.device)
        return output.last_hidden_state, (mask * positions).argmax(1)  # right whichever side the padding is on

    def _body(self, texts: list[str], **options: Any) -> tuple[Any, Tensor]:
        """What the model without its head makes of the texts, and `[n, T]` which of its states are of tokens."""
        cut: dict[str, Any] = {"truncation": self.max_tokens is not None, "max_length": self.max_tokens}
        batch = self.processor(texts, padding=True, return_tensors="pt", **cut).to(self.model.device)
        base: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        # Without the head: logits of a whole vocabulary, for each token, would be thrown away. `base_model` of a Llama 4 is itself.
        body = base.get_encoder() if base.config.is_encoder_decoder else base.base_model
        body = getattr(base, "model", base) if body is base else body
        mask = batch["attention_mask"]
        return body(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False, **options), mask

    def _look(self, images: list[Image.Image]) -> tuple[Tensor, Tensor]:
        """States `[n, T, d]` of the answers about the pictures, and where each ends."""
        batch = self.processor(text=[self.config["prompt"]] * len(images), images=images, return_tensors="pt")
        output = self.model.generate(
            **batch.to(self.model.device, self.model.dtype),
            do_sample=False,
            num_beams=1,
            max_new_tokens=getattr(self.model.config.get_text_config(), "max_position_embeddings", 1024) - 1,
            output_hidden_states=True,
            return_dict_in_generate=True,
        )
        states = torch.stack([step[-1][:, -1] for step in output.decoder_hidden_states], 1)
        answers = output.sequences[:, 1:]  # without the token that starts the decoder
        ended = torch.isin(answers, torch.tensor(self.model.generation_config.eos_token_id, device=answers.device))
        return states, torch.where(ended.any(1), ended.int().argmax(1), answers.shape[1] - 1)
