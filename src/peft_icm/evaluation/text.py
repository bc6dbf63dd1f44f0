"""Text in the report: negative log-likelihood, in nats per token, and what is answered to prompts."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor

from ..generator.modeling_icm import ICMGenerator
from ..launching.arguments import HERE, LaunchArguments
from ..tasks.answers import answers
from ..tasks.fields import strings
from ..tasks.language_modeling import NLL, LanguageModelingTask, nll
from ..tasks.records import Record
from .metrics import metric_path
from .report import Report, rounded


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


@dataclass
class Answered:
    """What a model makes of completions.

    Args:
        nll ([`NLL`]): Of the completions, given their prompts.
        answers (`int`): Answers that it generated.
        metrics (`dict[str, float]`): Of them, each a mean: `exact_match`, the share that is as it should be but for white space around
            it, and those that were asked for.
    """

    nll: NLL
    answers: int
    metrics: dict[str, float]


class AnswersEvaluation(Report[Answered]):
    """A [`Report`] of prompts and completions, or of conversations: scores are [`Answered`], gains are in nats per token."""

    unit = Evaluation.unit
    heading = "PPL / exact match"
    shown = ("{ppl:.2f}", "{exact_match:.2f}")
    tested_on = staticmethod(Evaluation.tested_on)

    @staticmethod
    def score(model: Any, processor: Any, task: Any, *, metrics: Sequence[str] = (), batch_size: int = 16, **options: Any) -> Answered:
        """Over all test records; `metrics` are names for [`load_metric`], the other options those of [`nll`]."""
        given = answers(model, processor, task.test_texts, batch_size=batch_size, progress=False)
        wanted = [record.answer for record in task.test_texts]
        same = [one.strip() == other.strip() for one, other in zip(given, wanted, strict=True)]
        found = {"exact_match": sum(same) / len(same)}
        for name in strings(metrics, "metrics"):
            try:
                computed = load_metric(name).compute(predictions=given, references=wanted)
            except TypeError as error:
                raise ValueError(f"The metric {name} cannot be computed from answers and references alone: {error}") from error
            found |= {part: float(value) for part, value in computed.items() if isinstance(value, Real)}
        return Answered(Evaluation.score(model, processor, task, batch_size=batch_size, **options), len(given), found)

    @staticmethod
    def pool(scores: Sequence[Answered]) -> Answered:
        """Likelihoods add up; of a metric it is the mean over all answers."""
        count = sum(score.answers for score in scores)
        means = {name: sum(score.answers * score.metrics[name] for score in scores) / count for name in scores[0].metrics}
        return Answered(Evaluation.pool([score.nll for score in scores]), count, means)

    @staticmethod
    def numbers(score: Answered) -> dict[str, float]:
        """The metrics, and those of [`Evaluation`]."""
        return {**score.metrics, **Evaluation.numbers(score.nll)}

    @staticmethod
    def to_json(score: Answered) -> dict[str, float | None]:
        """Nats per token, and the metrics."""
        return {"nats": Evaluation.to_json(score.nll), **rounded(score.metrics)}

    def table(self) -> str:
        """That of a [`Report`], and of each metric that was asked for the mean over all tasks."""
        columns = ["base", "own", *self.variants]
        pooled = [self.pool([row[name] for row in self.scores.values()]).metrics for name in columns]
        more = [f"{name:16}" + "".join(f"{part[name]:>18.3f}" for part in pooled) for name in pooled[0] if name != "exact_match"]
        return "\n".join([super().table(), *(["", "Of the answers to all tasks:"] if more else []), *more])


@functools.cache
def load_metric(name: str) -> Any:
    """A metric of `evaluate`: a bundled one, or whatever `evaluate.load` finds under the name, whose code it runs.

    Args:
        name (`str`): Of it.

    Returns:
        `evaluate.EvaluationModule`

    Raises:
        `ValueError`: If a package that it needs is missing.
        `OSError`: If there is none of that name.
    """
    import evaluate

    try:
        known = metric_path(name)
    except ValueError:
        known = name
    try:
        return evaluate.load(known)
    except ImportError as error:
        raise ValueError(f"The metric {name} needs more packages: {error}") from error


def evaluate_generator(
    generator: ICMGenerator,
    tokenizer: Any,
    tasks: Sequence[LanguageModelingTask],
    own: Mapping[str, Tensor],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    max_length: int | None = None,
    batch_size: int = 16,
    metrics: Sequence[str] = (),
    progress: bool = True,
    launching: LaunchArguments = HERE,
) -> Evaluation | AnswersEvaluation:
    """Score a generator on held-out text; what is scored: [`~Report.evaluate`].

    Where all that is held out are completions or conversations, they are answered too, greedily.

    Args:
        generator ([`ICMGenerator`]): Reads text.
        tokenizer (`PreTrainedTokenizerBase`): Of its base model.
        tasks (`Sequence[LanguageModelingTask]`): With test texts.
        own (`Mapping[str, Tensor]`): `[P]`, the own LoRA of each task.
        seeds (`Sequence[int]`, defaults to `(0, 1, 2)`): Of z.
        max_length (`int`, *optional*): Window in tokens.
        batch_size (`int`, defaults to 16): Windows, or prompts, in a forward pass.
        metrics (`Sequence[str]`): Of the answers, beside exact match: names for [`load_metric`].
        progress (`bool`, defaults to `True`): Show a progress bar.
        launching ([`LaunchArguments`], *optional*): Where tasks are scored; by default one after the other in this process.

    Returns:
        [`Evaluation`] or [`AnswersEvaluation`]

    Raises:
        `ValueError`: If there is no task or no seed, or a task has no test text, no description or no own LoRA; or if there are metrics and
            a task whose test texts are no prompts.
        `OSError`: If there is no Ray cluster at the address, or a task failed in another process.

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
    metrics = strings(metrics, "metrics")
    options: dict[str, Any] = {"seeds": seeds, "progress": progress, "launching": launching}
    options |= {"max_length": max_length, "batch_size": batch_size}
    plain = [task.name for task in tasks if any(isinstance(text, str) for text in task.test_texts)]
    if not plain:
        for name in metrics:
            load_metric(name)  # what is no metric is told before anything is scored
        return AnswersEvaluation.evaluate(generator, tokenizer, tasks, own, metrics=metrics, **options)
    if metrics:
        raise ValueError(f"The metric {metrics[0]} is of answers to prompts, task {plain[0]!r} has none among its test texts.")
    return Evaluation.evaluate(generator, tokenizer, tasks, own, **options)
