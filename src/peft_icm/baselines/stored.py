"""Baselines that look a task up by its condition and answer with something that was stored for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ..adapters.collection import AdapterCollection
from ..adapters.layout import AdapterLayout
from ..generator.sampling import Generators, as_conditions, draw_noise
from .base import tensor_bytes


class StoredAdapters(ABC):
    """Looks the task up whose description is nearest to the condition, and leaves the answer to its subclasses.

    Nearest is the highest cosine between the condition and any single task vector of the collection; the first task wins a tie, so a
    condition of zeros is answered with the first task.

    Args:
        collection ([`AdapterCollection`]): With task vectors.

    Raises:
        `ValueError`: If a task has no task vectors.
    """

    def __init__(self, collection: AdapterCollection):
        missing = [task for task in collection.tasks if task not in collection.task_vectors]
        if missing:
            raise ValueError(f"The collection has no task vectors for {missing[0]!r}: call collection.encode(encoder) first.")
        self.layout = collection.layout
        self.tasks = collection.tasks
        rows = [collection.task_vectors[task].float() for task in self.tasks]
        self.vectors = F.normalize(torch.cat(rows), dim=1)
        self.owners = torch.tensor([index for index, part in enumerate(rows) for _ in part], dtype=torch.int32)

    # ------------------------------------------------------------------ lookup
    def lookup(self, condition: Tensor) -> list[str]:
        """The task of the nearest description.

        Args:
            condition (`Tensor`): `[d]` or `[n, d]` task vectors.

        Returns:
            `list[str]`: n names.

        Raises:
            `ValueError`: If the shape is another.
        """
        return [self.tasks[index] for index in self._find(as_conditions(condition, 1, 1.0, self.vectors.shape[1])).tolist()]

    def _find(self, condition: Tensor) -> Tensor:
        """`[n, d]` -> `[n]` indices of tasks."""
        cosine = F.normalize(condition.float().to(self.vectors.device), dim=1) @ self.vectors.T
        return self.owners[cosine.argmax(1)].long()

    # ------------------------------------------------------------------ answer
    def sample(self, condition: Tensor, num_samples: int = 1, generator: Generators = None, temperature: float = 1.0) -> Tensor:
        """What is stored for the nearest task; see [`AdapterSource.sample`].

        Args:
            condition (`Tensor`): `[d]` or `[n, d]` task vectors.
            num_samples (`int`, defaults to 1): Adapters for each task vector.
            generator (`torch.Generator` or a list of them, *optional*): Of the noise, in subclasses that have some.
            temperature (`float`, defaults to 1.0): Factor on that noise.

        Returns:
            `Tensor`: `[n * num_samples, P]` fp32.

        Raises:
            `ValueError`: If a shape, the number of generators, or the temperature does not fit.
        """
        rows = as_conditions(condition, num_samples, temperature, self.vectors.shape[1])
        return self._answer(self._find(rows), generator, temperature)

    @abstractmethod
    def _answer(self, tasks: Tensor, generator: Generators, temperature: float) -> Tensor:
        """`[n]` indices of tasks -> `[n, P]` fp32."""

    @abstractmethod
    def _stored(self) -> list[Tensor]:
        """The tensors that are kept beside the task vectors."""

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored, with the task vectors and the number of the task of each."""
        return sum(tensor_bytes(tensor) for tensor in (self.vectors, self.owners, *self._stored()))


class _OneForEachTask(StoredAdapters):
    """Answers with the one vector that is kept for the task, in the dtype of the layout."""

    def __init__(self, collection: AdapterCollection):
        super().__init__(collection)
        self.adapters = torch.stack([self._make(task, collection.snapshots[task]) for task in self.tasks]).to(self.layout.torch_dtype)

    @abstractmethod
    def _make(self, task: str, snapshots: Tensor) -> Tensor:
        """`[K, P]` snapshots of a task -> the `[P]` vector that is kept."""

    def _answer(self, tasks: Tensor, generator: Generators, temperature: float) -> Tensor:
        return self.adapters[tasks].float()

    def _stored(self) -> list[Tensor]:
        return [self.adapters]


