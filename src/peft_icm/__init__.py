"""peft_icm: a sentence in, a native PEFT adapter out."""

from transformers import AutoConfig, AutoModel

from .adapter_layout import AdapterLayout
from .adapters import push_adapter, save_adapter
from .bundled import bundled_generator
from .collecting import CollectingArguments, collect
from .collection import AdapterCollection
from .conditioning import load_task_encoder
from .configuration_icm import ICMConfig
from .evaluation import evaluate_generator
from .modeling_icm import ICMGenerator, ICMOutput
from .training import ICMTrainer, ICMTrainingArguments

__version__ = "0.1.0"

__all__ = [
    "AdapterCollection",
    "AdapterLayout",
    "CollectingArguments",
    "ICMConfig",
    "ICMGenerator",
    "ICMOutput",
    "ICMTrainer",
    "ICMTrainingArguments",
    "bundled_generator",
    "collect",
    "evaluate_generator",
    "load_task_encoder",
    "push_adapter",
    "save_adapter",
]

AutoConfig.register("icm", ICMConfig)
AutoModel.register(ICMConfig, ICMGenerator)
