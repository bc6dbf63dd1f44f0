"""Task vector -> adapter: the conditional VAE, its configuration and what is called on it."""

from transformers import AutoConfig, AutoModel

from .configuration_icm import ICMConfig
from .modeling_icm import ICMGenerator, ICMOutput

__all__ = ["ICMConfig", "ICMGenerator", "ICMOutput"]

AutoConfig.register("icm", ICMConfig)
AutoModel.register(ICMConfig, ICMGenerator)
