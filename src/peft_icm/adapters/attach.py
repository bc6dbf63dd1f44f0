"""Tensors -> PeftModel: an adapter is added to a base or a PeftModel, or its values are swapped."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..disk import safe_name
from .base import SHARES, SharingLoraModel, check_bare
from .beside import active_parts, fits_beside, inject_beside
from .layout import DTYPES, AdapterLayout, same_function
from .tensors import Unfilled, all_finite, module_of, outside_adapters

logger = logging.getLogger(__name__)
PROVENANCE = "_peft_icm_provenance"
ATTACHING = threading.RLock()  # a model may be met by many threads


def attach(
    model: PreTrainedModel | PeftModel,
    layout: AdapterLayout,
    state_dict: Mapping[str, Tensor],
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
    provenance: Mapping[str, Any] | None = None,
    copy: bool = True,
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
        provenance (`Mapping[str, Any]`, *optional*): How the adapter was generated, which [`save_adapter`] writes into the card. A digest
            of the values is kept with it, to tell later whether they still are those.
        copy (`bool`, defaults to `True`): Copy the tensors. With `False` they are given away: a new adapter of the same device consists of
            them, and takes no memory beside.

    Returns:
        `PeftModel`: The same object where `model` is a `PeftModel` already.

    Raises:
        `ValueError`: If the base does not fit the layout, carries adapters though it is no `PeftModel` ([`check_bare`]), or has no values,
            the name is taken by another layout, a value is not finite, or the adapter would do nothing, because the model's adapters are
            disabled or its dtype makes zeros of it; the model is as it was then.
    """
    check_finite(layout, state_dict)
    check_name(adapter_name, layout)
    if not isinstance(model, PreTrainedModel | PeftModel):
        raise ValueError(f"The base model is a {type(model).__name__}, must be a PreTrainedModel or a PeftModel.")
    with ATTACHING:
        outside = outside_adapters(model)
        check_enabled(outside)
        if isinstance(model, PeftModel) and adapter_name in model.peft_config:
            _swap(model, outside, layout, state_dict, adapter_name, is_trainable)
        else:
            model = _add(model, outside, layout, state_dict, adapter_name, is_trainable, copy)
        # On the configuration, which goes when the adapter goes; peft saves its fields alone. In each dtype: a cast is no training.
        kept = {**provenance, "sha256": layout.digests(state_dict, DTYPES)} if provenance else {}
        vars(model.peft_config[adapter_name])[PROVENANCE] = kept
    return model


def check_finite(layout: AdapterLayout, state_dict: Mapping[str, Tensor]) -> None:
    """Refuse an adapter with a value that is none.

    Args:
        layout (`AdapterLayout`): Of the adapter.
        state_dict (`Mapping[str, Tensor]`): Its tensors.

    Raises:
        `ValueError`: If they are not those of the layout, or a value is not finite.
    """
    if not all(map(all_finite, layout.parts(state_dict))):
        wrong = sum(int((~part.isfinite()).sum()) for part in layout.parts(state_dict))
        raise ValueError(f"The adapter holds {wrong} NaN or infinite values of {layout.numel}.")


def check_enabled(modules: Mapping[str, nn.Module]) -> None:
    """Refuse a model on which an adapter would do nothing.

    Args:
        modules (`Mapping[str, nn.Module]`): [`outside_adapters`] of it.

    Raises:
        `ValueError`: If its adapters are disabled.
    """
    for name, module in modules.items():
        if isinstance(module, LoraLayer) and module.disable_adapters:
            raise ValueError(
                f"{name}: the adapters of this model are disabled, and another would do nothing. Call enable_adapters(True) on each of its"
                " LoraLayers, or base_model.enable_adapter_layers() on a PeftModel, or leave the `with model.disable_adapter()`."
            )


def check_name(name: str, layout: AdapterLayout) -> str:
    """The name of an adapter, checked: peft keeps adapters in a ModuleDict, where a name is an attribute.

    Args:
        name (`str`): From a user.
        layout (`AdapterLayout`): Of the adapter.

    Returns:
        `str`: `name`.

    Raises:
        `ValueError`: If it is no plain file name ([`safe_name`]), has a dot, is an attribute of torch's ModuleDict, or the name of a module
            that carries the adapter: the next adapter would take this one's matrices for such modules.
    """
    safe_name(name, "adapter")
    if name in {module.rpartition(".")[2] for module in layout.modules}:
        raise ValueError(f"adapter_name={name!r} is the name of a module that carries the adapter: choose another name.")
    if "." in name or hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
        raise ValueError(f"adapter_name={name!r} has a dot or is an attribute of torch's ModuleDict: choose another name.")
    return name


