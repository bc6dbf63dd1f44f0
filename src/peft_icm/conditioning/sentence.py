"""`sentence`: a transformers sentence encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from ..disk import replacing_folder
from .base import HubOptions, TaskEncoder, context_length, load_config, loading
from .hashes import config_sha256, model_parts, processor_parts, weights_sha256

MODULES, POOLING = "modules.json", "1_Pooling/config.json"  # of sentence-transformers
POOLINGS = ("mean", "cls", "lasttoken", "max")


class SentenceEncoder(TaskEncoder):
    """The states of the last layer, pooled over the tokens of a text as the checkpoint says, of unit length.

    Args:
        model (`PreTrainedModel`): An encoder.
        tokenizer (`PreTrainedTokenizerBase`): Of that model.
        checkpoint (`str`): Where it came from.
        revision (`str`, *optional*): Its revision on the Hub.
        pooling (`str`, defaults to `"mean"`): `"mean"`, `"cls"`, `"lasttoken"` or `"max"`, by the names of sentence-transformers.
    """

    kind: ClassVar[str] = "sentence"
    options: ClassVar[tuple[str, ...]] = ("revision", "pooling")
    accepts = ("text",)

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        checkpoint: str,
        revision: str | None = None,
        pooling: str = "mean",
    ):
        if pooling not in POOLINGS:
            raise ValueError(f"{checkpoint}: pooling is {pooling!r}, it must be one of {', '.join(POOLINGS)}.")
        self.model, self.tokenizer = model.eval(), tokenizer
        self.max_tokens = context_length(model.config, tokenizer)
        self.config = {
            "kind": self.kind,
            "checkpoint": checkpoint,
            "revision": revision,
            "pooling": pooling,
            "dim": model.config.hidden_size,
            "sha256": weights_sha256(model),
            "config_sha256": config_sha256(model=model_parts(model.config), tokenizer=processor_parts(tokenizer), pooling=pooling),
        }

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, checkpoint: str, *, revision: str | None = None, pooling: str | None = None, **hub: Unpack[HubOptions]
    ) -> SentenceEncoder:
        """Load a sentence encoder.

        Args:
            checkpoint (`str`): Hub id (`"sentence-transformers/all-MiniLM-L6-v2"`) or folder.
            revision (`str`, *optional*): Of the Hub repo.
            pooling (`str`, *optional*): See the class; by default what sentence-transformers' files of the checkpoint say, the mean where
                there are none.
            **hub: `token`, `cache_dir` and `local_files_only`.

        Raises:
            `ValueError`: If the checkpoint has no weights in safetensors, needs code of its own, or has modules other than a transformer,
                its pooling and a normalisation.
            `OSError`: If the checkpoint cannot be found or read.
        """
        places: dict[str, Any] = {"revision": revision or "main", **hub}
        load_config(checkpoint, **places)
        with loading(checkpoint):
            pooling = pooling or _pooling(checkpoint, **places)
            model = AutoModel.from_pretrained(checkpoint, use_safetensors=True, trust_remote_code=False, **places)
            tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False, **places)
        return cls(model, tokenizer, checkpoint, revision, pooling)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model and tokenizer as transformers does, and the pooling as sentence-transformers does.

        Args:
            folder (`str` or `Path`): Where to; replaced in one step.
        """
        with replacing_folder(folder) as path:
            self.model.save_pretrained(path)
            self.tokenizer.save_pretrained(path)
            types = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
            modules = [
                {"idx": index, "name": str(index), "path": place, "type": f"sentence_transformers.models.{name}"}
                for index, (place, name) in enumerate(types.items())
            ]
            (path / MODULES).write_text(json.dumps(modules, indent=2))
            (path / POOLING).parent.mkdir()
            field = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens", "lasttoken": "lasttoken"}[self.config["pooling"]]
            pooled = {"word_embedding_dimension": self.dim, "pooling_mode_mean_tokens": False, f"pooling_mode_{field}": True}
            (path / POOLING).write_text(json.dumps(pooled, indent=2))

    def count_tokens(self, texts: list[str]) -> list[int]:
        """Tokens of each text, those that start and end it too."""
        return [len(ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"]]

    def _embed(self, items: list[Any]) -> Tensor:
        cut: dict[str, Any] = {"truncation": self.max_tokens is not None, "max_length": self.max_tokens}
        batch = self.tokenizer(items, padding=True, padding_side="right", return_tensors="pt", **cut).to(self.model.device)
        states = self.model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"][..., None]
        match self.config["pooling"]:
            case "cls":
                pooled = states[:, 0]
            case "lasttoken":
                pooled = states[torch.arange(len(states)), mask.sum(1)[:, 0] - 1]
            case "max":
                pooled = states.masked_fill(mask == 0, -torch.inf).amax(1)
            case _:
                pooled = (states * mask).sum(1) / mask.sum(1)
        return F.normalize(pooled, dim=1)


def _pooling(checkpoint: str, **places: Any) -> str:
    """The pooling that sentence-transformers' files of a checkpoint name."""
    found = {name: cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False, **places) for name in (MODULES, POOLING)}
    read = {name: json.loads(Path(file).read_text(encoding="utf-8")) if file else None for name, file in found.items()}
    for module in read[MODULES] or []:
        name = module["type"].rpartition(".")[2]
        if name not in ("Transformer", "Pooling", "Normalize"):
            raise ValueError(f"{MODULES} names a module {name}, which is not read: choose an encoder without.")
    pooling = read[POOLING] or {}
    if "pooling_mode" in pooling:
        return pooling["pooling_mode"]
    modes = [name.removeprefix("pooling_mode_") for name, on in pooling.items() if name.startswith("pooling_mode_") and on is True]
    names = {"mean_tokens": "mean", "cls_token": "cls", "max_tokens": "max", "lasttoken": "lasttoken"}
    return "+".join(names.get(mode, mode) for mode in modes) or "mean"  # several are refused by the class
