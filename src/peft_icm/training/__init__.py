"""Collection -> generator: in-context meta-learning on transformers' Trainer."""

from .arguments import ICMTrainingArguments
from .trainer import ICMTrainer

__all__ = ["ICMTrainer", "ICMTrainingArguments"]
