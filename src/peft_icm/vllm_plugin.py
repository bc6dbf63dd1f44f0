"""A vLLM plugin: a request for the model `icm:<sentence>` gets the base with the adapter that a generator makes of the sentence.

vLLM finds it by the entry point `vllm.general_plugins`, in each process that it starts, and asks it for each name once; environment
variables say what it answers ([`register`]).
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
import threading
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli_verbs import load_generator

if TYPE_CHECKING:
    from .generator.modeling_icm import ICMGenerator

logger = logging.getLogger("vllm.peft_icm")  # in vLLM's server the root logger shows errors alone
NAME, PREFIX = "peft_icm", "icm:"
GENERATOR, SENTENCES, LIMIT, CACHE = (f"PEFT_ICM_VLLM_{name}" for name in ("GENERATOR", "SENTENCES", "MAX_ADAPTERS", "CACHE"))
MAX_ADAPTERS, MAX_SENTENCE = 64, 1000
WEIGHTS = "adapter_model.safetensors"


class SentenceAdapters:
    """Adapters of sentences as PEFT folders, named by their values: one that is there, of this process or another, is not written again.

    Args:
        generator (`str`): Folder or Hub id of the generator, or `"bundled:text"`; loaded with the first sentence.
        cache (`str` or `Path`, *optional*): Where the folders lie; by default a temporary folder that goes with the process.
        sentences (`Collection[str]`, *optional*): The only ones that are answered; by default all that the generator knows.
        limit (`int`, defaults to 64): The most sentences of this process, and the most adapters in the cache. Further ones are refused:
            vLLM keeps each name that it has resolved, however many share an adapter, and reads its folder again whenever it needs room,
            so none may go while it runs.
    """

    def __init__(
        self, generator: str, cache: str | Path | None = None, sentences: Collection[str] | None = None, limit: int = MAX_ADAPTERS
    ):
        self.name, self.sentences, self.limit = generator, sentences, limit
        self.cache = Path(cache) if cache else None
        self._generator: ICMGenerator | None = None
        self._bases: set[str] = set()
        self._answered: set[str] = set()
        self._lock = threading.Lock()

    def folder(self, base_model: str, sentence: str) -> Path:
        """The folder of a sentence's adapter; the prior's mode, so that every process makes the same.

        Args:
            base_model (`str`): Folder or Hub id of the model that is served. Of each, the config is checked against the generator's layout.
            sentence (`str`): Of the request.

        Returns:
            `Path`: With `adapter_config.json` and `adapter_model.safetensors`.

        Raises:
            `ValueError`: If the sentence is not among `sentences`, the generator does not know it ([`UnknownTaskError`]), there are `limit`
                sentences or adapters, or the base does not fit.
            `OSError`: If the generator or the config of the base is not found.
        """
        if self.sentences is not None and sentence not in self.sentences:
            raise ValueError(f"{sentence[:80]!r} is none of the sentences allowed.")
        if len(sentence) > MAX_SENTENCE:
            raise ValueError(f"A sentence of {len(sentence)} characters: at most {MAX_SENTENCE} are read.")
        with self._lock:
            if sentence not in self._answered and len(self._answered) >= self.limit:
                raise ValueError(f"{self.limit} sentences were answered, which is the limit: raise {LIMIT}, or start again.")
            if self._generator is None:
                self._generator = load_generator(self.name)
            generator = self._generator
            if base_model not in self._bases:
                _check_base(generator, base_model)
                self._bases.add(base_model)
            state_dict = generator.generate_state_dict(sentence, temperature=0.0, on_unknown="raise")
            if self.cache is None:  # not before: vLLM registers the plugin in processes that never ask it
                self._temporary = tempfile.TemporaryDirectory(prefix="peft-icm-")
                self.cache = Path(self._temporary.name)
            folder = self.cache / generator.layout.sha256(state_dict)[:32]
            if not (folder / WEIGHTS).is_file():
                if len(list(self.cache.glob(f"[!.]*/{WEIGHTS}"))) >= self.limit:
                    raise ValueError(f"There are {self.limit} adapters in {self.cache}, which is the limit: raise it, or start with fewer.")
                _write(generator, state_dict, folder)
            self._answered.add(sentence)
            return folder


def _check_base(generator: ICMGenerator, base_model: str) -> None:
    """Refuse a base that the adapters do not fit, by a model without weights."""
    import torch

    from .adapters.base import base_class
    from .conditioning.base import load_config

    config = load_config(base_model)
    with torch.device("meta"):
        generator.layout.check_base(base_class(config)(config))


def _write(generator: ICMGenerator, state_dict: dict[str, Any], folder: Path) -> None:
    from safetensors.torch import save_file

    from .disk import replacing_folder

    with replacing_folder(folder) as new:
        save_file(state_dict, new / WEIGHTS, metadata={"format": "pt"})
        generator.layout.lora_config().save_pretrained(str(new))


def register() -> None:
    """What vLLM calls in each of its processes: registers the resolver where `PEFT_ICM_VLLM_GENERATOR` is set.

    `PEFT_ICM_VLLM_GENERATOR` names the generator; `PEFT_ICM_VLLM_SENTENCES` a text file with the only sentences that are answered, one a
    line; `PEFT_ICM_VLLM_MAX_ADAPTERS` the most sentences and adapters (64); `PEFT_ICM_VLLM_CACHE` a folder for them that outlives the
    server.

    Raises:
        `ValueError`: If the limit is no positive number, or the file of sentences is not in UTF-8.
        `OSError`: If the file of sentences can't be read.
    """
    generator = os.environ.get(GENERATOR)
    if not generator:
        return
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    limit = os.environ.get(LIMIT, str(MAX_ADAPTERS))
    if not limit.isdecimal() or not int(limit):
        raise ValueError(f"{LIMIT}={limit!r} must be a positive number of adapters.")
    file = os.environ.get(SENTENCES)
    try:
        sentences = {line.strip() for line in Path(file).read_text(encoding="utf-8-sig").splitlines()} if file else None
    except UnicodeDecodeError as error:
        raise ValueError(f"{SENTENCES}={file} is not in UTF-8 ({error}): save it so.") from error
    adapters = SentenceAdapters(generator, os.environ.get(CACHE), sentences, int(limit))

    class SentenceResolver(LoRAResolver):
        """Names that begin with `icm:`."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            """The adapter of a sentence; where there is none None, which is a model that does not exist, and a line in the log."""
            if not lora_name.startswith(PREFIX):
                return None
            try:
                folder = await asyncio.to_thread(adapters.folder, base_model_name, lora_name.removeprefix(PREFIX))
            except (ValueError, OSError) as error:
                logger.warning("%s", error)
                return None
            return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(folder))  # vLLM puts a number of its own there

    LoRAResolverRegistry.register_resolver(NAME, SentenceResolver())
