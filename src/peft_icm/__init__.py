"""peft_icm: a sentence in, a native PEFT adapter out."""

from transformers import AutoConfig, AutoModel

from .adapter_layout import AdapterLayout
from .adapters import push_adapter, save_adapter, untie
from .bundled import bundled_generator
from .collecting import CollectingArguments, collect
from .collection import AdapterCollection
from .conditioning import load_task_encoder
from .configuration_icm import ICMConfig
from .detection_evaluation import evaluate_detection
from .evaluation import evaluate_generator
from .modeling_icm import ICMGenerator, ICMOutput
from .tasks.annotated_images import AnnotatedImage, load_coco
from .tasks.detection import DetectionTask, detect, detection_tasks
from .training import ICMTrainer, ICMTrainingArguments

__version__ = "0.1.0"

__all__ = [
    "AdapterCollection",
    "AdapterLayout",
    "AnnotatedImage",
    "CollectingArguments",
    "DetectionTask",
    "ICMConfig",
    "ICMGenerator",
    "ICMOutput",
    "ICMTrainer",
    "ICMTrainingArguments",
    "bundled_generator",
    "collect",
    "detect",
    "detection_tasks",
    "evaluate_detection",
    "evaluate_generator",
    "load_coco",
    "load_task_encoder",
    "push_adapter",
    "save_adapter",
    "untie",
]

AutoConfig.register("icm", ICMConfig)
AutoModel.register(ICMConfig, ICMGenerator)