@contextmanager
def unchanged_on_failure(
    model: PreTrainedModel | PeftModel, modules: Sequence[nn.Module] = (), parts: Sequence[nn.Module | nn.Parameter] = ()
) -> Iterator[None]:
    """Put every module of a model back as it was where what is done inside fails: peft leaves a half-injected adapter behind.

    Values of tensors that are written in place are not put back. Other threads attach nothing meanwhile.

    Args:
        model (`PreTrainedModel` or `PeftModel`): With or without adapters.
        modules (`Sequence[nn.Module]`, *optional*): The only ones that are touched, where that is known.
        parts (`Sequence[nn.Module or nn.Parameter]`, *optional*): Then, the only ones whose `requires_grad` may change.
    """
    with ATTACHING:
        # One level of each module: its attributes, and the entries of its dicts, among them submodules, parameters, ranks and scales.
        # Not its lists: merged_adapters says what is in the base's weights, which stay as they are then.
        touched = [(module, dict(vars(module))) for module in modules or model.modules()]
        entries = [(found, dict(found)) for _, attributes in touched for found in attributes.values() if isinstance(found, dict)]
        found = (part.parameters() if isinstance(part, nn.Module) else [part] for part in (parts if modules else [model]))
        gradients = [(parameter, parameter.requires_grad) for parameter in itertools.chain.from_iterable(found)]
        try:
            yield
        except BaseException:
            for now, before in [*((vars(module), attributes) for module, attributes in touched), *entries]:
                now.clear()
                now.update(before)
            for parameter, requires_grad in gradients:
                parameter.requires_grad_(requires_grad)
            raise


def _add(
    model: PreTrainedModel | PeftModel,
    outside: Mapping[str, nn.Module],
    layout: AdapterLayout,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    is_trainable: bool,
    copy: bool,
) -> PeftModel:
    """Inject a new adapter, on the meta device, and fill it."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(model, PeftModel):
        check_bare(base)
    layout.check_base(base)
    warn_of_another_base(base, layout)
    config = layout.lora_config()
    config.inference_mode = not is_trainable
    config.base_model_name_or_path = base.name_or_path or layout.base_model_name_or_path
    if isinstance(model, PeftModel) and fits_beside(model, outside, layout.modules):
        layers: dict[str, Any] = {name: module for name, module in outside.items() if isinstance(module, LoraLayer)}
        touched = [model, model.base_model, *layers.values(), *(child for layer in layers.values() for child in layer.children())]
        with unchanged_on_failure(model, touched, active_parts(layers)):
            with torch.device("meta"), Unfilled():
                inject_beside(model, layers, layout.modules, adapter_name, config)
            layers = layers_with(layers, adapter_name)
            _fill(layers, state_dict, adapter_name, is_trainable, copy)
            matching_parameters(model, layers, layout, adapter_name)
        _set_mode(model, outside, layers, adapter_name, is_trainable)
        return model
    warn_of_shared_weights(base, layout)
    # Not low_cpu_mem_usage=True, which patches nn.Module for all threads of the process: the device context is of one thread.
    with unchanged_on_failure(model):
        with torch.device("meta"), Unfilled():
            if isinstance(model, PeftModel):
                model.add_adapter(adapter_name, config)
                wrapped = model
            else:
                wrapped = get_peft_model(model, config, adapter_name=adapter_name)
                if SHARES in base.__dict__:
                    wrapped.base_model.__class__ = SharingLoraModel  # peft offers no hook before a merge
        layers = layers_with(outside_adapters(wrapped), adapter_name)
        _fill(layers, state_dict, adapter_name, is_trainable, copy)
        matching_parameters(wrapped, layers, layout, adapter_name)
        wrapped.set_adapter(adapter_name, inference_mode=not is_trainable)
    return wrapped.train(is_trainable)


# What peft itself has for `_swap` and `_fill` does less, and takes four to six times as long on 32 layers: hotswap_adapter_from_state_dict
# zeroes every adapter whose name contains this one's, and takes neither embeddings nor what is merged; set_peft_model_state_dict with
# low_cpu_mem_usage casts an fp32 adapter to the bf16 of its base, and leaves it on meta where the base is offloaded.
def _swap(
    model: PeftModel,
    outside: Mapping[str, nn.Module],
    layout: AdapterLayout,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    is_trainable: bool,
) -> None:
    """Write new values into an adapter that is there; what is already as it should be is not set again."""
    layers = layers_with(outside, adapter_name)
    parameters = matching_parameters(model, layers, layout, adapter_name)
    values = as_taken(parameters, state_dict)
    active = all(layer.active_adapters == [adapter_name] and not layer.merged for layer in layers.values())
    if not active or model.active_adapters != [adapter_name] or any(p.requires_grad != is_trainable for p in parameters.values()):
        model.set_adapter(adapter_name, inference_mode=not is_trainable)  # unmerges, so before the values change
    model.peft_config[adapter_name].inference_mode = not is_trainable
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(values[key])
    _set_mode(model, outside, layers, adapter_name, is_trainable)


def _set_mode(model: PeftModel, outside: Mapping[str, nn.Module], layers: Mapping[str, Any], adapter_name: str, train: bool) -> None:
    """`model.train(train)`, but for what is inside of other adapters where all around them is in that mode already."""
    if any(module.training != train for module in outside.values()):
        model.train(train)
        return
    for layer in layers.values():
        for part in layer.children():
            if isinstance(part, nn.ModuleDict) and adapter_name in part and part[adapter_name].training != train:
                part[adapter_name].train(train)


def layers_with(modules: Mapping[str, nn.Module], adapter_name: str) -> dict[str, LoraLayer]:
    """Those of a PeftModel's `named_modules()` that carry the adapter."""
    return {name: layer for name, layer in modules.items() if isinstance(layer, LoraLayer) and adapter_name in layer.r}


