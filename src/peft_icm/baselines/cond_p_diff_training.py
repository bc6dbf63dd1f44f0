"""Training of [`CondPDiff`] on transformers' Trainer, with the conditions of the generator's episodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Trainer

from ..adapters.collection import AdapterCollection
from ..training.arguments import ICMTrainingArguments
from ..training.episodes import EpisodeDataset, EpisodeSampler, held_out_mask
from .cond_p_diff import CondPDiff, CondPDiffConfig

REPEATS = 16


class StageTrainer(Trainer):
    """Trains one of the two stages; the weights of the other get no gradient and stay what they are.

    Args:
        model ([`CondPDiff`]): Whole.
        stage (`str`): `"autoencoder"` or `"diffusion"`.
        args ([`ICMTrainingArguments`]): With `remove_unused_columns=False`.
        dataset ([`EpisodeDataset`]): Of adapters in the first stage, of normalised latents in the second.
    """

    def __init__(self, model: CondPDiff, stage: Literal["autoencoder", "diffusion"], args: ICMTrainingArguments, dataset: EpisodeDataset):
        super().__init__(model=model, args=args, train_dataset=dataset)
        self.stage = stage

    def _get_train_sampler(self, train_dataset: Any = None) -> EpisodeSampler:
        dataset: Any = train_dataset or self.train_dataset
        return EpisodeSampler(dataset)

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The squared error of the stage."""
        if self.stage == "autoencoder":
            return model.reconstruction_loss(inputs["parameters"])
        return model.diffusion_loss(inputs["parameters"], inputs["condition"], inputs["noise"])


def train_cond_p_diff(
    collection: AdapterCollection,
    *,
    output_dir: str | Path,
    steps: int = 150,
    diffusion_steps: int = 500,
    learning_rate: float = 3e-3,
    seed: int = 0,
    config: CondPDiffConfig | None = None,
    **arguments: Any,
) -> CondPDiff:
    """Train COND P-DIFF: the autoencoder, then the diffusion over its latents.

    The snapshots that an [`ICMTrainer`] of the same arguments holds out are held out here too, and conditions are drawn as there. The
    result is a function of the collection and the seed, on one device.

    Args:
        collection (`AdapterCollection`): With task vectors.
        output_dir (`str` or `Path`): Where the model is saved.
        steps (`int`, defaults to 150): Optimizer steps of stage 1, the autoencoder. Not epochs, because what the two stages need hardly
            depends on how many snapshots there are.
        diffusion_steps (`int`, defaults to 500): The same of stage 2, the diffusion.
        learning_rate (`float`, defaults to 3e-3): The peak, in both stages.
        seed (`int`, defaults to 0): Of the weights, the episodes and the noise.
        config ([`CondPDiffConfig`], *optional*): Sizes; layout, encoder and condition_dim are filled in.
        **arguments: For [`ICMTrainingArguments`], such as `per_device_train_batch_size`, `condition_noise` or `use_cpu`.

    Returns:
        [`CondPDiff`]: In eval mode, saved in `output_dir`.

    Raises:
        `ValueError`: If the collection has no task vectors.
    """
    missing = [task for task in collection.tasks if task not in collection.task_vectors]
    if missing:
        raise ValueError(f"The collection has no task vectors for {missing[0]!r}: call collection.encode(encoder) first.")
    options = {"save_strategy": "no", "lr_scheduler_type": "cosine", "warmup_steps": 10, "logging_steps": 50, **arguments}
    options |= {"seed": seed, "learning_rate": learning_rate, "remove_unused_columns": False}

    args = ICMTrainingArguments(str(output_dir), max_steps=steps, **options)
    vectors = [collection.task_vectors[task].float() for task in collection.tasks]
    snapshots = [collection.snapshots[task].float() for task in collection.tasks]
    train = [part[~held_out_mask(len(part), args.held_out)] for part in snapshots]

    torch.manual_seed(seed)
    values = (config or CondPDiffConfig()).to_diff_dict()
    values |= {"layout": collection.layout.to_dict(), "encoder": collection.encoder, "condition_dim": vectors[0].shape[1]}
    model = CondPDiff(CondPDiffConfig(**values))
    model.fit(torch.cat(train), torch.cat(vectors))
    batch = args.train_batch_size
    StageTrainer(model, "autoencoder", args, EpisodeDataset(train, vectors, args, 1, batch)).train()

    args = ICMTrainingArguments(str(output_dir), max_steps=diffusion_steps, **options)
    model.fit_latents(torch.cat(train).to(model.device))
    # Each stands several times in an epoch, with other noise and another condition: batches of small collections are full ones too.
    latents = [model.encode(part.to(model.device)).cpu().repeat(REPEATS, 1) for part in train]
    StageTrainer(model, "diffusion", args, EpisodeDataset(latents, vectors, args, model.config.latent_size, batch)).train()

    model.config.training = {
        "snapshots": sum(len(part) for part in train),
        "steps": [steps, diffusion_steps],
        "seed": seed,
        "learning_rate": learning_rate,
    }
    model.eval()
    model.save_pretrained(output_dir)
    return model
