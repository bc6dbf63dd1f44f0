"""Reading: which task a generator hears in a request, how sure it is, and whether it knows the task at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .condition_space import ConditionSpace, task_means

MISSED = 0.05  # of the held-out phrasings of its own tasks, the share that a generator may take for unknown
SURE = 0.7  # probability of a task from which its mean is decoded; chosen on bundled/requests
LEFT_OUT_WEIGHT = 0.25  # of the tasks left out, among what is unknown
# What a wrong adapter costs, in what the right one gains: on the bundled text world a foreign request 1.0, another task's adapter 3.5.
# Chosen on the text world's requests in bundled/requests; see docs/results.md.
HARM = 1.5


@dataclass(frozen=True)
class Reading:
    """What a generator heard.

    Args:
        tasks (`dict[str, float]`): Probability of each task, given that it is one of them; the most probable first.
        familiarity (`float`): Probability that one of them is meant at all; of tasks and foreign requests in equal numbers.
        threshold (`float`, *optional*): Below it a request counts as unknown. Conformal: of the held-out phrasings of known tasks 5 % lie
            below. `None` where the generator could fit none; the familiarity is 1 then.
        description (`str`): The sentence of the most probable task.

    Example:

    ```python
    >>> from peft_icm import ICMGenerator, bundled_generator
    >>> reading = ICMGenerator.from_pretrained(bundled_generator("text")).read("continue a Shakespeare play")
    >>> reading.task, reading.known
    ('shakespeare', True)

    ```
    """

    tasks: dict[str, float]
    familiarity: float
    threshold: float | None
    description: str

    @property
    def task(self) -> str:
        """The most probable task."""
        return next(iter(self.tasks))

    @property
    def known(self) -> bool:
        """Whether the request is as familiar as one of the generator's tasks; taken for granted where there is no threshold."""
        return self.threshold is None or self.familiarity >= self.threshold

    @property
    def confidence(self) -> float:
        """p, the probability that the most probable task is what was meant: its own, times the familiarity."""
        return self.tasks[self.task] * self.familiarity

    @property
    def worth(self) -> float:
        r"""The strength that `on_unknown="shrink"` gives the adapter, in [0, 1].

        At strength s the right adapter gains `s (2 - s)` and a wrong one costs `h s^2`, with h = 1.5 the harm (`HARM`). Their mean under
        the confidence p is greatest at `s = p / (p + (1 - p) h)`. Without a threshold p is unknown, and the worth 1.
        """
        if self.threshold is None:
            return 1.0
        return self.confidence / (self.confidence + (1 - self.confidence) * HARM)

    def __str__(self) -> str:
        """As the CLI says it: `heard: shakespeare (0.97)`."""
        return f"heard: {self.task} ({self.confidence:.2f})"