def _place(key: str) -> tuple[str, str]:
    """Of a key, the LoRA layer's name in the PeftModel and its matrix: `("base_model.model...q_proj", "lora_A")`."""
    name, _, matrix = key.removesuffix(".weight").rpartition(".")
    return name, matrix


@torch.inference_mode(False)  # a tensor that inference mode made can't be written outside of it: no swap, no training
def _fill(layers: Mapping[str, LoraLayer], state_dict: Mapping[str, Tensor], adapter_name: str, is_trainable: bool, copy: bool) -> None:
    """Put values in the place of the meta tensors of a fresh injection, each where its module computes."""
    for key, value in state_dict.items():
        name, matrix = _place(key)
        base: Any = layers[name].get_base_layer()
        device = base._hf_hook.execution_device if has_offloaded_params(base) else base.weight.device
        parameter = nn.Parameter(value.to(device, copy=copy), requires_grad=is_trainable)
        matrices: Any = getattr(layers[name], matrix)
        if isinstance(matrices, nn.ParameterDict):
            matrices[adapter_name] = parameter
        else:
            matrices[adapter_name].weight = parameter


def matching_parameters(
    model: PreTrainedModel | PeftModel, layers: Mapping[str, LoraLayer], layout: AdapterLayout, adapter_name: str
) -> dict[str, nn.Parameter]:
    """The parameter of each key; refuses an adapter of another layout or without values, in time proportional to the adapter."""
    # Not "delete it": transformers 5.24 refuses to under peft before 0.22, and a PeftModel that has lost its only adapter takes no other.
    action = "Choose another adapter_name or load the base anew."
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
        if parameter.is_meta:
            raise ValueError(f"{key} of {adapter_name!r} is on the meta device, without values: load the base model with its weights.")
        parameters[key] = parameter
    if len(layers) != len(layout.modules):
        raise ValueError(f"The adapter {adapter_name!r} is on {len(layers)} modules, the layout on {len(layout.modules)}. {action}")
    return parameters


def as_taken(parameters: Mapping[str, nn.Parameter], state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of a checked adapter in the dtypes of the parameters that take them; refuses those that make zeros or infinities of it."""
    values = {key: state_dict[key].to(parameter) for key, parameter in parameters.items()}
    cast = [value for key, value in values.items() if value is not state_dict[key]]
    emptied = bool(cast) and _acts(state_dict) and not _acts(values)
    if emptied or not all(map(all_finite, cast)):
        dtype = str(next(iter(values.values())).dtype).removeprefix("torch.")
        what = "every B A of the adapter is zero: it would do nothing" if emptied else "the adapter has infinite values"
        raise ValueError(f"In {dtype}, the dtype of the model's adapter, {what}. Convert the model to float32 or bfloat16.")
    return values


def _acts(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether a module of the adapter has more than zeros in both of its matrices; the first one mostly tells."""
    pairs: dict[str, list[Tensor]] = {}
    for key, matrix in state_dict.items():
        pairs.setdefault(module_of(key), []).append(matrix)
    return any(all(matrix.any() for matrix in pair) for pair in pairs.values())


def warn_of_another_base(base: PreTrainedModel, layout: AdapterLayout) -> None:
    """Of a base whose name or commit is not the layout's."""
    name, wanted = base.name_or_path, layout.base_model_name_or_path
    if name and wanted and name != wanted and not os.path.isdir(name) and not os.path.isdir(wanted):
        warnings.warn(f"The adapter was made for {wanted}, the base model is {name}.", stacklevel=5)
    found = getattr(base.config, "_commit_hash", None)
    if found and layout.revision and not found.startswith(layout.revision):
        warnings.warn(f"The adapter was made for revision {layout.revision} of {wanted}, the base is {found}.", stacklevel=5)


def warn_of_shared_weights(base: PreTrainedModel, layout: AdapterLayout) -> None:
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
