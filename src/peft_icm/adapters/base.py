"""The base model of an adapter: loaded, on memory that others read too, untied."""

from __future__ import annotations

import copy
import itertools
import os
import struct
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import transformers
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from .layout import AdapterLayout

# What a config without architectures is taken for; the most special first, since a BART is among the causal ones too.
_BY_MODEL_TYPE: tuple[Any, ...] = (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)
# What says where a base's config is.
_WHERE = ("token", "cache_dir", "local_files_only", "subfolder", "gguf_file")
SHARES = "_shares_tensors"  # set on a model whose tensors another one reads
Model = TypeVar("Model", PreTrainedModel, PeftModel)


def load_base(layout: AdapterLayout, name: str, revision: str | None, **base_model_kwargs: Any) -> PreTrainedModel:
    """Load the base model that a layout was derived from.

    Args:
        layout (`AdapterLayout`): Names the model class.
        name (`str`): Hub id or folder of the base.
        revision (`str`, *optional*): Its revision.
        **base_model_kwargs: For the class's `from_pretrained` (`dtype`, `device_map`, `quantization_config`, `subfolder`, ...). Weights are
            safetensors, or with `gguf_file` those of a GGUF file, which holds no code either.

    Returns:
        `PreTrainedModel`: In eval mode.

    Raises:
        `OSError`: One line: it can't be found or read, or a package that it needs is missing.
        `ValueError`: One line: transformers has no such class, or its files are corrupted or don't fit each other.
    """
    if base_model_kwargs.get("trust_remote_code"):
        raise ValueError("trust_remote_code=True: code of a base is never run, load the model yourself and pass it as base_model.")
    revision = revision or "main"
    where = {key: base_model_kwargs[key] for key in _WHERE if key in base_model_kwargs}
    wanted = layout.base_model_class
    with opening_base(name):
        # Where the adapter does not say, the base's own config does.
        kind: Any = (
            base_class(transformers.AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False, **where))
            if wanted is None
            else _known_class(wanted)
        )
        return kind.from_pretrained(name, **{**base_model_kwargs, "revision": revision, "use_safetensors": True}).eval()


@contextmanager
def opening_base(name: str) -> Iterator[None]:
    """One line for whatever ends the loading of a base, its config or its processor.

    Args:
        name (`str`): Hub id or folder of the base.

    Raises:
        `OSError`: If it is neither a folder nor the id of a repo, cannot be read, or needs a package that is missing.
        `ValueError`: If it is a file, its files are corrupted or don't fit each other, or transformers knows no such model.
    """
    if os.path.isfile(name):
        raise ValueError(
            f"The base model {name} is a file: pass its folder, and for a GGUF file base_model_kwargs={{'gguf_file': its name}}."
        )
    try:
        if not os.path.isdir(name):
            validate_repo_id(name)
        yield
    except HFValidationError as error:
        raise OSError(
            f"The base model {name!r} is neither an existing folder nor the id of a Hub repo ('org/name'): pass one as base_model."
        ) from error
    except (OSError, ImportError) as error:
        raise OSError(f"The base model {name}: {' '.join(str(error).split())}") from error
    except (ValueError, RuntimeError, SafetensorError, StrictDataclassError, struct.error) as error:
        raise ValueError(f"The base model {name}: {' '.join(str(error).split())}") from error


def add_lora(base: PreTrainedModel, lora_config: LoraConfig) -> PeftModel:
    """Put a LoRA on a base.

    Args:
        base (`PreTrainedModel`): Changed in place.
        lora_config (`LoraConfig`): Copied: peft writes into it.

    Returns:
        `PeftModel`

    Raises:
        `ValueError`: If the base has no such modules, or none of a kind that a LoRA is for.
    """
    try:
        return get_peft_model(base, copy.deepcopy(lora_config))
    except ValueError as error:
        targets = lora_config.target_modules
        named = targets if isinstance(targets, str) else ", ".join(sorted(targets or ()))
        reason = textwrap.shorten(str(error), 200)
        raise ValueError(f"A LoRA of r={lora_config.r} on {named!r} does not fit a {type(base).__name__}: {reason}") from error


