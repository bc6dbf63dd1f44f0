"""How near generated LoRA adapters are to reference ones, in what they change: dW = s BA."""

import datasets
import evaluate

from peft_icm.adapters.fidelity import compare_adapters
from peft_icm.tasks.fields import strings

_DESCRIPTION = """
Relative error ||dW - dW_ref||_F / ||dW_ref||_F and cosine <dW, dW_ref>_F / (||dW||_F ||dW_ref||_F) of pairs of PEFT LoRA adapters, over all
modules. Measured on the products dW = s BA, which a change of gauge (A -> MA, B -> BM^-1) leaves as they are; no dW is formed.
"""
_KWARGS = """
Args:
    predictions (list of str): folders or Hub ids of PEFT LoRA adapters.
    references (list of str): the same number, each of the layout of its prediction; dtypes may differ.
Returns:
    relative_error (float): mean over the pairs; 0 for the same function, 1 for an adapter that does nothing.
    cosine (float): mean over the pairs.
    relative_errors (list of float): of each pair.
    cosines (list of float): of each pair.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS)
class AdapterFidelity(evaluate.Metric):
    """See `_DESCRIPTION`."""

    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description=_DESCRIPTION, citation="", inputs_description=_KWARGS, features=features)

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Add several pairs; a single name is a list of one, not of its letters."""
        named = {"predictions": strings(predictions, "predictions"), "references": strings(references, "references")}
        super().add_batch(**named, **kwargs)

    def _compute(self, predictions, references):
        if not predictions:
            raise ValueError("predictions and references name no adapters: give one pair at least.")
        pairs = [compare_adapters(prediction, reference) for prediction, reference in zip(predictions, references, strict=True)]
        errors, cosines = ([pair[name] for pair in pairs] for name in ("relative_error", "cosine"))
        return {
            "relative_error": sum(errors) / len(pairs),
            "cosine": sum(cosines) / len(pairs),
            "relative_errors": errors,
            "cosines": cosines,
        }
