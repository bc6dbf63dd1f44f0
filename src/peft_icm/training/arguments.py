"""ICMTrainingArguments: in-context meta-learning of a generator on transformers' Trainer.

The procedure, where the paper only names it: an *episode* is a batch that goes round all tasks. Each of its samples is one snapshot of
its task, with a condition that is drawn anew - the mean of a random handful of the task's phrasings or examples - and with a context of
(task vector, latent) pairs from which, in half of the episodes, the task's own pair is hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ..adapters.snapshots import MAX_MEMORY_BYTES

OBJECTIVES = ("reconstruction", "task")


@dataclass
class ICMTrainingArguments(TrainingArguments):
    """Arguments of [`ICMTrainer`]: those of transformers' `TrainingArguments`, and these.

    > Parameters that control the episodes

    Args:
        objective (`str`, defaults to `"reconstruction"`): `"reconstruction"`: of the snapshots of a collection (Eqs. 2-9). `"task"`: the
            loss of the tasks' own examples on the base under the generated adapters.
        max_handful (`int`, defaults to 4): A condition is the mean of 1 to this many of its task's vectors.
        phrasings (`int`, defaults to 64): Sentences that each task should have: one with fewer gets phrasings of those it has
            ([`phrasings`]), where the trainer has an encoder that reads text. 0 for none.
        condition_noise (`float`, defaults to 0.5): Standard deviation of Gaussian noise on a condition, which stands for the wordings
            that were not collected: as a share of what wording does to task vectors where the generator has a condition space, else of
            the spread of the collection's task vectors.
        leave_out_rate (`float`, defaults to 0.5): Share of episodes in which a task's own pair is hidden from the context.
        held_out (`float`, defaults to 0.2): Share of each task's snapshots that is kept for evaluation.
        max_memory_bytes (`int`, defaults to 2 GiB): Memory for the snapshots that are read at a time, and what is computed from them,
            while the generator is fitted: more reads fewer, longer pieces of the files. The generator itself comes on top.

        condition_dropout (`float`, defaults to 0.1): `"task"` only: share of samples that are trained without a condition. What the
            generator gives then is one LoRA for all tasks.
        dataset_kwargs (`dict`, *optional*): `"task"` only: for each task's `train_dataset`, as in [`CollectingArguments`].
        fsdp (`bool`, *optional*): `"task"` only: the base is shared out over the processes that torchrun started, block by block
            (torch's `fully_shard`); a base that was passed stays so. The generator is in each of them, as without it.

    > Parameters that control the loss

    Args:
        kl_warmup_ratio (`float`, defaults to 0.1): Share of the steps over which the KL weight rises from 0 to `config.kl_weight`.
    """

    output_dir: str | None = field(default="icm-generator")
    num_train_epochs: float = field(default=200)
    per_device_train_batch_size: int = field(default=36)
    per_device_eval_batch_size: int = field(default=64)
    learning_rate: float = field(default=1e-3)
    max_handful: int = field(default=4)
    phrasings: int = field(default=64)
    condition_noise: float = field(default=0.5)
    objective: str = field(default="reconstruction")
    condition_dropout: float = field(default=0.1)
    dataset_kwargs: dict[str, Any] = field(default_factory=dict)
    leave_out_rate: float = field(default=0.5)
    held_out: float = field(default=0.2)
    max_memory_bytes: int = field(default=MAX_MEMORY_BYTES)
    kl_warmup_ratio: float = field(default=0.1)

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in ("max_handful", "max_memory_bytes", "per_device_train_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.phrasings < 0:
            raise ValueError(f"phrasings={self.phrasings} must not be negative.")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective={self.objective!r} is unknown: choose one of {', '.join(OBJECTIVES)}.")
        if self.fsdp and self.objective != "task":
            raise ValueError("fsdp=True shares out the base of objective='task'; without a base there is nothing to share.")
        for name in ("leave_out_rate", "held_out", "kl_warmup_ratio", "condition_dropout"):
            if not 0 <= getattr(self, name) < 1 and not (name == "leave_out_rate" and self.leave_out_rate == 1):
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1).")

    def __getstate__(self) -> dict[str, Any]:
        """Without the access token: the Trainer pickles its arguments beside every checkpoint."""
        return {**self.__dict__, "hub_token": None}
