"""Episodes of snapshots: in-context meta-learning of a generator.

The procedure, where the paper only names it: an *episode* is a batch that goes round all tasks. Each of its samples is one snapshot of
its task, with a condition that is drawn anew - the mean of a random handful of the task's phrasings or examples - and with a context of
(task vector, latent) pairs from which, in half of the episodes, the task's own pair is hidden.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..adapters.snapshots import TaskSnapshots
from ..generator.condition_space import ConditionSpace
from .arguments import ICMTrainingArguments

Key = tuple[int, int, int, int]  # epoch, position in the epoch, task, snapshot


def seeded(*parts: int | str) -> torch.Generator:
    """A generator whose seed is a hash of all parts: what is drawn for one seed and epoch never meets that of another."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class EpisodeDataset(Dataset[dict[str, Tensor]]):
    """Snapshots with conditions, context and noise that are a function of (seed, epoch, position) alone.

    That makes a run the same on one process or two, and the same when it is resumed.

    Args:
        snapshots (`Sequence[Tensor or TaskSnapshots]`): `[K, P]` of each task, or what stands for them.
        task_vectors (`list[Tensor]`): `[M, d]` of each task.
        args ([`ICMTrainingArguments`]): Seed, handful, noise.
        latent_size (`int`): k.
        batch_size (`int`): Samples in an episode.
        space ([`ConditionSpace`], *optional*): What wording does to task vectors.
        name (`str`, defaults to `"parameters"`): What a snapshot is called in a sample: `"coordinates"` where it is projected.
        variances (`Sequence[Tensor]`, *optional*): `[K]` of each task, a `"variance"` for each sample.
    """

    def __init__(
        self,
        snapshots: Sequence[Tensor | TaskSnapshots],
        task_vectors: list[Tensor],
        args: ICMTrainingArguments,
        latent_size: int,
        batch_size: int,
        space: ConditionSpace | None = None,
        name: str = "parameters",
        variances: Sequence[Tensor] | None = None,
    ):
        self.snapshots, self.task_vectors, self.args, self.space = snapshots, task_vectors, args, space
        self.latent_size, self.batch_size, self.name, self.variances = latent_size, batch_size, name, variances
        rows = torch.cat(task_vectors)
        self.unit_rows = bool((rows.norm(dim=1) - 1).abs().max() < 1e-3)
        self.spread = float((rows - rows.mean(0)).std(correction=0))

    def __len__(self) -> int:
        return sum(len(part) for part in self.snapshots)

    def __getitem__(self, key: Key) -> dict[str, Tensor]:
        epoch, position, task, snapshot = key
        draw = seeded(self.args.seed, epoch, "sample", position)
        noise = torch.randn(self.latent_size, generator=draw)
        vectors = self.task_vectors[task]
        handful = int(torch.randint(1, self.args.max_handful + 1, (), generator=draw))
        condition = vectors[torch.randperm(len(vectors), generator=draw)[:handful]].mean(0)
        if self.unit_rows:
            condition = condition / condition.norm()
        hide = False
        if epoch >= 0:
            noise_of_words = torch.randn(condition.shape, generator=draw)
            noise_of_words = self.spread * noise_of_words if self.space is None else self.space.colour(noise_of_words)
            condition = condition + self.args.condition_noise * noise_of_words
            episode = seeded(self.args.seed, epoch, "episode", position // self.batch_size)
            hide = bool(torch.rand((), generator=episode) < self.args.leave_out_rate)
        return {
            self.name: self.snapshots[task][snapshot],
            **({} if self.variances is None else {"variance": self.variances[task][snapshot]}),
            "condition": condition,
            "hidden_tasks": torch.tensor(task if hide else -1),
            "noise": noise,
        }


class EpisodeSampler(Sampler[Key]):
    """Goes round the tasks in a fresh random order, each with its next snapshot in a fresh random order.

    A task with fewer snapshots begins anew, so that each is seen equally often. Epoch -1 is the evaluation: in order, once.
    """

    def __init__(self, dataset: EpisodeDataset, evaluate: bool = False):
        self.dataset, self.epoch, self.evaluate = dataset, -1 if evaluate else 0, evaluate

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer."""
        self.epoch = -1 if self.evaluate else epoch

    def __len__(self) -> int:
        counts = [len(part) for part in self.dataset.snapshots]
        return sum(counts) if self.evaluate else max(counts) * len(counts)

    def __iter__(self) -> Iterator[Key]:
        counts = [len(part) for part in self.dataset.snapshots]
        if self.evaluate:
            pairs = [(task, index) for task, count in enumerate(counts) for index in range(count)]
        else:
            draw = seeded(self.dataset.args.seed, self.epoch, "order")
            orders = [torch.randperm(count, generator=draw).tolist() for count in counts]
            rounds = [torch.randperm(len(counts), generator=draw).tolist() for _ in range(max(counts))]
            pairs = [(task, orders[task][turn % counts[task]]) for turn, tasks in enumerate(rounds) for task in tasks]
        for position, (task, index) in enumerate(pairs):
            yield self.epoch, position, task, index


def held_out_mask(count: int, share: float) -> Tensor:
    """`[count]` booleans: every (1 / share)-th snapshot, from the middle of its stride; none of a single snapshot."""
    mask = torch.zeros(count, dtype=torch.bool)
    held = min(round(count * share), count - 1)
    if held:
        mask[((torch.arange(held) + 0.5) * count / held).long()] = True
    return mask