class NearestAdapter(_OneForEachTask):
    """The final LoRA of the task whose description is nearest to the condition.

    Args:
        collection ([`AdapterCollection`]): With task vectors.

    Example:

    ```python
    >>> from peft_icm import AdapterCollection, AdapterLayout
    >>> layout = AdapterLayout(("m.lora_A.weight", "m.lora_B.weight"), ((1, 3), (2, 1)), "float32", {})
    >>> collection = AdapterCollection(
    ...     layout, {"cats": torch.ones(4, 5), "dogs": torch.zeros(4, 5)}, {},
    ...     {"cats": torch.tensor([[1.0, 0.0]]), "dogs": torch.tensor([[0.0, 1.0]])},
    ... )
    >>> NearestAdapter(collection).lookup(torch.tensor([0.9, 0.1]))
    ['cats']

    ```
    """

    def _make(self, task: str, snapshots: Tensor) -> Tensor:
        return snapshots[-1]


class SnapshotMean(_OneForEachTask):
    """The mean of the snapshots of the nearest task: the uniform soup of Wortsman et al. (2022) over the snapshots of one run.

    Args:
        collection ([`AdapterCollection`]): With task vectors.
    """

    def _make(self, task: str, snapshots: Tensor) -> Tensor:
        return snapshots.float().mean(0)


class GreedySoup(_OneForEachTask):
    """The greedy soup of Wortsman et al. (2022) over the snapshots of the nearest task.

    The snapshots of a task, best first, join the soup one by one wherever its score does not fall. Scoring happens once, here: 2 K - 1
    calls for K snapshots. `ingredients` `dict[str, list[int]]` holds the snapshots that went in, in that order.

    Args:
        collection ([`AdapterCollection`]): With task vectors.
        score (`Callable[[str, Tensor], float]`): Of a task and a `[P]` fp32 adapter; higher is better. On data that is not the test
            data.

    Example:

    ```python
    >>> from peft_icm import AdapterCollection, AdapterLayout
    >>> layout = AdapterLayout(("m.lora_A.weight", "m.lora_B.weight"), ((1, 1), (1, 1)), "float32", {})
    >>> snapshots = torch.tensor([[3.0, 0.0], [9.0, 0.0], [1.0, 0.0]])
    >>> collection = AdapterCollection(layout, {"cats": snapshots}, {}, {"cats": torch.ones(1, 2)})
    >>> GreedySoup(collection, lambda task, vector: -abs(float(vector[0]) - 2)).ingredients
    {'cats': [0, 2]}

    ```
    """

    def __init__(self, collection: AdapterCollection, score: Callable[[str, Tensor], float]):
        self.score = score
        self.ingredients: dict[str, list[int]] = {}
        calls = sum(2 * len(snapshots) - 1 for snapshots in collection.snapshots.values())
        with tqdm(total=calls, desc="greedy soup", unit="score") as self._bar:
            super().__init__(collection)

    def _make(self, task: str, snapshots: Tensor) -> Tensor:
        def score(vector: Tensor) -> float:
            self._bar.update()
            return self.score(task, vector)

        snapshots = snapshots.float()
        scores = [score(snapshot) for snapshot in snapshots]
        order = sorted(range(len(scores)), key=lambda index: scores[index], reverse=True)
        chosen, best = order[:1], scores[order[0]]
        for index in order[1:]:
            found = score(snapshots[[*chosen, index]].mean(0))
            if found >= best:
                chosen, best = [*chosen, index], found
        self.ingredients[task] = chosen
        return snapshots[chosen].mean(0)


