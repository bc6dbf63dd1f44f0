"""Vector -> PeftModel: load the base, attach an adapter, swap its values, save it."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from huggingface_hub import CommitInfo, ModelCard
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from .adapter_layout import AdapterLayout, same_function
from .hub import BASE_FOLDER, CARD, adapter_card, copy_base, push_folder

logger = logging.getLogger(__name__)
Model = TypeVar("Model", PreTrainedModel, PeftModel)


def load_base(layout: AdapterLayout, name: str, revision: str | None, **base_model_kwargs: Any) -> PreTrainedModel:
    """Load the base model that a layout was derived from.

    Args:
        layout (`AdapterLayout`): Names the model class.
        name (`str`): Hub id or folder of the base.
        revision (`str`, *optional*): Its revision.
        **base_model_kwargs: For the class's `from_pretrained` (`dtype`, `device_map`, `quantization_config`, ...).

    Returns:
        `PreTrainedModel`: In eval mode.

    Raises:
        `ValueError`: If transformers has no such class.
    """
    if layout.base_model_class is None:
        kind: Any = transformers.AutoModelForCausalLM
    elif (kind := getattr(transformers, layout.base_model_class, None)) is None:
        raise ValueError(f"transformers {transformers.__version__} has no class {layout.base_model_class}: pass base_model.")
    return kind.from_pretrained(name, revision=revision or "main", **base_model_kwargs).eval()


def share_tensors(model: PreTrainedModel) -> PreTrainedModel:
    """A second model of its own modules on the same memory: adapters of the one never reach the other, nor does a merge.

    Its tensors are torch's copy-on-write clones: what is written to, as `merge_and_unload` does, becomes a copy of its own.
    """

    def clone(tensor: Tensor) -> Tensor:
        if type(tensor) not in (Tensor, nn.Parameter):
            return tensor  # a quantised weight; peft replaces it in a merge
        if not torch._C._is_cow_tensor(tensor):  # type: ignore[attr-defined]
            tensor.data = tensor.data.clone()  # once: memory that is mapped from a checkpoint cannot be shared so
        lazy = torch._lazy_clone(tensor.detach())
        return nn.Parameter(lazy, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else lazy

    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): clone(tensor) for tensor in tensors})


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


def attach(
    model: PreTrainedModel | PeftModel,
    layout: AdapterLayout,
    state_dict: Mapping[str, Tensor],
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> PeftModel:
    """Put an adapter onto a base model and make it the active one.

    A `PreTrainedModel` is wrapped in place, as `peft.get_peft_model` does. On a `PeftModel` the named adapter is added, or, where that
    name is there with the same layout, its values are swapped in place without a new injection. Where a target shares its weight with
    another module, such as a tied `lm_head`, a warning says so: [`untie`] the model before merging.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The base.
        layout (`AdapterLayout`): The layout of the adapter.
        state_dict (`Mapping[str, Tensor]`): Its tensors.
        adapter_name (`str`, defaults to `"default"`): Name of the adapter.
        is_trainable (`bool`, defaults to `False`): Leave the adapter in train mode with gradients.
        provenance (`Mapping[str, Any]`, *optional*): What [`save_adapter`] writes into the card.

    Returns:
        `PeftModel`: The same object where `model` is a `PeftModel` already.

    Raises:
        `ValueError`: If the base does not fit the layout, the name is taken by another layout, or a value is not finite; nothing has
            been touched then.
    """
    vector = layout.flatten(state_dict)
    if not torch.isfinite(vector).all():
        raise ValueError(f"The adapter holds {int((~torch.isfinite(vector)).sum())} NaN or infinite values of {layout.numel}.")
    if not adapter_name or "." in adapter_name:
        raise ValueError(f"adapter_name={adapter_name!r} must be a non-empty string without dots.")
    if isinstance(model, PeftModel) and adapter_name in model.peft_config:
        _swap(model, layout, state_dict, adapter_name, is_trainable)
    else:
        model = _add(model, layout, state_dict, adapter_name, is_trainable)
    _provenance(model)[adapter_name] = dict(provenance or {})
    return model


def _add(
    model: PreTrainedModel | PeftModel, layout: AdapterLayout, state_dict: Mapping[str, Tensor], adapter_name: str, is_trainable: bool
) -> PeftModel:
    """Inject a new adapter, on the meta device, and fill it."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    layout.check_base(base)
    _warn_of_another_base(base, layout)
    _warn_of_shared_weights(base, layout)
    config = layout.lora_config()
    config.inference_mode = not is_trainable
    config.base_model_name_or_path = base.name_or_path or layout.base_model_name_or_path
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config, low_cpu_mem_usage=True)
    else:
        model = get_peft_model(model, config, adapter_name=adapter_name, low_cpu_mem_usage=True)
    assert isinstance(model, PeftModel)
    _fill(model, state_dict, adapter_name, is_trainable)
    model.set_adapter(adapter_name, inference_mode=not is_trainable)
    return model.train(is_trainable)


