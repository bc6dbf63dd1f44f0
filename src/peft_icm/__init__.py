"""peft_icm: a sentence in, a native PEFT adapter out."""

from transformers import AutoConfig, AutoModel

from .adapter_layout import AdapterLayout
from .adapters import save_adapter
from .configuration_icm import ICMConfig
from .modeling_icm import ICMGenerator, ICMOutput

__version__ = "0.1.0"

__all__ = [
    "AdapterLayout",
    "ICMConfig",
    "ICMGenerator",
    "ICMOutput",
    "save_adapter",
]

AutoConfig.register("icm", ICMConfig)
AutoModel.register(ICMConfig, ICMGenerator)
