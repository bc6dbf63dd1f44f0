"""A generator on its tasks: how much of each task's own LoRA does the generated one bring?"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm

from ..adapters.attach import attach
from ..generator.modeling_icm import ICMGenerator
from ..tasks.language_modeling import NLL, LanguageModelingTask, nll
from .figures import save_figure

VARIANTS = ("generated", "unseen_phrasing", "wrong_task", "gibberish")
GIBBERISH = ("xqzv blorf wug nimp", "asdkjh qweoiu zmxncb", "lkj lkj lkj")


class Evaluation:
    """Negative log-likelihoods of held-out text under the base, each task's own LoRA and generated ones.

    `share` of a variant is `sum over tasks of (base - variant) / sum over tasks of (base - own)`, in nats per token.

    Args:
        scores (`dict[str, dict[str, NLL]]`): For each task: `base`, `own` and the variants, means over seeds and sentences.
        seeds (`list[int]`): Of z.
        seconds (`float`): What the evaluation took.
    """

    def __init__(self, scores: dict[str, dict[str, NLL]], seeds: list[int], seconds: float):
        self.scores, self.seeds, self.seconds = scores, seeds, seconds

    def share(self, variant: str) -> dict[str, float]:
        """`{"mean", "min"}`: the share over all tasks and that of the worst task."""
        gains = {task: self._gains(task, variant) for task in self.scores}
        total = sum(gain for gain, _ in gains.values()) / sum(own for _, own in gains.values())
        return {"mean": total, "min": min(gain / own for gain, own in gains.values())}

    def _gains(self, task: str, variant: str) -> tuple[float, float]:
        nats = {name: score.nats_per_token for name, score in self.scores[task].items()}
        return nats["base"] - nats[variant], nats["base"] - nats["own"]

    @property
    def variants(self) -> list[str]:
        """Those that every task has."""
        return [name for name in VARIANTS if all(name in row for row in self.scores.values())]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: nats per token of each task, and the shares."""
        rows = [
            {"name": task, **{name: round(score.nats_per_token, 4) for name, score in row.items()}} for task, row in self.scores.items()
        ]
        shares = {name: {key: round(value, 4) for key, value in self.share(name).items()} for name in self.variants}
        return {"tasks": rows, "share": shares, "seeds": self.seeds, "seconds": round(self.seconds, 1)}

    def table(self) -> str:
        """Perplexity and bits per character of base, own and generated, and the share of every variant."""
        names = ["base", "own", "generated"]
        lines = [
            f"{'':16}{'perplexity':^27}{'bits per character':^27}share of the own LoRA's gain",
            f"{'task':16}" + "".join(f"{name:>9}" for name in names) * 2 + "".join(f"{name:>17}" for name in self.variants),
        ]
        for task, row in self.scores.items():
            ppl = "".join(f"{row[name].perplexity:9.2f}" for name in names)
            bits = "".join(f"{row[name].bits_per_character:9.3f}" for name in names)
            shares = (gain / own for gain, own in (self._gains(task, variant) for variant in self.variants))
            lines.append(f"{task:16}{ppl}{bits}" + "".join(f"{share:17.2f}" for share in shares))
        lines.append(f"{'all tasks':16}{'':54}" + "".join(f"{self.share(name)['mean']:17.2f}" for name in self.variants))
        return "\n".join(lines)

    def plot(self, file: str | Path) -> None:
        """Draw the gain of each task over the base as a PNG.

        Args:
            file (`str` or `Path`): Where to.
        """
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(10, 4.5), layout="constrained")
        columns = ["own", *self.variants]
        for index, name in enumerate(columns):
            gains = [row["base"].nats_per_token - row[name].nats_per_token for row in self.scores.values()]
            axes.bar(
                [x + (index - len(columns) / 2) / (len(columns) + 1) for x in range(len(gains))],
                gains,
                1 / (len(columns) + 1),
                label=name,
            )
        axes.set_xticks(range(len(self.scores)), list(self.scores), rotation=40, ha="right")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_ylabel("gain over the base (nats per token)")
        figure.legend(loc="outside upper center", ncols=len(columns), frameon=False)
        save_figure(figure, file)


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
    """Score a generator on held-out text.

    - `generated`: from the task's first description, once for each seed.
    - `unseen_phrasing`: from each of the task's `unseen_descriptions`, the seeds taken in turn.
    - `wrong_task`: from the first description of another task, half-way round the list, once for each seed.
    - `gibberish`: from letters without meaning, one line for each seed.

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
        `ValueError`: If a task has no test text, no description or no own LoRA.
    """
    for task in tasks:
        if not task.test_texts or not task.descriptions or task.name not in own:
            raise ValueError(f"Task {task.name!r} needs test texts, a description and an own LoRA to be evaluated.")
    start = time.perf_counter()
    layout = generator.layout
    model = generator.generate_adapter(tasks[0].descriptions[0])
    scores: dict[str, dict[str, NLL]] = {}
    for index, task in enumerate(tqdm(tasks, desc="evaluating", unit="task", disable=not progress)):

        def score() -> NLL:
            results = nll(model, tokenizer, task.test_texts, max_length=max_length, batch_size=batch_size, progress=False)  # noqa: B023
            return sum(results, NLL(0.0, 0, 0))

        other = tasks[(index + max(1, len(tasks) // 2)) % len(tasks)]
        unseen = zip(task.unseen_descriptions, itertools.cycle(seeds), strict=False)
        with model.disable_adapter():
            row = {"base": score()}
        attach(model, layout, layout.unflatten(own[task.name].to(layout.torch_dtype)))
        row["own"] = score()
        row["generated"] = _mean(generator, model, ((task.descriptions[0], seed) for seed in seeds), score)
        if task.unseen_descriptions:
            row["unseen_phrasing"] = _mean(generator, model, unseen, score)
        if len(tasks) > 1:
            row["wrong_task"] = _mean(generator, model, ((other.descriptions[0], seed) for seed in seeds), score)
        row["gibberish"] = _mean(generator, model, zip(itertools.cycle(GIBBERISH), seeds, strict=False), score)
        scores[task.name] = row
    return Evaluation(scores, list(seeds), time.perf_counter() - start)


def _mean(generator: ICMGenerator, model: PeftModel, conditions: Iterable[tuple[str, int]], score: Callable[[], NLL]) -> NLL:
    """The mean score of the adapters generated from (sentence, seed) pairs, swapped in one after another."""
    total, count = NLL(0.0, 0, 0), 0
    for text, seed in conditions:
        generator.generate_adapter(text, model, generator=torch.Generator().manual_seed(seed))
        total, count = total + score(), count + 1
    return NLL(total.nats / count, total.tokens // count, total.characters // count)
