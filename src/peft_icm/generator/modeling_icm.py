"""ICMGenerator: the conditional VAE that turns a task vector into an adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .adapting import AdaptingMixin
from .condition_space import ConditionSpace
from .configuration_icm import ICMConfig
from .generation import Source
from .networks import NETWORKS, ContextAttention, Statistics
from .reading import Reader
from .sampling import Generators, as_conditions, draw_noise
from .saving import SavedModel
from .serving import ServingMixin
from .text_reading import TextReader
from .weights import EXACT

BLOCK = 2**20  # numbers that decoding works on at once: they stay in a processor's cache


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


class ICMGenerator(AdaptingMixin, ServingMixin, SavedModel):
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
    _keep_in_fp32_modules_strict = list(EXACT)  # noqa: RUF012 - transformers reads a plain list
    _no_split_modules: list[str] = []  # noqa: RUF012

    def __init__(self, config: ICMConfig):
        super().__init__(config)
        self._source, self._lazy = Source(), {}
        self.layout = config.adapter_layout
        self.space = (
            ConditionSpace(config.condition_space or "none", config.condition_dim, len(config.tasks or [])) if config.reads else None
        )
        self.reader = Reader(config.condition_dim, len(config.tasks or [])) if config.reads else None
        self.text_reader = TextReader(config.text_dim, len(config.tasks or [])) if config.text_reader else None
        self.statistics = Statistics(self.layout.sizes, config.projected_dim, each=config.architecture == "direct")
        self.network = NETWORKS[config.architecture](config)
        self.context = ContextAttention(config) if config.context and config.tasks else None
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Modules come initialised; only the context's way out starts at zero."""
        if isinstance(module, ContextAttention):
            torch.nn.init.zeros_(module.output.weight)

    # ------------------------------------------------------------------ the CVAE
    def forward(
        self,
        parameters: Tensor | None = None,
        condition: Tensor | None = None,
        hidden_tasks: Tensor | None = None,
        noise: Tensor | None = None,
        return_loss: bool = True,
    ) -> ICMOutput:
        """Encode, draw z, decode, and score (Eqs. 2-8). Without adapters, decode a z from N(0, I) (Eq. 9): there is no loss then.

        Args:
            parameters (`Tensor`, *optional*): `[B, P]` adapters l, in their own units.
            condition (`Tensor`): `[B, d]` task vectors v.
            hidden_tasks (`Tensor`, *optional*): `[B]` index of the task whose pair the context leaves out; -1 for none.
            noise (`Tensor`, *optional*): `[B, k]`, the epsilon of Eq. 4, and z itself where it is drawn from the prior; drawn where it
                is not given.
            return_loss (`bool`, defaults to `True`): There for the Trainer, which asks for it.

        Returns:
            [`ICMOutput`]: `reconstruction` alone where there are no adapters.

        Raises:
            `ValueError`: If there is no condition.
        """
        if condition is None:
            raise ValueError("condition= is missing: pass task vectors, a Tensor [B, d].")
        v = self.normalize_condition(condition)
        if parameters is None:
            z = torch.randn(len(v), self.config.latent_size, device=v.device) if noise is None else noise
            return ICMOutput(reconstruction=self.statistics.denormalize(self._decode(z, v, hidden_tasks)))
        l = self.statistics.normalize(parameters)
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

    def normalize_condition(self, condition: Tensor) -> Tensor:
        """Task vectors `[B, d]` as the networks see them: projected and normalised, `[B, m]`."""
        condition = condition.to(self.device)
        return self.statistics.normalize_condition(condition if self.space is None else self.space(condition)).to(self.dtype)

    @property
    def no_condition(self) -> Tensor:
        """`[d]`: the task vector that says nothing, of the mean of all tasks."""
        if self.space is not None:
            return self.space.center
        return torch.zeros_like(self.statistics.condition_mean) if self.statistics.each else self.statistics.condition_mean

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
        if torch.is_grad_enabled():
            return self.statistics.denormalize(self._decode(latent, self.normalize_condition(condition)))
        return self._whole(self._coordinates(latent, condition))

    def _coordinates(self, latent: Tensor, condition: Tensor) -> Tensor:
        """What `_decode_into` makes adapters of: `[B, k]` z and `[B, d]` task vectors -> `[B, R]`, or `[B, P]` for `"paper"`."""
        v = self.normalize_condition(condition)
        v = v if self.context is None else self.context(v)
        return self.network.coordinates(latent.to(v.dtype), v)

    def _whole(self, coordinates: Tensor) -> Tensor:
        out = torch.empty(len(coordinates), sum(self.statistics.sizes), device=coordinates.device)
        return self._decode_into(coordinates, self.statistics.units(), 0, out)

    @torch.no_grad()
    def _decode_into(self, coordinates: Tensor, units: tuple[Tensor, Tensor], first: int, out: Tensor) -> Tensor:
        """Decode tensors that follow one another, in their units, a few columns at a time: nothing of their size is made beside them.

        Args:
            coordinates (`Tensor`): `[B, R]`, of `_coordinates`.
            units (`tuple[Tensor, Tensor]`): [`Statistics.units`].
            first (`int`): Where in the vector of an adapter they begin.
            out (`Tensor`): `[B, n]` fp32, where they are written.

        Returns:
            `Tensor`: `out`.
        """
        piece = self.statistics.piece
        step = max(1, BLOCK // (len(coordinates) + (self.config.num_components or 0)) // piece) * piece
        for start in range(0, out.shape[1], step):
            part = out[:, start : start + step]
            places = slice((first + start) // piece, (first + start + part.shape[1]) // piece)
            self.network.write(coordinates, first + start, units[0][places], units[1][places], part)
        return out

    @torch.no_grad()
    def fit(self, parameters: Tensor, conditions: Tensor, tasks: Tensor | None = None) -> None:
        """Estimate what is not trained - condition space, statistics and principal subspace - from a training collection.

        Args:
            parameters (`Tensor`): `[N, P]` snapshots of all tasks.
            conditions (`Tensor`): `[M, d]` their task vectors.
            tasks (`Tensor`, *optional*): `[M]` index of the task of each, in the order of `config.tasks`; needed by a condition space.

        Raises:
            `ValueError`: If there is a condition space and `tasks` is missing, or lacks a task, or the generator is of 8 bits.
        """
        self._check_trainable()
        if self.space is not None:
            if tasks is None or len(tasks.unique()) != len(self.config.tasks or []):
                raise ValueError(f"condition_space={self.config.condition_space!r} needs tasks=, with every task of the config.")
            self.space.fit(conditions, tasks)
            conditions = self.space(conditions)
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
        v = self.normalize_condition(conditions)
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
        return self._whole(self._draw(condition, num_samples, generator, temperature))

    @torch.no_grad()
    def _draw(self, condition: Tensor, num_samples: int = 1, generator: Generators = None, temperature: float = 1.0) -> Tensor:
        """What [`~ICMGenerator.sample`] decodes, `[n * num_samples, R]`; arguments and errors as there."""
        rows = as_conditions(condition, num_samples, temperature, self.config.condition_dim)
        return self._coordinates(draw_noise(len(rows), self.config.latent_size, generator, self.device) * temperature, rows)

    def train(self, mode: bool = True) -> ICMGenerator:
        """As in torch; a generator of 8 bits stays in eval mode.

        Raises:
            `ValueError`: If `mode` is `True` and `config.basis_dtype` is `"int8"`.
        """
        if mode:
            self._check_trainable()
        return super().train(mode)

    def _check_trainable(self) -> None:
        if self.config.basis_dtype is not None:
            raise ValueError(f"basis_dtype={self.config.basis_dtype!r}: generators of 8 bits do not train, take the one it was saved from.")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ICMGenerator:
        super()._apply(fn, recurse)
        if "encoder" in self._lazy:
            self._lazy["encoder"].to(self.device)
        return self