def _swap(model: PeftModel, layout: AdapterLayout, state_dict: Mapping[str, Tensor], adapter_name: str, is_trainable: bool) -> None:
    """Write new values into an adapter that is there; what is already as it should be is not set again."""
    modules = dict(model.named_modules())
    layers = {name: layer for name, layer in modules.items() if isinstance(layer, LoraLayer) and adapter_name in layer.r}
    parameters = _matching_parameters(model, layers, layout, adapter_name)
    active = all(layer.active_adapters == [adapter_name] and not layer.merged for layer in layers.values())
    if not active or model.active_adapters != [adapter_name] or any(p.requires_grad != is_trainable for p in parameters.values()):
        model.set_adapter(adapter_name, inference_mode=not is_trainable)  # unmerges, so before the values change
    model.peft_config[adapter_name].inference_mode = not is_trainable
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(state_dict[key])
    if any(module.training != is_trainable for module in modules.values()):
        model.train(is_trainable)


def _place(key: str) -> tuple[str, str]:
    """Of a key, the LoRA layer's name in the PeftModel and its matrix: `("base_model.model...q_proj", "lora_A")`."""
    name, _, matrix = key.removesuffix(".weight").rpartition(".")
    return name, matrix


def _fill(model: PeftModel, state_dict: Mapping[str, Tensor], adapter_name: str, is_trainable: bool) -> None:
    """Put values in the place of the meta tensors of a fresh injection, each on its module's own device."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    for key, value in state_dict.items():
        name, matrix = _place(key)
        weight: Any = layers[name].get_base_layer().weight
        parameter = nn.Parameter(value.to(weight.device), requires_grad=is_trainable)
        matrices: Any = getattr(layers[name], matrix)
        if isinstance(matrices, nn.ParameterDict):
            matrices[adapter_name] = parameter
        else:
            matrices[adapter_name].weight = parameter


def _matching_parameters(
    model: PeftModel, layers: Mapping[str, LoraLayer], layout: AdapterLayout, adapter_name: str
) -> dict[str, nn.Parameter]:
    """The parameter of each key; refuses an adapter of another layout, in time proportional to the adapter."""
    action = "Choose another adapter_name or delete_adapter it first."
    config: Any = model.peft_config[adapter_name]
    if not same_function(config, layout):
        raise ValueError(f"The adapter {adapter_name!r} is there with another LoRA configuration. {action}")
    parameters = {}
    for key, shape in zip(layout.keys, layout.shapes, strict=True):
        name, matrix = _place(key)
        found: Any = getattr(layers.get(name), matrix, {})
        found = found[adapter_name] if adapter_name in found else None  # noqa: SIM401 - a ModuleDict has no get
        parameter = getattr(found, "weight", found)
        if parameter is None or tuple(parameter.shape) != shape:
            what = "nothing" if parameter is None else tuple(parameter.shape)
            raise ValueError(f"{key}: expected shape {shape}, found {what} in {adapter_name!r}. {action}")
        parameters[key] = parameter
    if len(layers) != len(layout.modules):
        raise ValueError(f"The adapter {adapter_name!r} is on {len(layers)} modules, the layout on {len(layout.modules)}. {action}")
    return parameters


def _warn_of_another_base(base: PreTrainedModel, layout: AdapterLayout) -> None:
    name, wanted = base.name_or_path, layout.base_model_name_or_path
    if name and wanted and name != wanted and not os.path.isdir(name) and not os.path.isdir(wanted):
        warnings.warn(f"The adapter was made for {wanted}, the base model is {name}.", stacklevel=5)
    found = getattr(base.config, "_commit_hash", None)
    if found and layout.revision and not found.startswith(layout.revision):
        warnings.warn(f"The adapter was made for revision {layout.revision} of {wanted}, the base is {found}.", stacklevel=5)


def _warn_of_shared_weights(base: PreTrainedModel, layout: AdapterLayout) -> None:
    """Only at the first injection: a module that carries a LoRA has its weight one level deeper, and has been warned of."""
    weights = dict(base.named_parameters(remove_duplicate=False))
    owners = Counter(map(id, weights.values()))
    shared = [name for name in layout.modules if owners[id(weights.get(f"{name}.weight"))] > 1]
    if shared:
        warnings.warn(
            f"{shared[0]} shares its weight with another module, and merging the adapter would change both: call"
            " peft_icm.adapters.untie(model) before merge_and_unload or merge_adapter.",
            stacklevel=5,
        )


def _provenance(model: PeftModel) -> dict[str, dict[str, Any]]:
    return model.__dict__.setdefault("peft_icm_provenance", {})


def _check_name(model: PeftModel, adapter_name: str) -> None:
    if adapter_name not in model.peft_config:
        raise ValueError(f"No adapter named {adapter_name!r}: the model has {sorted(model.peft_config)}.")


def save_adapter(model: PeftModel, folder: str | Path, adapter_name: str = "default") -> Path:
    """Save one adapter as an ordinary PEFT folder, with a card that says where it came from.

    Unlike `model.save_pretrained`, it never writes embedding layers of the base, puts the adapter into `folder` itself whatever its
    name, writes to a temporary folder first, and adds generator, text and seed to the card.

    Args:
        model (`PeftModel`): Carries the adapter.
        folder (`str` or `Path`): Where to; files of the same names are replaced.
        adapter_name (`str`, defaults to `"default"`): Which adapter.

    Returns:
        `Path`: `folder`.

    Raises:
        `ValueError`: If the model has no such adapter.
    """
    _check_name(model, adapter_name)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        model.save_pretrained(temporary, selected_adapters=[adapter_name], save_embedding_layers=False)
        source = Path(temporary) if adapter_name == "default" else Path(temporary) / adapter_name
        layout = AdapterLayout.from_pretrained(source)
        facts = _provenance(model).get(adapter_name, {})
        (source / CARD).write_text(str(adapter_card(layout.to_dict(), **facts)), encoding="utf-8")
        for file in sorted(source.iterdir()):
            if file.is_file():
                os.replace(file, target / file.name)
    return target


def push_adapter(
    adapter: PeftModel | str | os.PathLike[str],
    repo_id: str,
    adapter_name: str = "default",
    *,
    commit_message: str = "Upload generated adapter",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    overwrite_card: bool = False,
) -> CommitInfo:
    """Push one adapter to the Hub in one commit, with the card of [`save_adapter`].

    A base model that is a local folder travels along in `base_model/`; the card's snippet loads it from there.

    Args:
        adapter (`PeftModel`, `str` or `Path`): A model that carries the adapter, or the folder where [`save_adapter`] saved it.
        repo_id (`str`): `"org/name"`; created where it does not exist.
        adapter_name (`str`, defaults to `"default"`): Which adapter of a model.
        commit_message (`str`, defaults to `"Upload generated adapter"`): Message of the commit.
        private (`bool`, *optional*): Create a private repo.
        token (`str` or `bool`, *optional*): Access token; by default the stored one.
        revision (`str`, *optional*): Branch.
        create_pr (`bool`, defaults to `False`): Open a pull request instead of committing.
        overwrite_card (`bool`, defaults to `False`): Replace a card that was edited by hand.

    Returns:
        `huggingface_hub.CommitInfo`: Of the one commit.

    Raises:
        `ValueError`: If the model has no such adapter, or the folder holds none.
    """
    if isinstance(adapter, PeftModel):
        _check_name(adapter, adapter_name)
    else:
        AdapterLayout.from_pretrained(Path(adapter))

    def write(folder: Path) -> None:
        if isinstance(adapter, PeftModel):
            save_adapter(adapter, folder, adapter_name)
        else:
            for name in ("adapter_config.json", "adapter_model.safetensors", CARD):
                shutil.copy(Path(adapter) / name, folder / name)
        file = folder / "adapter_config.json"
        config = json.loads(file.read_text())
        if os.path.isdir(config["base_model_name_or_path"] or ""):
            copy_base(config["base_model_name_or_path"], folder)
            file.write_text(json.dumps({**config, "base_model_name_or_path": repo_id}, indent=2, sort_keys=True))

    def card(folder: Path) -> ModelCard:
        facts = ModelCard.load(folder / CARD).data.get("icm") or {}
        subfolder = BASE_FOLDER if (folder / BASE_FOLDER).is_dir() else None
        return adapter_card(AdapterLayout.from_pretrained(folder).to_dict(), repo_id=repo_id, base_subfolder=subfolder, **facts)

    return push_folder(
        write,
        repo_id,
        card=card,
        commit_message=commit_message,
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
        overwrite_card=overwrite_card,
    )
