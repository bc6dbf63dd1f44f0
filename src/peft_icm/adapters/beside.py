"""One more adapter on modules that carry others, in time that does not grow with their number.

`PeftModel.add_adapter` (peft 0.21) walks over all modules and parameters of a model about fifteen times, those of all of its adapters too,
and in each layer `update_layer` and `set_adapter` walk over the layer's adapters. Here peft's own `_create_and_replace` makes the adapter
in the layers that are there, and each shows it no other adapter meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .tensors import PREFIX

Layers = Mapping[str, Any]  # of peft's LoraLayer, which is a module together with nn.Module alone


def fits_beside(model: PeftModel, outside: Mapping[str, nn.Module], modules: list[str]) -> bool:
    """Whether all modules of an adapter carry LoRAs already, none is merged, and nothing but LoRA layers goes with the active adapter.

    Args:
        model (`PeftModel`): With adapters.
        outside (`Mapping[str, nn.Module]`): [`outside_adapters`] of it.
        modules (`list[str]`): Of the base, which the adapter is for.

    Returns:
        `bool`
    """
    kinds = outside.values()
    return (
        model.peft_type == "LORA"
        and all(isinstance(outside.get(PREFIX + name), LoraLayer) for name in modules)
        and not any(isinstance(module, AuxiliaryTrainingWrapper) or (isinstance(module, LoraLayer) and module.merged) for module in kinds)
    )


def active_parts(layers: Layers) -> list[Any]:
    """Modules and parameters of the active adapters: what may take gradients."""
    return [
        found[name]
        for layer in layers.values()
        for found in (getattr(layer, kind, {}) for kind in layer.adapter_layer_names)
        for name in layer.active_adapters
        if name in found
    ]


def inject_beside(model: PeftModel, layers: Layers, modules: list[str], adapter_name: str, config: LoraConfig) -> None:
    """Make an adapter in layers that carry others, and make it the active one.

    Args:
        model (`PeftModel`): One of which [`fits_beside`] is true.
        layers (`Mapping[str, LoraLayer]`): By their names, all of its LoRA layers.
        modules (`list[str]`): Of the base, which the adapter is for.
        adapter_name (`str`): Its name, which is free.
        config (`LoraConfig`): Its configuration.
    """
    model.peft_config[adapter_name] = config
    for part in active_parts(layers):
        part.requires_grad_(False)
    tuner: Any = model.base_model
    places = {PREFIX + name: name for name in modules}
    for place, layer in layers.items():
        with _alone(layer):
            if place in places:
                name = places[place]
                tuner._create_and_replace(config, adapter_name, layer, name.rpartition(".")[2], None, current_key=name)
            layer.set_adapter(adapter_name, inference_mode=config.inference_mode)
    model.active_adapter = tuner.active_adapter = adapter_name


@contextmanager
def _alone(layer: Any) -> Iterator[None]:
    """A layer as if it had no adapters; those that it is given meanwhile are added to the others."""
    others = {kind: getattr(layer, kind) for kind in layer.adapter_layer_names if isinstance(getattr(layer, kind, None), nn.Module)}
    for kind, found in others.items():
        setattr(layer, kind, type(found)())
    try:
        yield
    finally:
        for kind, found in others.items():
            found.update(getattr(layer, kind))
            setattr(layer, kind, found)
