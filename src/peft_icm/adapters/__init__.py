"""Tensors <-> vector <-> PeftModel: the layout of a LoRA, attaching and saving it, and collections of many."""

from .attach import attach
from .base import load_base, share_tensors, untie
from .collection import AdapterCollection
from .layout import AdapterLayout
from .saving import push_adapter, save_adapter

__all__ = ["AdapterCollection", "AdapterLayout", "attach", "load_base", "push_adapter", "save_adapter", "share_tensors", "untie"]