class NoisySnapshot(NearestAdapter):
    """The final LoRA of the nearest task plus Gaussian noise.

    The standard deviation of the noise is `scale` times that of the tensor it falls on; a tensor of one value stays what it is.

    Args:
        collection ([`AdapterCollection`]): With task vectors.
        scale (`float`, defaults to 0.1): Of the noise, as a share of each tensor's own standard deviation.

    Raises:
        `ValueError`: If `scale` is negative.
    """

    def __init__(self, collection: AdapterCollection, scale: float = 0.1):
        if scale < 0:
            raise ValueError(f"scale={scale} must not be negative: it is a share of each tensor's standard deviation.")
        super().__init__(collection)
        self.scale = scale

    def _answer(self, tasks: Tensor, generator: Generators, temperature: float) -> Tensor:
        finals = self.adapters[tasks].float()
        parts = finals.split(self.layout.sizes, dim=1)
        spread = torch.cat([part.std(1, correction=0, keepdim=True).expand_as(part) for part in parts], dim=1)
        noise = draw_noise(len(finals), self.layout.numel, generator)
        return finals + temperature * self.scale * spread * noise


class CoordinateGaussian(SnapshotMean):
    """A sample of the Gaussian of every coordinate over the snapshots of the nearest task.

    The coordinates are drawn independently, with the mean and the (biased) standard deviation of the task's K snapshots.

    Args:
        collection ([`AdapterCollection`]): With task vectors.
    """

    def __init__(self, collection: AdapterCollection):
        super().__init__(collection)
        spread = [collection.snapshots[task].float().std(0, correction=0) for task in self.tasks]
        self.spread = torch.stack(spread).to(self.layout.torch_dtype)

    def _answer(self, tasks: Tensor, generator: Generators, temperature: float) -> Tensor:
        noise = draw_noise(len(tasks), self.layout.numel, generator)
        return self.adapters[tasks].float() + temperature * self.spread[tasks].float() * noise

    def _stored(self) -> list[Tensor]:
        return [self.adapters, self.spread]


class SingleAdapter:
    """One LoRA for every condition, such as a multi-task LoRA.

    Args:
        layout ([`AdapterLayout`]): Of the adapter.
        vector (`Tensor`): `[P]`; kept in the dtype of the layout.

    Raises:
        `ValueError`: If the vector has another shape.

    Example:

    ```python
    >>> from peft_icm import AdapterLayout
    >>> layout = AdapterLayout(("m.lora_A.weight", "m.lora_B.weight"), ((1, 3), (2, 1)), "float32", {})
    >>> SingleAdapter(layout, torch.ones(5)).sample(torch.randn(2, 8), num_samples=3).shape
    torch.Size([6, 5])

    ```
    """

    def __init__(self, layout: AdapterLayout, vector: Tensor):
        if tuple(vector.shape) != (layout.numel,):
            raise ValueError(f"Expected a vector of shape ({layout.numel},), found {tuple(vector.shape)}.")
        self.layout = layout
        self.vector = vector.to(layout.torch_dtype)

    def sample(self, condition: Tensor, num_samples: int = 1, generator: Generators = None, temperature: float = 1.0) -> Tensor:
        """The adapter, once for each sample that is wanted; see [`AdapterSource.sample`].

        Args:
            condition (`Tensor`): `[d]` or `[n, d]` task vectors: only their number is read.
            num_samples (`int`, defaults to 1): Adapters for each task vector.
            generator (`torch.Generator` or a list of them, *optional*): Not used.
            temperature (`float`, defaults to 1.0): Not used.

        Returns:
            `Tensor`: `[n * num_samples, P]` fp32.

        Raises:
            `ValueError`: If the shape, `num_samples` or `temperature` does not fit.
        """
        return self.vector.float().repeat(len(as_conditions(condition, num_samples, temperature)), 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the one adapter."""
        return tensor_bytes(self.vector)


class MeanOverTasks(SingleAdapter):
    """The mean of the final LoRAs of all tasks, whatever the condition: the uniform soup of Wortsman et al. (2022) over tasks.

    Args:
        collection ([`AdapterCollection`]): Task vectors are not needed.
    """

    def __init__(self, collection: AdapterCollection):
        super().__init__(collection.layout, torch.stack([collection.final(task).float() for task in collection.tasks]).mean(0))
