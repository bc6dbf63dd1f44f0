"""Text in the report: negative log-likelihood, in nats per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..generator.modeling_icm import ICMGenerator
from ..tasks.language_modeling import NLL, LanguageModelingTask, nll
from ..tasks.records import Record
from .report import Report


class Evaluation(Report[NLL]):
    """A [`Report`] of text domains: scores are [`NLL`], gains are in nats per token."""

    unit = "nats per token"
    heading = "PPL / BPC"
    shown = ("{ppl:.2f}", "{bpc:.3f}")

    @staticmethod
    def tested_on(task: LanguageModelingTask) -> tuple[str, Sequence[Record]]:
        """Its test texts."""
        return "test texts", task.test_texts

    @staticmethod
    def score(model: Any, processor: Any, task: LanguageModelingTask, **options: Any) -> NLL:
        """Over all test texts; `options` are those of [`nll`]."""
        return Evaluation.pool(nll(model, processor, task.test_texts, progress=False, **options))

    @staticmethod
    def pool(scores: Sequence[NLL]) -> NLL:
        """Nats, tokens and characters add up."""
        return sum(scores, NLL(0.0, 0, 0))

    @staticmethod
    def numbers(score: NLL) -> dict[str, float]:
        """`nats` (per token), `ppl`, `bpc` and `gain`, which is -nats."""
        nats = score.nats_per_token
        return {"nats": nats, "ppl": score.perplexity, "bpc": score.bits_per_character, "gain": -nats}

    @staticmethod
    def to_json(score: NLL) -> float:
        """Nats per token."""
        return round(score.nats_per_token, 4)


def evaluate_generator(
    generator: ICMGenerator,
    tokenizer: Any,
    tasks: Sequence[LanguageModelingTask],
    own: Mapping[str, Tensor],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    max_length: int | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> Evaluation:
    """Score a generator on held-out text; what is scored: [`~Report.evaluate`].

    Args:
        generator ([`ICMGenerator`]): Reads text.
        tokenizer (`PreTrainedTokenizerBase`): Of its base model.
        tasks (`Sequence[LanguageModelingTask]`): With test texts.
        own (`Mapping[str, Tensor]`): `[P]`, the own LoRA of each task.
        seeds (`Sequence[int]`, defaults to `(0, 1, 2)`): Of z.
        max_length (`int`, *optional*): Window in tokens.
        batch_size (`int`, defaults to 16): Windows in a forward pass.
        progress (`bool`, defaults to `True`): Show a progress bar.

    Returns:
        [`Evaluation`]

    Raises:
        `ValueError`: If there is no task or no seed, or a task has no test text, no description or no own LoRA.

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from peft_icm import AdapterCollection, ICMGenerator, bundled_generator
    >>> from peft_icm.bundled import bundled_folder
    >>> generator = ICMGenerator.from_pretrained(bundled_generator("text"))
    >>> task = LanguageModelingTask("bible", ["continue a chapter of the Bible"], [], ["In the beginning God created the heaven."])
    >>> own = AdapterCollection.from_pretrained(bundled_folder("text") / "own").final("bible")
    >>> tokenizer = AutoTokenizer.from_pretrained(generator.load_base().name_or_path)
    >>> report = evaluate_generator(generator, tokenizer, [task], {"bible": own}, seeds=[0], progress=False)
    >>> report.variants
    ['generated', 'gibberish']
    >>> report.gain("bible", "generated") > 0
    True

    ```
    """
    return Evaluation.evaluate(
        generator, tokenizer, tasks, own, seeds=seeds, progress=progress, max_length=max_length, batch_size=batch_size
    )
