"""ICMGenerator: the conditional VAE that turns a task vector into an adapter."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..hub.cards import generator_card
from ..hub.files import BASE_FOLDER, REPORT, copy_base, push_folder
from .configuration_icm import ICMConfig
from .generation import AdapterMixin
from .networks import NETWORKS, ContextAttention, Statistics
from .sampling import Generators, as_conditions, draw_noise

ENCODER_FOLDER = "encoder"


@dataclass
class ICMOutput(ModelOutput):
    """What [`ICMGenerator.forward`] returns.

    Args:
        loss (`Tensor`): `[]`, reconstruction loss plus `kl_weight` times the KL divergence, mean over the batch (Eq. 8).
        reconstruction_loss (`Tensor`): `[]`, the first term; for `"principal"` with the squared error of a z from the prior.
        kl_loss (`Tensor`): `[]`, KL(q(z | l, v) || N(0, I)) in nats, summed over the latent, mean over the batch.
        squared_error (`Tensor`): `[B]`, mean squared error of each sample in pooled, normalised units.
        reconstruction (`Tensor`): `[B, P]`, in the units of the adapters.
        latent_mean (`Tensor`): `[B, k]`, mean of the posterior.
        latent_logvar (`Tensor`): `[B, k]`, log-variance of the posterior.
    """

    loss: Tensor | None = None
    reconstruction_loss: Tensor | None = None
    kl_loss: Tensor | None = None
    squared_error: Tensor | None = None
    reconstruction: Tensor | None = None
    latent_mean: Tensor | None = None
    latent_logvar: Tensor | None = None


class ICMGenerator(AdapterMixin, PreTrainedModel):
    r"""A conditional VAE over LoRA adapters: a task vector in, a native `PeftModel` out.

    Implements In-Context Meta LoRA Generation, Eqs. 2-9, in two architectures ([`ICMConfig`]).

    Example:

    ```python
    >>> from peft_icm import ICMGenerator, bundled_generator
    >>> generator = ICMGenerator.from_pretrained(bundled_generator("text"))
    >>> model = generator.generate_adapter("continue a Shakespeare play")
    >>> type(model).__name__
    'PeftModelForCausalLM'

    ```
    """

    config: ICMConfig
    config_class = ICMConfig  # transformers cannot read the annotation, a string under PEP 563
    base_model_prefix = "icm"
    main_input_name = "parameters"
    accepts_loss_kwargs = False
    _keep_in_fp32_modules_strict = ["statistics"]  # noqa: RUF012 - transformers reads a plain list
    _no_split_modules: list[str] = []  # noqa: RUF012

    def __init__(self, config: ICMConfig):
        super().__init__(config)
        self.layout = config.adapter_layout
        self.statistics = Statistics(self.layout.sizes, config.condition_dim)
        self.network = NETWORKS[config.architecture](config)
        self.context = ContextAttention(config) if config.context and config.tasks else None
        self._source, self._lazy = {}, {}
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Modules come initialised; only the context's way out starts at zero."""
        if isinstance(module, ContextAttention):
            torch.nn.init.zeros_(module.output.weight)

    # ------------------------------------------------------------------ the CVAE
    def forward(
        self,
        parameters: Tensor,
        condition: Tensor,
        hidden_tasks: Tensor | None = None,
        noise: Tensor | None = None,
        return_loss: bool = True,
    ) -> ICMOutput:
        """Encode, draw z, decode, and score (Eqs. 2-8).

        Args:
            parameters (`Tensor`): `[B, P]` adapters l, in their own units.
            condition (`Tensor`): `[B, d]` task vectors v.
            hidden_tasks (`Tensor`, *optional*): `[B]` index of the task whose pair the context leaves out; -1 for none.
            noise (`Tensor`, *optional*): `[B, k]`, the epsilon of Eq. 4, and z itself where it is drawn from the prior; drawn where it
                is not given.
            return_loss (`bool`, defaults to `True`): There for the Trainer, which asks for it.

        Returns:
            [`ICMOutput`]
        """
        l, v = self.statistics.normalize(parameters), self._condition(condition)
        mean, logvar = (part.float() for part in self.network.encode(l.to(self.dtype), v))
        noise = torch.randn_like(mean) if noise is None else noise
        z = mean + (0.5 * logvar).exp() * noise
        decoded = self._decode(z, v, hidden_tasks)
        squared_error = (decoded - l).square().mean(1)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1)
        reconstruction_loss, kl_loss = self.network.reconstruction_loss(squared_error).mean(), kl.mean()
        if self.network.prior_weight:
            prior_error = (self._decode(noise, v, hidden_tasks) - l).square().mean()
            reconstruction_loss = reconstruction_loss + self.network.prior_weight * prior_error
        return ICMOutput(
            loss=reconstruction_loss + self.config.kl_weight * kl_loss,
            reconstruction_loss=reconstruction_loss,
            kl_loss=kl_loss,
            squared_error=squared_error,
            reconstruction=self.statistics.denormalize(decoded),
            latent_mean=mean,
            latent_logvar=logvar,
        )

    def _condition(self, condition: Tensor) -> Tensor:
        return self.statistics.normalize_condition(condition.to(self.device)).to(self.dtype)

    def _decode(self, z: Tensor, v: Tensor, hidden_tasks: Tensor | None = None) -> Tensor:
        """`[B, k]`, normalised `[B, d]` -> normalised `[B, P]`, fp32."""
        if self.context is not None:
            v = self.context(v, hidden_tasks)
        return self.network.decode(z.to(v.dtype), v).float()

    def decode(self, latent: Tensor, condition: Tensor) -> Tensor:
        """The mean of p(l | z, v) (Eq. 6).

        Args:
            latent (`Tensor`): `[B, k]` z.
            condition (`Tensor`): `[B, d]` task vectors.

        Returns:
            `Tensor`: `[B, P]` fp32, in the units of the adapters.
        """
        decoded = self._decode(latent, self._condition(condition))
        return self.statistics.denormalize(decoded, out=None if torch.is_grad_enabled() else decoded)

    @torch.no_grad()
    def fit(self, parameters: Tensor, conditions: Tensor) -> None:
        """Estimate what is not trained - statistics and principal subspace - from a training collection.

        Args:
            parameters (`Tensor`): `[N, P]` snapshots of all tasks.
            conditions (`Tensor`): `[M, d]` their task vectors.
        """
        self.statistics.fit(parameters, conditions)
        self.network.fit(self.statistics.normalize(parameters).to(self.dtype))

    @torch.no_grad()
    def remember(self, parameters: Sequence[Tensor], conditions: Tensor) -> None:
        """Refresh the context's (task vector, latent) pairs.

        Args:
            parameters (`Sequence[Tensor]`): `[K, P]` snapshots of each task, in the order of `config.tasks`.
            conditions (`Tensor`): `[T, d]` mean task vector of each task.
        """
        if self.context is None:
            return
        v = self._condition(conditions)
        self.context.conditions.copy_(v)
        for index, snapshots in enumerate(parameters):
            l = self.statistics.normalize(snapshots.to(self.device)).to(self.dtype)
            mean, _ = self.network.encode(l, v[index].expand(len(l), -1))
            self.context.latents[index] = mean.mean(0)

    @torch.no_grad()
    def sample(self, condition: Tensor, num_samples: int = 1, generator: Generators = None, temperature: float = 1.0) -> Tensor:
        """Draw adapters: `z ~ N(0, temperature^2 I)`, decoded with the task vector (Eq. 9).

        Args:
            condition (`Tensor`): `[d]` or `[n, d]` task vectors.
            num_samples (`int`, defaults to 1): Adapters for each task vector.
            generator (`torch.Generator` or a list of them, *optional*): One for all, or one for each adapter. The same seed gives the
                same adapter, alone or in a batch.
            temperature (`float`, defaults to 1.0): Standard deviation of z; 0 decodes the prior's mode.

        Returns:
            `Tensor`: `[n * num_samples, P]` fp32, in the units of the adapters; the samples of one task vector stand together.

        Raises:
            `ValueError`: If a shape, the number of generators, or the temperature does not fit.
        """
        rows = as_conditions(condition, num_samples, temperature, self.config.condition_dim)
        return self.decode(draw_noise(len(rows), self.config.latent_size, generator, self.device) * temperature, rows)

    # ------------------------------------------------------------------ disk and Hub
    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *model_args: Any, **kwargs: Any
    ) -> ICMGenerator:
        """Load a generator from a folder or the Hub.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): `"org/name"` or a folder.
            **kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`, `dtype`, `device_map`, as in transformers.

        Returns:
            [`ICMGenerator`]: In eval mode. Its encoder and base model are loaded when they are first needed.

        Raises:
            `OSError`: If the repo, the revision or the files can't be found.
            `ValueError`: If the weights are corrupted.
        """
        names = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
        source = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        try:
            model = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        except SafetensorError as error:
            raise ValueError(
                f"model.safetensors of {pretrained_model_name_or_path} is corrupted ({error}). Download or save it again."
            ) from error
        generator = model[0] if isinstance(model, tuple) else model
        generator._source = {"name": str(pretrained_model_name_or_path), **source}
        return model

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], *, with_base_model: bool = False, **kwargs: Any
    ) -> None:
        """Save config, weights and, where it is small, the task encoder: the folder stands on its own.

        Args:
            save_directory (`str` or `Path`): The folder.
            with_base_model (`bool`, defaults to `False`): Copy a base model that is a local folder into `base_model/`, as
                [`~ICMGenerator.push_to_hub`] does.
            **kwargs: As in transformers.
        """
        live = self.config.encoder
        if live and live.get("folder"):
            if kwargs.get("is_main_process", True):
                self.encoder.save_pretrained(Path(save_directory) / ENCODER_FOLDER)
            # Where this generator found its encoder may be outside of the folder; what is saved has its own.
            self.config.encoder = {**live, "folder": ENCODER_FOLDER}
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.config.encoder = live
        if with_base_model:
            self._copy_base_model(Path(save_directory))

    def _copy_base_model(self, folder: Path) -> None:
        named = self.config.base_model_subfolder or self.layout.base_model_name_or_path
        base = self._own_base()[0] if named else None
        if base is None or not os.path.isdir(base):
            return
        copy_base(base, folder)
        config = ICMConfig.from_pretrained(folder)
        config.base_model_subfolder = BASE_FOLDER
        config.layout = {**self.layout.to_dict(), "base_model_name_or_path": None}
        config.save_pretrained(folder)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload ICMGenerator",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        overwrite_card: bool = False,
        report: Mapping[str, Any] | None = None,
    ) -> CommitInfo:
        """Push the generator in one commit, with a card that tells what is known and nothing else.

        A base model that is a local folder travels along in `base_model/`. A card that was edited by hand on the Hub is kept.

        Args:
            repo_id (`str`): `"org/name"`; created where it does not exist.
            commit_message (`str`, defaults to `"Upload ICMGenerator"`): Message of the commit.
            private (`bool`, *optional*): Create a private repo.
            token (`str` or `bool`, *optional*): Access token; by default the stored one.
            revision (`str`, *optional*): Branch.
            create_pr (`bool`, defaults to `False`): Open a pull request instead of committing.
            overwrite_card (`bool`, defaults to `False`): Replace a card that was edited by hand.
            report (`Mapping`, *optional*): What [`memorisation_report`] returned: goes along as `memorisation.json`, and its means into
                the card.

        Returns:
            `huggingface_hub.CommitInfo`: Of the one commit.
        """

        def write(folder: Path) -> None:
            self.save_pretrained(folder, with_base_model=True)
            if report is not None:
                (folder / REPORT).write_text(json.dumps(report, indent=1), encoding="utf-8")

        return push_folder(
            write,
            repo_id,
            card=lambda folder: generator_card(ICMConfig.from_pretrained(folder).to_dict(), repo_id=repo_id, folder=folder, report=report),
            commit_message=commit_message,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            overwrite_card=overwrite_card,
        )
