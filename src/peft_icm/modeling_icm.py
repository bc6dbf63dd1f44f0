"""ICMGenerator: the conditional VAE that turns a task vector into an adapter."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .adapters import attach, load_base, share_tensors
from .conditioning import TaskEncoder, load_task_encoder
from .configuration_icm import ICMConfig
from .hub import generator_card, push_folder, resolve
from .networks import NETWORKS, ContextAttention, Statistics

ENCODER_FOLDER = "encoder"
BASE_FOLDER = "base_model"
Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass
class ICMOutput(ModelOutput):
    """What [`ICMGenerator.forward`] returns.

    Args:
        loss (`Tensor`): `[]`, reconstruction loss plus `kl_weight` times the KL divergence, mean over the batch (Eq. 8).
        reconstruction_loss (`Tensor`): `[]`, the first term.
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


class ICMGenerator(PreTrainedModel):
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
        self._encoder: TaskEncoder | None = None
        self._base: PreTrainedModel | None = None
        self._source: dict[str, Any] = {}
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
            noise (`Tensor`, *optional*): `[B, k]`, the epsilon of Eq. 4; drawn where it is not given.
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
    def sample(
        self, condition: Tensor, num_samples: int = 1, generator: Generators = None, temperature: float = 1.0
    ) -> Tensor:
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
        condition = condition[None] if condition.ndim == 1 else condition
        if condition.ndim != 2 or condition.shape[1] != self.config.condition_dim:
            raise ValueError(
                f"Expected task vectors of shape (n, {self.config.condition_dim}), found {tuple(condition.shape)}."
            )
        if temperature < 0 or num_samples < 1:
            raise ValueError(f"temperature={temperature} must be >= 0 and num_samples={num_samples} >= 1.")
        v = self._condition(condition).repeat_interleave(num_samples, 0)
        z = self._draw(len(v), generator) * temperature
        return self.statistics.denormalize(self._decode(z, v))

    def _draw(self, count: int, generator: Generators) -> Tensor:
        if isinstance(generator, Sequence):
            if len(generator) != count:
                raise ValueError(f"Expected one torch.Generator or {count}, found {len(generator)}.")
            rows = [torch.randn(self.config.latent_size, generator=g, device=g.device).to(self.device) for g in generator]
            return torch.stack(rows)
        device = self.device if generator is None else generator.device
        return torch.randn(count, self.config.latent_size, generator=generator, device=device).to(self.device)

    # ------------------------------------------------------------------ conditions
    @property
    def encoder(self) -> TaskEncoder:
        """The task encoder this generator was trained with; loaded on first use, and refused if its weights have another hash."""
        if self._encoder is None:
            if self.config.encoder is None:
                raise ValueError("This generator names no task encoder: pass task_vector= (Tensor [d]).")
            folder = None
            if self.config.encoder.get("folder"):
                folder = self._resolve(self.config.encoder["folder"])
            self._encoder = load_task_encoder(self.config.encoder, str(folder) if folder else None)
        return self._encoder

    @encoder.setter
    def encoder(self, encoder: TaskEncoder) -> None:
        wanted = (self.config.encoder or {}).get("sha256")
        if wanted and encoder.config["sha256"] != wanted:
            raise ValueError(
                f"This generator was trained with the {self.config.encoder['kind']} encoder of sha256 {wanted[:12]}, found"  # type: ignore[index]
                f" {encoder.config['kind']} of {encoder.config['sha256'][:12]}. Pass the encoder it names."
            )
        self._encoder = encoder

    def task_vector(
        self, text: str | None = None, *, examples: Sequence[str] | None = None, task_vector: Tensor | None = None
    ) -> Tensor:
        """The task vector of exactly one of a sentence, examples of the task, or a vector.

        Args:
            text (`str`, *optional*): A sentence, for encoders that accept text.
            examples (`Sequence[str]`, *optional*): Examples of the task, whose states are averaged (Eq. 1).
            task_vector (`Tensor`, *optional*): `[d]`, returned as it is.

        Returns:
            `Tensor`: `[d]` fp32.

        Raises:
            `ValueError`: If none or several are given, or not the one that this generator's encoder accepts.
        """
        given = {name: value for name, value in [("text", text), ("examples", examples), ("task_vector", task_vector)] if value is not None}
        if len(given) != 1:
            raise ValueError(f"Pass exactly one of text, examples and task_vector, found {sorted(given) or 'none'}.")
        if task_vector is not None:
            return task_vector
        (name,) = given
        if self.encoder.accepts != name:
            raise ValueError(f"This generator's {self.encoder.kind} encoder reads {self.encoder.accepts}=, not {name}=.")
        if text is not None:
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"text={text!r} must be a non-empty sentence, such as 'detect sofas'.")
            return self.encoder.encode([text])[0]
        if isinstance(examples, str) or not examples:
            raise ValueError(f"examples={examples!r} must be a non-empty list of strings.")
        return self.encoder.encode(list(examples)).mean(0)

    # ------------------------------------------------------------------ adapters
    def generate_state_dict(
        self,
        text: str | None = None,
        *,
        examples: Sequence[str] | None = None,
        task_vector: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Generate the tensors of one adapter; no base model is needed.

        Args:
            text, examples, task_vector: Exactly one of them, see [`~ICMGenerator.task_vector`].
            temperature (`float`, defaults to 1.0): See [`~ICMGenerator.sample`].
            generator (`torch.Generator`, *optional*): Source of z.

        Returns:
            `dict[str, Tensor]`: Keys and shapes of the layout, on the CPU, as `peft.set_peft_model_state_dict` takes them.
        """
        condition = self.task_vector(text, examples=examples, task_vector=task_vector)
        return self.layout.unflatten(self.sample(condition, 1, generator, temperature)[0].cpu())

    def generate_adapter(
        self,
        text: str | None = None,
        base_model: str | os.PathLike[str] | PreTrainedModel | PeftModel | None = None,
        *,
        examples: Sequence[str] | None = None,
        task_vector: Tensor | None = None,
        adapter_name: str = "default",
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        is_trainable: bool = False,
        base_model_kwargs: Mapping[str, Any] | None = None,
    ) -> PeftModel:
        """Generate one adapter and put it onto its base model.

        Args:
            text (`str`, *optional*): What the adapter is for, e.g. `"detect sofas"`.
            base_model (`str`, `Path`, `PreTrainedModel` or `PeftModel`, *optional*): `None` loads the base that the generator was
                trained for, once; every call gives a model of its own on the same frozen tensors. An id or folder is loaded. A
                `PreTrainedModel` is wrapped in place. On a `PeftModel` the named adapter is added, or swapped where it is there.
            examples (`Sequence[str]`, *optional*): Examples of the task instead of a text.
            task_vector (`Tensor`, *optional*): `[d]` instead of a text.
            adapter_name (`str`, defaults to `"default"`): Name of the adapter.
            temperature (`float`, defaults to 1.0): Standard deviation of z.
            generator (`torch.Generator`, *optional*): Source of z, for a seed.
            is_trainable (`bool`, defaults to `False`): Leave the adapter trainable and in train mode.
            base_model_kwargs (`Mapping`, *optional*): For the base's `from_pretrained` (`dtype`, `device_map`, ...).

        Returns:
            `PeftModel`: A native one, in eval mode unless `is_trainable`.

        Raises:
            `ValueError`: If the input is not what the encoder accepts, or the base does not fit the layout.
        """
        state_dict = self.generate_state_dict(
            text, examples=examples, task_vector=task_vector, temperature=temperature, generator=generator
        )
        model = self._base_for(base_model, base_model_kwargs)
        facts = self._facts(text, temperature, generator)
        return attach(
            model, self.layout, state_dict, adapter_name=adapter_name, is_trainable=is_trainable, provenance=facts
        )

    def generate_adapters(
        self,
        texts: Sequence[str],
        base_model: str | os.PathLike[str] | PreTrainedModel | PeftModel | None = None,
        *,
        adapter_names: Sequence[str] | None = None,
        temperature: float = 1.0,
        generator: Generators = None,
        is_trainable: bool = False,
        base_model_kwargs: Mapping[str, Any] | None = None,
    ) -> PeftModel:
        """Generate many named adapters onto one model, in one decode; the first is active.

        Args:
            texts (`Sequence[str]`): One sentence for each adapter.
            base_model: See [`~ICMGenerator.generate_adapter`].
            adapter_names (`Sequence[str]`, *optional*): Their names; by default the words of the text, joined by `_`.
            temperature (`float`, defaults to 1.0): Standard deviation of z.
            generator (`torch.Generator` or a list of them, *optional*): One for all, or one for each adapter.
            is_trainable (`bool`, defaults to `False`): Leave the adapters trainable.
            base_model_kwargs (`Mapping`, *optional*): For the base's `from_pretrained`.

        Returns:
            `PeftModel`: The model that carries all of them.

        Raises:
            `ValueError`: If `texts` is empty or a string, or the names are not as many as the texts and all different.
        """
        if isinstance(texts, str) or not texts:
            raise ValueError(f"texts={texts!r} must be a non-empty list of sentences.")
        vectors = torch.stack([self.task_vector(text) for text in texts])
        names = list(adapter_names or (re.sub(r"\W+", "_", text).strip("_") for text in texts))
        if len(names) != len(texts) or len(set(names)) != len(names):
            raise ValueError(f"Expected {len(texts)} different adapter names, found {names}.")
        samples = self.sample(vectors, 1, generator, temperature).cpu()
        model = self._base_for(base_model, base_model_kwargs)
        generators = generator if isinstance(generator, Sequence) else [generator] * len(names)
        for name, text, vector, source in zip(names, texts, samples, generators, strict=True):
            facts = self._facts(text, temperature, source)
            state_dict = self.layout.unflatten(vector)
            model = attach(model, self.layout, state_dict, adapter_name=name, is_trainable=is_trainable, provenance=facts)
        assert isinstance(model, PeftModel)
        model.set_adapter(names[0], inference_mode=not is_trainable)
        return model

    def _facts(self, text: str | None, temperature: float, generator: torch.Generator | None) -> dict[str, Any]:
        return {
            "generator": self._source.get("name"),
            "text": text,
            "seed": generator.initial_seed() if generator is not None else None,
            "temperature": temperature,
        }

    def _base_for(
        self, base_model: str | os.PathLike[str] | PreTrainedModel | PeftModel | None, kwargs: Mapping[str, Any] | None
    ) -> PreTrainedModel | PeftModel:
        if isinstance(base_model, PreTrainedModel | PeftModel):
            if kwargs:
                raise ValueError("base_model_kwargs are for a base that is loaded here; this base_model is a model already.")
            return base_model
        if base_model is not None:
            revision = self.layout.revision if str(base_model) == self.layout.base_model_name_or_path else None
            return load_base(self.layout, str(base_model), revision, **(kwargs or {}))
        if kwargs:
            return load_base(self.layout, *self._own_base(), **kwargs)
        if self._base is None:
            self._base = load_base(self.layout, *self._own_base())
        return share_tensors(self._base)

    def _own_base(self) -> tuple[str, str | None]:
        if self.config.base_model_subfolder:
            return str(self._resolve(self.config.base_model_subfolder)), None
        if self.layout.base_model_name_or_path is None:
            raise ValueError("This generator names no base model: pass base_model= (an id, a folder or a model).")
        return self.layout.base_model_name_or_path, self.layout.revision

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
        model = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        generator = model[0] if isinstance(model, tuple) else model
        generator._source = {"name": str(pretrained_model_name_or_path), **source}
        return model

    def _resolve(self, folder: str) -> Path:
        """The local path of a folder inside this generator's own repo; downloaded where it lives on the Hub."""
        options = dict(self._source)
        if "name" not in options:
            raise ValueError(f"The generator's {folder}/ is found only after save_pretrained and from_pretrained.")
        path = os.path.join(options.pop("subfolder", ""), folder)
        return resolve(options.pop("name"), allow_patterns=[f"{path}/*"], **options) / path

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:  # type: ignore[override]
        """Save config, weights and, where it is small, the task encoder: the folder stands on its own.

        Args:
            save_directory (`str` or `Path`): The folder.
            **kwargs: As in transformers. With `push_to_hub=True`, `repo_id` and the arguments of [`~ICMGenerator.push_to_hub`].
        """
        push = kwargs.pop("push_to_hub", False)
        hub_kwargs = {name: kwargs.pop(name) for name in ("repo_id", "token", "private", "commit_message", "revision") if name in kwargs}
        if self.config.encoder and self.config.encoder.get("folder") and kwargs.get("is_main_process", True):
            self.encoder.save_pretrained(os.path.join(save_directory, self.config.encoder["folder"]))
        super().save_pretrained(save_directory, **kwargs)
        if not self._source:
            self._source = {"name": str(save_directory)}
        if push:
            self.push_to_hub(hub_kwargs.pop("repo_id", Path(save_directory).name), **hub_kwargs)

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

        Returns:
            `huggingface_hub.CommitInfo`: Of the one commit.
        """

        def write(folder: Path) -> None:
            write_repo(self, folder)

        return push_folder(
            write,
            repo_id,
            card=lambda folder: generator_card(ICMConfig.from_pretrained(folder), repo_id=repo_id, folder=folder),
            commit_message=commit_message,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            overwrite_card=overwrite_card,
        )
