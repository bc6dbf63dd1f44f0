"""Tensors -> a plain transformers model: an adapter without a PeftModel and without a file, and new values in its place."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from peft.functional import set_adapter
from torch import Tensor
from transformers import PreTrainedModel

from .attach import (
    ATTACHING,
    as_taken,
    check_enabled,
    check_finite,
    check_name,
    layers_with,
    matching_parameters,
    unchanged_on_failure,
    warn_of_another_base,
    warn_of_shared_weights,
)
from .layout import AdapterLayout
from .tensors import PREFIX, outside_adapters

REPORTS = logging.getLogger("transformers.integrations.peft")


def load_into(model: PreTrainedModel, layout: AdapterLayout, state_dict: Mapping[str, Tensor], *, adapter_name: str = "default") -> None:
    """Put an adapter into a transformers model by its own `load_adapter`, without a file, and make it the active one.

    The first load freezes the base, and each leaves the model in eval mode. Where that name is there with the same layout, its values are
    written over in place: no module and no tensor is replaced, and a model compiled by `torch.compile` after the first load runs on
    without compiling again.

    Args:
        model (`PreTrainedModel`): The base; stays of its class. Of a compiled model, the one that was compiled.
        layout (`AdapterLayout`): The layout of the adapter.
        state_dict (`Mapping[str, Tensor]`): Its tensors. transformers keeps them in the dtype of the base.
        adapter_name (`str`, defaults to `"default"`): Name of the adapter.

    Raises:
        `ValueError`: If the base does not fit the layout or has no values, the name is taken by another layout, a value is not finite, or
            the adapter would do nothing: the model's adapters are disabled, its dtype makes zeros of it, or its values are not in the model
            after the load. The model is as it was then.
    """
    check_finite(layout, state_dict)
    check_name(adapter_name, layout)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"The base model is a {type(model).__name__}, must be a PreTrainedModel: attach to a PeftModel (generate_adapter), and of a"
            " compiled model pass the model that was compiled."
        )
    with ATTACHING:
        check_enabled(outside_adapters(model))
        if adapter_name in getattr(model, "peft_config", {}):
            _swap(model, layout, state_dict, adapter_name)
        else:
            _add(model, layout, state_dict, adapter_name)


def _add(model: PreTrainedModel, layout: AdapterLayout, state_dict: Mapping[str, Tensor], adapter_name: str) -> None:
    config: Any = layout.lora_config()
    layout.check_base(model)
    warn_of_another_base(model, layout)
    warn_of_shared_weights(model, layout)
    with unchanged_on_failure(model):
        REPORTS.addFilter(_no_load_report)
        try:
            with torch.inference_mode(False):  # as attach's _fill
                values = {key: value.clone() for key, value in state_dict.items()}
                model.load_adapter(adapter_state_dict=values, peft_config=config, adapter_name=adapter_name)
        finally:
            REPORTS.removeFilter(_no_load_report)
        parameters = _parameters(model, layout, adapter_name)
        for key, value in as_taken(parameters, state_dict).items():
            if not torch.equal(parameters[key], value):
                raise ValueError(f"{key}: load_adapter left other values in the model than those of the adapter.")
        _activate(model, adapter_name)


def _no_load_report(record: logging.LogRecord) -> bool:
    """Leaves out what calls the base and its other adapters newly initialized: what landed is compared here."""
    return "LOAD REPORT" not in record.getMessage()


# Not load_adapter(hotswap=True): it puts new tensors in the place of the old ones, and takes any key that contains the name for one of the
# adapter's.
def _swap(model: PreTrainedModel, layout: AdapterLayout, state_dict: Mapping[str, Tensor], adapter_name: str) -> None:
    parameters = _parameters(model, layout, adapter_name)
    values = as_taken(parameters, state_dict)
    _activate(model, adapter_name)  # unmerges, so before the values change
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(values[key])
    model.eval()


def _parameters(model: PreTrainedModel, layout: AdapterLayout, adapter_name: str) -> dict[str, torch.nn.Parameter]:
    modules = {PREFIX + name: module for name, module in outside_adapters(model).items()}
    return matching_parameters(model, layers_with(modules, adapter_name), layout, adapter_name)


def _activate(model: PreTrainedModel, adapter_name: str) -> None:
    """Make the adapter the only active one, unless it is: what is compiled is guarded by it."""
    layers: Any = layers_with(outside_adapters(model), adapter_name).values()
    if any(layer.active_adapters != [adapter_name] or layer.merged for layer in layers):
        set_adapter(model, adapter_name, inference_mode=True)
