"""What generated adapters are worth: on held-out text and pictures, beside the tasks' own LoRAs and the snapshots trained on."""

from .detection import DetectionEvaluation, evaluate_detection
from .report import Report
from .text import Evaluation, evaluate_generator

__all__ = ["DetectionEvaluation", "Evaluation", "Report", "evaluate_detection", "evaluate_generator"]
