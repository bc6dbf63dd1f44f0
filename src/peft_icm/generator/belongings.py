"""What belongs to a generator: where it was found, the encoder that it hears with, the base that it was trained for."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from ..adapters.base import load_base, share_tensors
from ..adapters.layout import AdapterLayout
from ..conditioning import JoinedEncoder, TaskEncoder, load_task_encoder
from ..disk import inside
from ..hub.files import is_local, resolve
from .configuration_icm import ICMConfig

# One for the process: transformers sets the process's default dtype while it builds a model.
LOADING = threading.RLock()


class Source(dict[str, Any]):
    """Where a generator was found: `name`, `revision` (the commit, of a Hub repo), `subfolder`, `sha256` of its weights, and `token`,
    `cache_dir`, `local_files_only` for what belongs to it. A pickle or a copy has no token."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Everything but the token."""
        return type(self), ({name: value for name, value in self.items() if name != "token"},)

    def __repr__(self) -> str:
        """Without the token, which has no place in a log."""
        return repr({name: value for name, value in self.items() if name != "token"})

    @property
    def on_hub(self) -> bool:
        """Whether it was downloaded, from someone who may know nothing of this machine."""
        return "revision" in self

    @property
    def hub(self) -> dict[str, Any]:
        """What other repos are reached with."""
        return {name: self[name] for name in ("token", "cache_dir", "local_files_only") if name in self}


class Sentences(dict[str, Tensor]):
    """Task vectors of the sentences that were read last: what is read is generated next, and a server is asked for the same tasks again.
    A pickle or a copy has none of them."""

    KEPT = 256

    def __setitem__(self, sentence: str, vector: Tensor) -> None:
        if len(self) >= self.KEPT:
            self.pop(next(iter(self)), None)
        super().__setitem__(sentence, vector)

    def __reduce__(self) -> tuple[Any, ...]:
        """Nothing of what users asked for."""
        return type(self), ()


