"""ConditionSpace: where tasks differ and wording does not. Estimated when a generator is fitted, never trained."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

SPACES = ("none", "whitening", "lda", "head")
SHRINKAGE = 0.3  # towards a multiple of the identity: phrasings of few sentences span few directions
MAX_DIRECTIONS = 128


def projected_dim(space: str | None, condition_dim: int, tasks: int) -> int:
    """m, the width of a task vector after the projection.

    Args:
        space (`str`, *optional*): One of `SPACES`; `None` as `"none"`.
        condition_dim (`int`): d.
        tasks (`int`): T.

    Returns:
        `int`: At most T - 1 for `"lda"`, T for `"head"`, else d.
    """
    if space == "lda":
        return min(condition_dim, tasks - 1)
    return tasks if space == "head" else condition_dim


class ConditionSpace(nn.Module):
    r"""Task vectors, whitened by what wording does to them, and projected onto what tells the tasks apart.

    `W` `[d, d]`, the covariance of task vectors within their tasks, pooled and shrunk: `(1 - s) W + s tr(W) / d I` with s = 0.3. Its first
    128 eigenvectors are kept; beyond them it is taken for a multiple of the identity. The projection is
    `A^T (v - c)`, with c `[d]` the mean of the tasks' means and A `[d, m]` by the kind:

    - `"whitening"`: `W^(-1/2)`;
    - `"lda"`: Fisher's discriminants, `W^(-1/2)` and then the T - 1 directions that the whitened means span;
    - `"head"`: the T weight vectors of a multinomial logistic regression.

    All are buffers that stay in fp32 whatever the weights are cast to.

    Args:
        kind (`str`): `"whitening"`, `"lda"` or `"head"`.
        condition_dim (`int`): d.
        tasks (`int`): T, at least 2.
    """

    center: Tensor
    projection: Tensor
    directions: Tensor
    deviations: Tensor
    floor: Tensor

    def __init__(self, kind: str, condition_dim: int, tasks: int):
        super().__init__()
        self.kind = kind
        kept = min(condition_dim, MAX_DIRECTIONS)
        self.register_buffer("center", torch.zeros(condition_dim, dtype=torch.float32))
        self.register_buffer("projection", torch.zeros(condition_dim, projected_dim(kind, condition_dim, tasks), dtype=torch.float32))
        self.register_buffer("directions", torch.eye(kept, condition_dim, dtype=torch.float32))
        self.register_buffer("deviations", torch.ones(kept, dtype=torch.float32))
        self.register_buffer("floor", torch.ones((), dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ConditionSpace:
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    @torch.no_grad()
    def fit(self, conditions: Tensor, tasks: Tensor) -> None:
        """Estimate everything.

        Args:
            conditions (`Tensor`): `[M, d]` task vectors.
            tasks (`Tensor`): `[M]` the index of the task of each, every task at least once.
        """
        rows = conditions.double()
        means = task_means(rows, tasks)
        self.center.copy_(means.mean(0))
        within = rows - means[tasks]
        covariance = within.T @ within / max(1, len(rows) - len(means))
        spread = covariance.trace() / len(covariance)
        if spread <= 0:  # one sentence a task: only the distances between tasks are known
            spread = (means - means.mean(0)).square().mean() / 100
        eigenvalues, vectors = torch.linalg.eigh((1 - SHRINKAGE) * covariance)
        kept = len(self.deviations)
        self.directions.copy_(vectors.flip(1)[:, :kept].T)
        self.deviations.copy_((eigenvalues.flip(0)[:kept] + SHRINKAGE * spread).sqrt())
        tail = eigenvalues.flip(0)[kept:].clamp(min=0).mean() if kept < len(eigenvalues) else 0.0
        self.floor.copy_((tail + SHRINKAGE * spread).sqrt())
        if self.kind == "head":
            from sklearn.linear_model import LogisticRegression

            weight = LogisticRegression(C=10, max_iter=1000).fit(rows - self.center.double(), tasks).coef_
            self.projection.copy_(torch.from_numpy(weight if len(weight) > 1 else [-weight[0], weight[0]]).T)
            return
        whitened = self._scaled(torch.eye(len(self.center)), -1)
        if self.kind == "lda":
            directions = torch.linalg.svd(((means.float() - self.center) @ whitened), full_matrices=False)[2]
            whitened = whitened @ directions[: self.projection.shape[1]].T
        self.projection.copy_(whitened)

    def forward(self, conditions: Tensor) -> Tensor:
        """`[..., d]` task vectors -> `[..., m]`, fp32."""
        return (conditions.float() - self.center) @ self.projection

    def whiten(self, conditions: Tensor) -> Tensor:
        """`[..., d]` -> `W^(-1/2) (v - c)`, `[..., d]` fp32: a distance of one is one standard deviation of wording."""
        return self._scaled(conditions.float() - self.center, -1)

    def colour(self, noise: Tensor) -> Tensor:
        """`[..., d]` standard normal noise -> `W^(1/2)` of it: what another wording might have added."""
        return self._scaled(noise, 1)

    def _scaled(self, rows: Tensor, power: int) -> Tensor:
        floor = self.floor**power
        return rows * floor + ((rows @ self.directions.T) * (self.deviations**power - floor)) @ self.directions


def task_means(rows: Tensor, tasks: Tensor) -> Tensor:
    """`[M, d]` rows and `[M]` task indices -> `[T, d]`."""
    count = int(tasks.max()) + 1
    sums = torch.zeros(count, rows.shape[1], dtype=rows.dtype).index_add_(0, tasks, rows)
    return sums / tasks.bincount(minlength=count)[:, None]
