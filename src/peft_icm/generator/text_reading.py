"""The reader of generators whose network sees task vectors as they are: it reads sentences, and what is beside them is not its business."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .condition_space import ConditionSpace, task_means
from .reading import Familiarity

DIRECTIONS = 64  # that are kept; 128 read the nouns that choose settings no better, and weigh twice as much


class TextReader(Familiarity):
    r"""Scores the task vectors of sentences against the tasks of a `"direct"` generator; nothing of it reaches the network.

    Sentences are whitened by what wording does to them ([`ConditionSpace`]) and kept in the 64 directions that hold most of the
    sentences trained on. Two numbers tell whether one belongs to a task: its cosine there to the nearest task's mean, and by how much that
    exceeds the cosine to the second. Regression and threshold are as those of [`Reader`]. Among hundreds of tasks this tells more
    than distances do, and takes less room; the probability of a task is the softmax of the cosines.

    Buffers in fp32: those of [`Familiarity`], `center` `[d]`, `projection` `[d, r]`, `centers` `[T, r]` of unit length.

    Args:
        text_dim (`int`): d, the width of a sentence's vector.
        tasks (`int`): T, at least 2.
    """

    center: Tensor
    projection: Tensor
    centers: Tensor

    def __init__(self, text_dim: int, tasks: int):
        super().__init__(features=2)
        kept = min(text_dim, DIRECTIONS)
        for name, shape in (("center", (text_dim,)), ("projection", (text_dim, kept)), ("centers", (tasks, kept))):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32))

    @torch.no_grad()
    def fit(self, conditions: Tensor, tasks: Tensor, held_out: Tensor, held_tasks: Tensor, foreign: Tensor) -> None:
        """Estimate everything.

        Args:
            conditions (`Tensor`): `[M, d]` vectors of sentences of the tasks.
            tasks (`Tensor`): `[M]` their tasks.
            held_out (`Tensor`): `[H, d]` vectors of sentences of the tasks that nothing was fitted on.
            held_tasks (`Tensor`): `[H]` their tasks.
            foreign (`Tensor`): `[F, d]` vectors of requests for something else.
        """
        space = ConditionSpace("whitening", len(self.center), len(self.centers))
        space.fit(conditions, tasks)
        white = space(conditions).double()
        directions = torch.linalg.eigh(white.T @ white).eigenvectors.flip(1)[:, : self.projection.shape[1]]
        self.center.copy_(space.center)
        self.projection.copy_(space.projection.double() @ directions)
        self.centers.copy_(self._project(task_means(conditions.float(), tasks)))
        known = self._cosines(held_out)
        # As if the task of each were not there: -1 is as far as a cosine can be.
        left_out = known.masked_fill(F.one_hot(held_tasks, len(self.centers)).bool(), -1.0)
        self.calibrate(_features(known), _features(self._cosines(foreign)), _features(left_out))
        self.temper(known, held_tasks)

    def forward(self, conditions: Tensor) -> tuple[Tensor, Tensor]:
        """`[n, D]` task vectors, whose first d numbers are the sentence's -> probabilities `[n, T]` of the tasks and familiarity `[n]`."""
        cosines = self._cosines(conditions[:, : len(self.center)])
        return (cosines / self.temperature).softmax(1), self.familiarity(_features(cosines))

    def _cosines(self, conditions: Tensor) -> Tensor:
        return self._project(conditions) @ self.centers.T

    def _project(self, conditions: Tensor) -> Tensor:
        return F.normalize((conditions.float() - self.center) @ self.projection, dim=1)


def _features(cosines: Tensor) -> Tensor:
    """`[n, T]` -> `[n, 2]`: the largest, and by how much it exceeds the second."""
    first, second = cosines.topk(2, dim=1).values.unbind(1)
    return torch.stack([first, first - second], dim=1)