class BelongingsMixin:
    """The side of [`ICMGenerator`] that loads what it needs."""

    config: ICMConfig
    layout: AdapterLayout
    device: torch.device
    _source: Source
    _lazy: dict[str, Any]  # the encoder and the base, once loaded; a dict keeps them out of the generator's own modules

    @property
    def encoder(self) -> TaskEncoder:
        """The task encoder this generator was trained with; loaded on first use, and refused if its weights have another hash."""
        with LOADING:
            if "encoder" not in self._lazy:
                if self.config.encoder is None:
                    raise ValueError("This generator names no task encoder: pass task_vector= (Tensor [d]).")
                self.encoder = self._load_encoder(self.config.encoder).to(self.device)
            return self._lazy["encoder"]

    @encoder.setter
    def encoder(self, encoder: TaskEncoder) -> None:
        wanted = (self.config.encoder or {}).get("sha256")
        if wanted and encoder.config["sha256"] != wanted:
            raise ValueError(
                f"This generator was trained with the {self.config.encoder['kind']} encoder of sha256 {wanted[:12]}, found"  # type: ignore[index]
                f" {encoder.config['kind']} of {encoder.config['sha256'][:12]}. Pass the encoder it names."
            )
        if wanted:
            encoder.check(self.config.encoder or {})
        if encoder.dim != self.config.condition_dim:
            raise ValueError(
                f"This generator's condition_dim is {self.config.condition_dim}, the {encoder.kind} encoder's task vectors have"
                f" {encoder.dim} numbers: they must be one. Pass the encoder that it was trained with."
            )
        self._lazy |= {"encoder": encoder, "sentences": Sentences()}

    def _load_encoder(self, config: Mapping[str, Any]) -> TaskEncoder:
        folder, parts = config.get("folder"), config.get("parts")
        if parts and not folder:  # each lies where its own config says, one of them perhaps in the base's folder
            return JoinedEncoder({name: self._load_encoder(part) for name, part in parts.items()})
        return load_task_encoder(config, self._resolve(folder) if folder else None, from_hub=self._source.on_hub, **self._source.hub)

    def _base_for(
        self, base_model: str | os.PathLike[str] | PreTrainedModel | PeftModel | None, kwargs: Mapping[str, Any] | None
    ) -> PreTrainedModel | PeftModel:
        if isinstance(base_model, PreTrainedModel | PeftModel):
            if kwargs:
                raise ValueError("base_model_kwargs are for a base that is loaded here; this base_model is a model already.")
            return base_model
        if not isinstance(base_model, str | os.PathLike | None):
            raise ValueError(
                f"base_model is a {type(base_model).__name__}, must be an id, a folder, a PreTrainedModel or a PeftModel; of a compiled"
                " model pass the model that was compiled."
            )
        with LOADING:
            if base_model is not None:
                revision = self.layout.revision if str(base_model) == self.layout.base_model_name_or_path else None
                return load_base(self.layout, str(base_model), revision, **{**self._source.hub, **(kwargs or {})})
            if kwargs:
                return load_base(self.layout, *self._own_base(), **{**self._source.hub, **kwargs})
        return share_tensors(self.load_base())

    def portable(self) -> Self:
        """A copy for another process, which may have no GPU: on the CPU with its encoder, without the base, which is loaded there.

        Returns:
            [`ICMGenerator`]
        """
        lazy = copy.deepcopy({name: value for name, value in self._lazy.items() if name != "base"})
        return copy.deepcopy(self, {id(self._lazy): lazy}).to("cpu")  # type: ignore[attr-defined]

    def load_base(self) -> PreTrainedModel:
        """The base model that this generator was trained for, loaded once, however many threads ask for it.

        Returns:
            `PreTrainedModel`: Keep it free of adapters: what `generate_adapter` returns is copied from it.

        Raises:
            `ValueError`: If the generator names no base, or comes from a repo and names a folder of this machine.
        """
        with LOADING:
            if "base" not in self._lazy:
                self._lazy["base"] = load_base(self.layout, *self._own_base(), **self._source.hub)
            return self._lazy["base"]

    def _own_base(self) -> tuple[str, str | None]:
        if self.config.base_model_subfolder:
            return str(self._resolve(self.config.base_model_subfolder)), None
        name = self.layout.base_model_name_or_path
        encoder = self.config.encoder or {}
        if name is None:  # where its encoder is the base itself, that one is there
            parts = [encoder, *encoder.get("parts", {}).values()]
            reads = next((part["folder"] for part in parts if part.get("kind") == "statistics" and part.get("folder")), None)
            if reads is not None:
                return str(self._resolve(reads)), None
            raise ValueError("This generator names no base model: pass base_model= (an id, a folder or a model).")
        if self._source.on_hub and (os.path.exists(name) or is_local(name)):
            raise ValueError(f"{self._source['name']} names the base model {name!r}, a place on this machine: pass base_model=.")
        return name, self.layout.revision

    def _resolve(self, folder: str) -> Path:
        """The local path of a folder that travels with this generator; downloaded, of the generator's own commit, where that is on the
        Hub."""
        source = self._source
        if "name" not in source:
            raise ValueError(f"The generator's {folder}/ is found only after save_pretrained and from_pretrained.")
        path = os.path.join(source.get("subfolder", ""), folder)
        if source.on_hub:
            if ".." in Path(folder).parts or Path(folder).is_absolute():
                raise ValueError(f"{source['name']} names the folder {folder!r}, outside its own repo: it is not followed there.")
            options = {**source.hub, "revision": source.get("revision")}
            return inside(resolve(source["name"], allow_patterns=[f"{path}/*"], **options), path)
        own = Path(source["name"], source.get("subfolder", ""))
        # Generators on this machine may share an encoder that lies beside them, as the bundled ones do; its hash is checked.
        encoder = self.config.encoder or {}
        shared = [encoder.get("folder"), *(part.get("folder") for part in encoder.get("parts", {}).values())]
        return Path(os.path.normpath(own / folder)) if folder in shared else inside(own, folder)
