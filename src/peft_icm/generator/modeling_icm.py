"""ICMGenerator: the conditional VAE that turns a task vector into an adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from ..adapters.snapshots import SnapshotMatrix
from .adapting import AdaptingMixin
from .belongings import Source
from .condition_space import ConditionSpace
from .configuration_icm import ICMConfig
from .folded import folded
from .networks import NETWORKS, ContextAttention
from .reading import Reader
from .sampling import Generators, as_conditions, draw_noise
from .saving import SavedModel
from .serving import ServingMixin
from .statistics import Statistics
from .text_reading import TextReader
from .weights import EXACT


@dataclass
class ICMOutput(ModelOutput):
    """What [`ICMGenerator.forward`] returns.

    Args:
        loss (`Tensor`): `[]`, reconstruction loss plus `kl_weight` times the KL divergence, mean over the batch (Eq. 8).
        reconstruction_loss (`Tensor`): `[]`, the first term; for `"principal"` with the squared error of a z from the prior.
        kl_loss (`Tensor`): `[]`, KL(q(z | l, v) || N(0, I)) in nats, summed over the latent, mean over the batch.
        squared_error (`Tensor`): `[B]`, mean squared error of each sample in pooled, normalised units.
        reconstruction (`Tensor`): `[B, P]`, in the units of the adapters; none where coordinates are given.
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
        coordinates: Tensor | None = None,
    ) -> ICMOutput:
        """Encode, draw z, decode, and score (Eqs. 2-8). Without adapters, decode a z from N(0, I) (Eq. 9): there is no loss then.

        Args:
            parameters (`Tensor`, *optional*): `[B, P]` adapters l, in their own units.
            condition (`Tensor`): `[B, d]` task vectors v.
            hidden_tasks (`Tensor`, *optional*): `[B]` index of the task whose pair the context leaves out; -1 for none.
            noise (`Tensor`, *optional*): `[B, k]`, the epsilon of Eq. 4, and z itself where it is drawn from the prior; drawn where it
                is not given.
            return_loss (`bool`, defaults to `True`): There for the Trainer, which asks for it.
            coordinates (`Tensor`, *optional*): `[B, r + 1]`, adapters as [`~ICMGenerator.project`] gives them, in the place of
                `parameters`: the loss is the same, and its time does not depend on P.

        Returns:
            [`ICMOutput`]: `reconstruction` alone where there are no adapters.

        Raises:
            `ValueError`: If there is no condition.
        """
        if condition is None:
            raise ValueError("condition= is missing: pass task vectors, a Tensor [B, d].")
        v = self.normalize_condition(condition)
        if parameters is None and coordinates is None:
            z = torch.randn(len(v), self.config.latent_size, device=v.device) if noise is None else noise
            return ICMOutput(reconstruction=self.statistics.denormalize(self._decode(z, v, hidden_tasks)))
        l = None if parameters is None else self.statistics.normalize(parameters)
        mean, logvar = self._encode(v, l, coordinates)
        noise = torch.randn_like(mean) if noise is None else noise
        z = mean + (0.5 * logvar).exp() * noise
        squared_error, decoded = self._score(z, v, l, coordinates, hidden_tasks)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1)
        reconstruction_loss, kl_loss = self.network.reconstruction_loss(squared_error).mean(), kl.mean()
        if self.network.prior_weight:
            prior_error, _ = self._score(noise, v, l, coordinates, hidden_tasks)
            reconstruction_loss = reconstruction_loss + self.network.prior_weight * prior_error.mean()
        return ICMOutput(
            loss=reconstruction_loss + self.config.kl_weight * kl_loss,
            reconstruction_loss=reconstruction_loss,
            kl_loss=kl_loss,
            squared_error=squared_error,
            reconstruction=None if decoded is None else self.statistics.denormalize(decoded),
            latent_mean=mean,
            latent_logvar=logvar,
        )

    def squared_error(
        self, latent: Tensor, condition: Tensor, *, parameters: Tensor | None = None, coordinates: Tensor | None = None
    ) -> Tensor:
        """How far adapters lie from those that are decoded.

        Args:
            latent (`Tensor`): `[B, k]` z.
            condition (`Tensor`): `[B, d]` task vectors.
            parameters (`Tensor`, *optional*): `[B, P]` adapters, in their own units.
            coordinates (`Tensor`, *optional*): `[B, r + 1]`, those of [`~ICMGenerator.project`], in the place of `parameters`.

        Returns:
            `Tensor`: `[B]`, mean squared error of each in pooled, normalised units.
        """
        l = None if parameters is None else self.statistics.normalize(parameters)
        return self._score(latent, self.normalize_condition(condition), l, coordinates)[0]

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

    def _encode(self, v: Tensor, l: Tensor | None, coordinates: Tensor | None) -> tuple[Tensor, Tensor]:
        """Posterior of z from normalised `[B, d]` with normalised `[B, P]` or coordinates `[B, r + 1]`, fp32."""
        if coordinates is None:
            mean, logvar = self.network.encode(l.to(self.dtype), v)  # type: ignore[union-attr]
        else:
            mean, logvar = self.network.encode_coordinates(coordinates[:, :-1].to(self.dtype), v)
        return mean.float(), logvar.float()

    def _score(
        self, z: Tensor, v: Tensor, l: Tensor | None, coordinates: Tensor | None, hidden_tasks: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`[B]` mean squared errors of what is decoded, and that, normalised `[B, P]`, where it is compared as such."""
        if coordinates is None:
            decoded = self._decode(z, v, hidden_tasks)
            return (decoded - l).square().mean(1), decoded  # type: ignore[operator]
        if self.context is not None:
            v = self.context(v, hidden_tasks)
        return self.network.coordinate_error(z.to(v.dtype), v, coordinates), None

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
        return self._whole(latent, condition)

    def _whole(self, latent: Tensor, condition: Tensor) -> Tensor:
        return self._writer(latent, condition)(0, torch.empty(len(latent), self.layout.numel, device=self.statistics.mean.device))

    @torch.no_grad()
    def _writer(self, latent: Tensor, condition: Tensor) -> Callable[[int, Tensor], Tensor]:
        """What writes columns of the adapters of z `[B, k]` and task vectors `[B, d]`: see [`LinearDecoder.writer`]."""
        few = self._lazy["folded"] = folded(self._lazy.get("folded"), self.network, self.statistics, self.space, self.context)
        if few is not None:
            return few.writer(latent, condition)
        v = self.normalize_condition(condition)
        v = v if self.context is None else self.context(v)
        return self.network.writer(self.network.coordinates(latent.to(v.dtype), v), self.statistics)

    @torch.no_grad()
    def fit(self, parameters: Tensor | SnapshotMatrix, conditions: Tensor, tasks: Tensor | None = None) -> None:
        """Estimate what is not trained - condition space, statistics and principal subspace - from a training collection.

        Args:
            parameters (`Tensor` or [`SnapshotMatrix`]): `[N, P]` snapshots of all tasks; of a matrix, blocks are read in several passes.
            conditions (`Tensor`): `[M, d]` their task vectors.
            tasks (`Tensor`, *optional*): `[M]` index of the task of each, in the order of `config.tasks`; needed by a condition space.

        Raises:
            `ValueError`: If there is a condition space and `tasks` is missing, or lacks a task, or a `"direct"` generator is of 8 bits.
        """
        self._check_trainable()
        if self.space is not None:
            if tasks is None or len(tasks.unique()) != len(self.config.tasks or []):
                raise ValueError(f"condition_space={self.config.condition_space!r} needs tasks=, with every task of the config.")
            self.space.fit(conditions, tasks)
            conditions = self.space(conditions)
        self.statistics.fit(parameters, conditions)
        self.network.fit(self.normalized(parameters))

    def normalized(self, parameters: Tensor | SnapshotMatrix) -> SnapshotMatrix:
        """Snapshots `[N, P]` in pooled, normalised units, block by block."""
        return SnapshotMatrix.of(parameters).normalized(self.layout.sizes, self.statistics.mean, self.statistics.std)

    @torch.no_grad()
    def project(self, parameters: Tensor | SnapshotMatrix) -> Tensor:
        """What the loss of a `"principal"` generator needs of adapters: their coordinates in its subspace, computed once.

        Args:
            parameters (`Tensor` or [`SnapshotMatrix`]): `[N, P]` adapters, in their own units; of a matrix, blocks are read in one pass.

        Returns:
            `Tensor`: `[N, r + 1]` fp32 on the CPU: r coordinates, one for each component in use, and the mean square of the rest.

        Example:

        ```python
        >>> from peft_icm import ICMGenerator, bundled_generator
        >>> generator = ICMGenerator.from_pretrained(bundled_generator("text"))
        >>> condition = torch.randn(2, generator.config.condition_dim)
        >>> adapters, z = generator.sample(condition), torch.zeros(2, generator.config.latent_size)
        >>> one = generator(adapters, condition, noise=z)
        >>> other = generator(coordinates=generator.project(adapters), condition=condition, noise=z)
        >>> torch.allclose(one.squared_error, other.squared_error, rtol=0.02)  # its components are orthonormal to the rounding of bf16
        True

        ```
        """
        blocks, used = self.normalized(parameters).rows("coordinates"), self.network.used
        return torch.cat([self.network.project(block.to(self.device), used).cpu() for _, block in blocks])

    @torch.no_grad()
    def remember(self, parameters: Iterable[Tensor], conditions: Tensor, *, projected: bool = False) -> None:
        """Refresh the context's (task vector, latent) pairs.

        Args:
            parameters (`Iterable[Tensor]`): `[K, P]` snapshots of each task, in the order of `config.tasks`; asked for one by one.
            conditions (`Tensor`): `[T, d]` mean task vector of each task.
            projected (`bool`, defaults to `False`): Whether it is `[K, r + 1]`, as [`~ICMGenerator.project`] gives it, in their place.
        """
        if self.context is None:
            return
        v = self.normalize_condition(conditions)
        self.context.conditions.copy_(v)
        for index, snapshots in enumerate(parameters):
            rows, own = snapshots.to(self.device), v[index].expand(len(snapshots), -1)
            mean, _ = self._encode(own, *((None, rows) if projected else (self.statistics.normalize(rows), None)))
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
        return self._whole(*self._draw(condition, num_samples, generator, temperature))

    def _draw(
        self, condition: Tensor, num_samples: int = 1, generator: Generators = None, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """What [`~ICMGenerator.sample`] decodes, z `[n * num_samples, k]` and the task vectors; arguments and errors as there."""
        rows = as_conditions(condition, num_samples, temperature, self.config.condition_dim)
        return draw_noise(len(rows), self.config.latent_size, generator, self.device) * temperature, rows

    def train(self, mode: bool = True) -> ICMGenerator:
        """As in torch; a `"direct"` generator of 8 bits stays in eval mode.

        Raises:
            `ValueError`: If `mode` is `True`, `config.basis_dtype` is `"int8"` and the generator a `"direct"` one.
        """
        if mode:
            self._check_trainable()
        return super().train(mode)

    def _check_trainable(self) -> None:
        if self.config.basis_dtype is not None and self.config.architecture == "direct":
            raise ValueError("basis_dtype='int8': the map of 'direct' does not train in 8 bits, take the generator it was saved from.")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ICMGenerator:
        super()._apply(fn, recurse)
        if "encoder" in self._lazy:
            self._lazy["encoder"].to(self.device)
        return self