class Familiarity(nn.Module):
    """How sure it is that a request means one of the tasks: a logistic regression on a few numbers that tell, and its threshold.

    Buffers in fp32: `weight` `[features]`, `bias`, `threshold` (negative where there is none), and `temperature`, that of the
    probabilities among the tasks.

    Args:
        features (`int`): Numbers that tell.
    """

    weight: Tensor
    bias: Tensor
    threshold: Tensor
    temperature: Tensor

    def __init__(self, features: int):
        super().__init__()
        self.register_buffer("weight", torch.zeros(features, dtype=torch.float32))
        for name, value in (("bias", 0.0), ("threshold", -1.0), ("temperature", 1.0)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Familiarity:
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def familiarity(self, features: Tensor) -> Tensor:
        """`[n, features]` -> `[n]`, in (0, 1)."""
        return (features @ self.weight + self.bias).sigmoid()

    def calibrate(self, known: Tensor, unknown: Tensor, left_out: Tensor) -> None:
        """Fit the regression, and take the conformal quantile of what is known for the threshold.

        Args:
            known (`Tensor`): `[H, features]` of held-out phrasings.
            unknown (`Tensor`): `[F, features]` of foreign requests.
            left_out (`Tensor`): `[H, features]` of held-out phrasings, as if their own tasks were not there.
        """
        from sklearn.linear_model import LogisticRegression

        rows = torch.cat([known, unknown, left_out])
        labels = [1] * len(known) + [0] * (len(unknown) + len(left_out))
        share = LEFT_OUT_WEIGHT if len(unknown) else 1.0
        parts = ((known, 0.5), (unknown, 0.5 * (1 - share)), (left_out, 0.5 * share))
        weights = torch.cat([torch.full((len(part),), weight * len(rows) / max(1, len(part))) for part, weight in parts])
        mean, deviation = rows.mean(0), rows.std(0).clamp(min=1e-6)
        model = LogisticRegression(C=1.0).fit((rows - mean) / deviation, labels, sample_weight=weights)
        self.weight.copy_(torch.from_numpy(model.coef_[0]) / deviation)
        self.bias.copy_(model.intercept_[0] - (self.weight * mean).sum())
        scores = self.familiarity(known).sort().values
        rank = int(MISSED * (len(scores) + 1))  # 0 for fewer than 19: the quantile is minus infinity then, and everything is known
        self.threshold.copy_(scores[rank - 1] if rank else torch.zeros(()))

    def temper(self, logits: Tensor, tasks: Tensor) -> None:
        """Take the temperature at which held-out phrasings are most probable: `[H, T]` logits, `[H]` their tasks."""
        temperatures = torch.logspace(-3, 2, 101)
        losses = [F.cross_entropy(logits / temperature, tasks) for temperature in temperatures]
        self.temperature.copy_(temperatures[torch.stack(losses).argmin()])


class Reader(Familiarity):
    r"""Scores task vectors against the tasks of a generator.

    Three numbers tell whether a vector v belongs to a task: its squared distance to the nearest task's mean in the whitened space, the same
    beside its distance to the mean of all tasks (the relative Mahalanobis distance, Ren et al. 2021), and its cosine to the nearest
    task's mean. A logistic regression weighs them, fitted on held-out phrasings of the tasks against foreign requests and the phrasings
    of each task left out; its probability is the familiarity. The threshold is the conformal quantile of held-out phrasings. Among the
    tasks the probability is that of Gaussians of one covariance, at the temperature that suits the held-out phrasings best.

    Buffers in fp32: those of [`Familiarity`], `means` `[T, d]` of unit length, `centers` `[T, d]` whitened.

    Args:
        condition_dim (`int`): d.
        tasks (`int`): T.
    """

    means: Tensor
    centers: Tensor

    def __init__(self, condition_dim: int, tasks: int):
        super().__init__(features=3)
        for name in ("means", "centers"):
            self.register_buffer(name, torch.zeros(tasks, condition_dim, dtype=torch.float32))

    @torch.no_grad()
    def fit(self, space: ConditionSpace, conditions: Tensor, tasks: Tensor, held_out: Tensor, held_tasks: Tensor, foreign: Tensor) -> None:
        """Estimate means, weights, temperature and threshold.

        Args:
            space ([`ConditionSpace`]): Fitted.
            conditions (`Tensor`): `[M, d]` task vectors of the tasks.
            tasks (`Tensor`): `[M]` their tasks.
            held_out (`Tensor`): `[H, d]` task vectors of the tasks that nothing was fitted on; without any there is no threshold.
            held_tasks (`Tensor`): `[H]` their tasks.
            foreign (`Tensor`): `[F, d]` task vectors of requests for something else.
        """
        means = task_means(conditions.float(), tasks)
        self.means.copy_(F.normalize(means, dim=1))
        self.centers.copy_(space.whiten(means))
        if not len(held_out):
            return
        left_out = self._features(space, held_out, held_tasks)
        self.calibrate(self._features(space, held_out), self._features(space, foreign), left_out)
        self.temper(-0.5 * torch.cdist(space.whiten(held_out), self.centers).square(), held_tasks)

    def forward(self, space: ConditionSpace, conditions: Tensor) -> tuple[Tensor, Tensor]:
        """`[n, d]` task vectors -> probabilities `[n, T]` of the tasks and familiarity `[n]`."""
        distances = torch.cdist(space.whiten(conditions), self.centers).square()
        return (-0.5 * distances / self.temperature).softmax(1), self.familiarity(self._features(space, conditions))

    @torch.no_grad()
    def settle(self, space: ConditionSpace, conditions: Tensor) -> Tensor:
        """The task vectors that requests are answered with: what wording did to them is taken out where the task is beyond doubt.

        A request that means one task, if any, with a probability of 0.7 or more (`SURE`) becomes that task's mean. In doubt it stays what
        it was: the network's own way between tasks does less harm than the wrong task's mean.

        Args:
            space ([`ConditionSpace`]): Fitted.
            conditions (`Tensor`): `[n, d]` task vectors.

        Returns:
            `Tensor`: `[n, d]` fp32; all of them as they were where there is no threshold.
        """
        best, task = self(space, conditions)[0].max(1)
        sure = (self.threshold >= 0) & (best >= SURE)
        return torch.where(sure[:, None], space.center + space.colour(self.centers[task]), conditions.float())

    def _features(self, space: ConditionSpace, conditions: Tensor, left_out: Tensor | None = None) -> Tensor:
        """`[n, 3]`; as if each row's task in `left_out` were not there."""
        whitened = space.whiten(conditions)
        distances = torch.cdist(whitened, self.centers).square()
        cosines = F.normalize(conditions.float(), dim=1) @ self.means.T
        if left_out is not None:
            own = F.one_hot(left_out, len(self.means)).bool()
            distances, cosines = distances.masked_fill(own, torch.inf), cosines.masked_fill(own, -torch.inf)
        nearest = distances.amin(1)
        return torch.stack([-nearest, whitened.square().sum(1) - nearest, cosines.amax(1)], dim=1)
