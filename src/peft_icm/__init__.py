"""peft_icm: a sentence in, a native PEFT adapter out.

Names are imported when they are first asked for, so that `peft-icm --help` need not wait for torch. transformers' Auto classes know the
model type `icm` from then on, or at once where transformers was imported before.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters.base import untie
    from .adapters.collection import AdapterCollection
    from .adapters.layout import AdapterLayout
    from .adapters.saving import push_adapter, save_adapter
    from .bundled import bundled_generator
    from .collecting import CollectingArguments, collect
    from .conditioning import load_task_encoder
    from .evaluation.detection import evaluate_detection
    from .evaluation.text import evaluate_generator
    from .generator.configuration_icm import ICMConfig
    from .generator.modeling_icm import ICMGenerator, ICMOutput
    from .launching.arguments import LaunchArguments
    from .tasks.annotated_images import AnnotatedImage, load_coco
    from .tasks.detection import DetectionTask, detect, detection_tasks
    from .training.arguments import ICMTrainingArguments
    from .training.trainer import ICMTrainer

__version__ = "0.2.0.dev0"

_ROOMS = {
    "adapters.base": ("untie",),
    "adapters.collection": ("AdapterCollection",),
    "adapters.layout": ("AdapterLayout",),
    "adapters.saving": ("push_adapter", "save_adapter"),
    "bundled": ("bundled_generator",),
    "collecting": ("CollectingArguments", "collect"),
    "conditioning": ("load_task_encoder",),
    "conditioning.phrasings": ("phrasings",),
    "evaluation.detection": ("evaluate_detection",),
    "evaluation.text": ("evaluate_generator",),
    "generator.configuration_icm": ("ICMConfig",),
    "generator.modeling_icm": ("ICMGenerator", "ICMOutput"),
    "generator.reading": ("Reading",),
    "launching.arguments": ("LaunchArguments",),
    "tasks.annotated_images": ("AnnotatedImage", "load_coco"),
    "tasks.detection": ("DetectionTask", "detect", "detection_tasks"),
    "training.arguments": ("ICMTrainingArguments",),
    "training.trainer": ("ICMTrainer",),
    "unknown": ("UnknownTaskError", "UnknownTaskWarning"),
}
_HOMES = {name: room for room, names in _ROOMS.items() for name in names}

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
    "LaunchArguments",
    "Reading",
    "UnknownTaskError",
    "UnknownTaskWarning",
    "bundled_generator",
    "collect",
    "detect",
    "detection_tasks",
    "evaluate_detection",
    "evaluate_generator",
    "load_coco",
    "load_task_encoder",
    "phrasings",
    "push_adapter",
    "save_adapter",
    "untie",
]


def __getattr__(name: str) -> Any:
    """A public name, from the room where it lives."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module(".generator", __name__)  # registers the Auto classes
    value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__})


if "transformers" in sys.modules:
    import_module(".generator", __name__)
