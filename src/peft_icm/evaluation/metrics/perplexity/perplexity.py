"""Perplexity of a causal language model, with or without an adapter, on raw texts."""

import datasets
import evaluate

from peft_icm.tasks.fields import strings
from peft_icm.tasks.language_modeling import NLL, nll

_DESCRIPTION = """
exp of the mean negative log-likelihood of a token. Texts longer than the window are cut into overlapping windows in which every token is
scored exactly once, with at least half a window of context. Comparable only between models of one tokenizer.
"""
_KWARGS = """
Args:
    predictions (list of str): non-empty raw texts.
    model: a causal language model of transformers, or a PeftModel around one.
    tokenizer: its tokenizer.
    max_length (int, optional): window in tokens; by default the model's number of positions.
    batch_size (int, defaults to 16): windows in a forward pass.
Returns:
    perplexity (float): over all tokens of all texts.
    perplexities (list of float): of each text.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS)
class Perplexity(evaluate.Metric):
    """See `_DESCRIPTION`."""

    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string")})
        return evaluate.MetricInfo(description=_DESCRIPTION, citation="", inputs_description=_KWARGS, features=features)

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Add several texts; a single one is a list of one, not of its letters."""
        super().add_batch(predictions=strings(predictions, "predictions", blank=True), references=references, **kwargs)

    def _compute(self, predictions, model, tokenizer, max_length=None, batch_size=16):
        scores = nll(model, tokenizer, predictions, max_length=max_length, batch_size=batch_size)
        total = sum(scores, NLL(0.0, 0, 0))
        return {"perplexity": total.perplexity, "perplexities": [score.perplexity for score in scores]}
