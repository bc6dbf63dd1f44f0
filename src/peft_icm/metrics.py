"""The `evaluate` metrics under the name they had in 0.1.0; they live in `peft_icm.evaluation.metrics`."""

from .evaluation.metrics import metric_path

__all__ = ["metric_path"]