def base_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of a base model by its own config.

    Args:
        config (`PreTrainedConfig`): Its first architecture, or, where it names none, the class that transformers has for its model type.

    Returns:
        `type[PreTrainedModel]`

    Raises:
        `ValueError`: If transformers has no such class, as of models with code of their own.
    """
    if config.architectures:
        return _known_class(config.architectures[0])
    for names in _BY_MODEL_TYPE:
        if config.model_type in names:
            found = names[config.model_type]
            return _known_class(found if isinstance(found, str) else found[0])
    raise ValueError(
        f"The config of the base names no architectures, and model type {config.model_type!r} has no language model: add them."
    )


def _known_class(name: str) -> type[PreTrainedModel]:
    found = getattr(transformers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(
            f"transformers {transformers.__version__} has no model class {str(name)[:100]}; code of a base is never run: load it"
            " yourself, or take a base that transformers knows."
        )
    return found


def check_bare(base: nn.Module) -> None:
    """Refuse a base that carries adapters, merged or not: what is put on it would stand on what they change, which no layout tells.

    One that was merged and unloaded is a plain model, and passes.

    Args:
        base (`nn.Module`): A model that somebody passed as a base.

    Raises:
        `ValueError`: If it is a `PeftModel`, or the inside of one, or `load_adapter` of transformers put adapters there.
    """
    layers = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
    if any(layer.merged for layer in layers):
        raise ValueError("base_model carries adapters that are merged into it: unmerge_adapter() and unload() them, or load the base anew.")
    if isinstance(base, PeftModel) or any(layer.active_adapters for layer in layers):
        raise ValueError("base_model carries adapters, of peft or of load_adapter: unload() the PeftModel, or load the base anew.")


class SharingLoraModel(LoraModel):
    """A LoRA model over a base whose memory other models read: what writes into the base, or gives it away, makes it a copy of its own."""

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As in peft, on a copy of the base's tensors."""
        _own_tensors(self.model)
        super().merge_adapter(*args, **kwargs)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        _own_tensors(self.model)
        return super()._unload_and_optionally_merge(*args, **kwargs)


def share_tensors(model: PreTrainedModel) -> PreTrainedModel:
    """A second model of its own modules on the same memory: adapters of the one never reach the other.

    [`attach`] sees to it that a merge does not either: it happens on a copy ([`SharingLoraModel`]). Whoever writes into the base's tensors
    by other means, such as an optimizer, copies them first.

    Args:
        model (`PreTrainedModel`): With or without tied weights; ties stay.

    Returns:
        `PreTrainedModel`
    """

    def view(tensor: Tensor) -> Tensor:
        if type(tensor) not in (Tensor, nn.Parameter):
            return tensor  # a quantised weight; peft replaces it in a merge
        return nn.Parameter(tensor.detach(), tensor.requires_grad) if isinstance(tensor, nn.Parameter) else tensor.detach()

    tensors = itertools.chain(model.parameters(), model.buffers())
    shared = copy.deepcopy(model, {id(tensor): view(tensor) for tensor in tensors})
    shared.__dict__[SHARES] = True
    return shared


def _own_tensors(model: nn.Module) -> None:
    if model.__dict__.pop(SHARES, False):
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            tensor.data = tensor.data.clone()


def untie(model: Model) -> Model:
    """Give the output embeddings a weight of their own, in place.

    A merge writes into the weight of the base. Many models share one weight between input and output embeddings: merging a LoRA on the one
    would change the other too. So: `untie(model).merge_and_unload()`.

    Args:
        model (`PreTrainedModel` or `PeftModel`): With output embeddings.

    Returns:
        `PreTrainedModel` or `PeftModel`: `model`, with `tie_word_embeddings=False` in its config, so that saving keeps both embeddings.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    head: Any = base.get_output_embeddings()
    layer: Any = head.get_base_layer() if isinstance(head, LoraLayer) else head
    layer.weight = copy.deepcopy(layer.weight)  # of its own class: a quantised weight stays one
    base.config.tie_word_embeddings = False
    ties = base.all_tied_weights_keys.items()
    base.all_tied_weights_keys = {target: source for target, source in ties if base.get_submodule(target.rpartition(".")[0]) is not head}
    return model
