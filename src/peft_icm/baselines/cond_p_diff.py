"""COND P-DIFF: latent diffusion over LoRA vectors, with the condition in the denoiser (Jin et al. 2024, 2408.01415)."""

from __future__ import annotations

import functools
from dataclasses import field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_1d import UNet1DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..adapters.layout import AdapterLayout
from ..generator.sampling import Generators, as_conditions, draw_noise
from ..generator.statistics import Statistics
from .base import stored_bytes

PREDICTION = "v_prediction"


@strict
class CondPDiffConfig(PreTrainedConfig):
    r"""Configuration of a [`CondPDiff`].

    Args:
        layout (`dict`): [`AdapterLayout.to_dict`] of the adapters that are generated.
        encoder (`dict`, *optional*): The task encoder's config, for the record.
        condition_dim (`int`, defaults to 512): d, the width of a task vector.
        hidden_size (`int`, defaults to 64): Width of the hidden layer of the autoencoder.
        latent_size (`int`, defaults to 64): k, the numbers of a latent.
        condition_channels (`int`, defaults to 4): Channels of the denoiser's input that the condition fills.
        block_out_channels (`list[int]`, defaults to `[32, 64]`): Channels of the denoiser's blocks; each but the last halves the length.
        num_train_timesteps (`int`, defaults to 1000): Steps of the DDPM noise schedule.
        num_inference_steps (`int`, defaults to 50): DDIM steps of a sample.
        input_noise (`float`, defaults to 0.001): Standard deviation of the noise on a normalised adapter, stage 1.
        latent_noise (`float`, defaults to 0.1): Standard deviation of the noise on its latent, stage 1.
        training (`dict`, *optional*): Facts of the training.

    Raises:
        `ValueError`: If a size is not positive, a noise is negative, or the blocks do not divide the latent.

    Example:

    ```python
    >>> CondPDiffConfig(latent_size=32).num_inference_steps
    50

    ```
    """

    model_type = "cond_p_diff"

    layout: dict[str, Any] | None = None
    encoder: dict[str, Any] | None = None
    condition_dim: int = 512
    hidden_size: int = 64
    latent_size: int = 64
    condition_channels: int = 4
    block_out_channels: list[int] = field(default_factory=lambda: [32, 64])
    num_train_timesteps: int = 1000
    num_inference_steps: int = 50
    input_noise: float = 0.001
    latent_noise: float = 0.1
    training: dict[str, Any] | None = None

    def validate_cond_p_diff(self) -> None:
        """Part of `@strict`-powered validation."""
        for name in ("condition_dim", "hidden_size", "latent_size", "condition_channels", "num_train_timesteps", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("input_noise", "latent_noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        if not self.block_out_channels or any(channels < 4 or channels % 4 for channels in self.block_out_channels):
            raise ValueError(f"block_out_channels={self.block_out_channels} must be multiples of 4, one or more, such as [32, 64].")
        stride = 2 ** (len(self.block_out_channels) - 1)
        if self.latent_size % stride:
            raise ValueError(
                f"latent_size={self.latent_size} must be a multiple of {stride}, the total stride of {len(self.block_out_channels)} blocks."
            )

    @property
    def adapter_layout(self) -> AdapterLayout:
        """The layout of the generated adapters.

        Raises:
            `ValueError`: If the configuration has none.
        """
        if self.layout is None:
            raise ValueError("This CondPDiffConfig has no layout: pass layout=collection.layout.to_dict().")
        return AdapterLayout.from_dict(self.layout)


class Autoencoder(nn.Module):
    """Linear, GELU, linear, and their mirror, on normalised adapters `[B, P]` and latents `[B, k]`.

    The input is divided by sqrt(P), its norm, and the first weights are standard normal: the same function at the start as the usual
    initialisation, but a step of Adam moves the hidden layer by an amount that does not grow with P.
    """

    def __init__(self, size: int, hidden_size: int, latent_size: int):
        super().__init__()
        self.input_scale = size**-0.5
        self.input = nn.Linear(size, hidden_size)
        self.to_latent = nn.Linear(hidden_size, latent_size)
        self.from_latent = nn.Linear(latent_size, hidden_size)
        self.output = nn.Linear(hidden_size, size)
        nn.init.normal_(self.input.weight)

    @torch.no_grad()
    def fit(self, parameters: Tensor) -> None:
        """Start at the mean of normalised snapshots `[N, P]`, which most of each adapter shares: only differences are left to learn."""
        center = parameters.mean(0)
        self.output.bias.copy_(center)
        self.input.bias.copy_(-self.input.weight @ center * self.input_scale)

    def encode(self, parameters: Tensor) -> Tensor:
        """`[B, P]` -> `[B, k]`."""
        return self.to_latent(F.gelu(self.input(parameters * self.input_scale)))

    def decode(self, latents: Tensor) -> Tensor:
        """`[B, k]` -> `[B, P]`."""
        return self.output(F.gelu(self.from_latent(latents)))


class CondPDiff(PreTrainedModel):
    r"""COND P-DIFF (Jin et al. 2024): an autoencoder over LoRA vectors, and diffusion over its latents under a condition.

    Three things differ from the paper. The autoencoder is a perceptron: one-dimensional convolutions over the weights, as in p-diff,
    are slow and weak on a CPU at P up to 200,000. The denoiser, diffusers' `UNet1DModel`, takes no condition, so that the task vector
    fills extra channels of its input. And it predicts the velocity, not the noise: at the last timesteps, where the task is decided, an
    error in the noise is up to 158 times as large in the latent that is read from it, and a short training does not get over that.
    Train one with [`train_cond_p_diff`][peft_icm.baselines.cond_p_diff_training.train_cond_p_diff].

    Args:
        config ([`CondPDiffConfig`]): With a layout.

    Example:

    ```python
    >>> from peft_icm import AdapterLayout
    >>> keys = ("base_model.model.m.lora_A.weight", "base_model.model.m.lora_B.weight")
    >>> layout = AdapterLayout(keys, ((1, 3), (2, 1)), "float32", {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["m"]})
    >>> model = CondPDiff(CondPDiffConfig(layout=layout.to_dict(), condition_dim=8))
    >>> model.sample(torch.randn(8), num_samples=2, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([2, 5])

    ```
    """

    config: CondPDiffConfig
    config_class = CondPDiffConfig  # transformers cannot read the annotation, a string under PEP 563
    base_model_prefix = "cond_p_diff"
    main_input_name = "latents"
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: CondPDiffConfig):
        super().__init__(config)
        self.layout = config.adapter_layout
        self.statistics = Statistics(self.layout.sizes, config.condition_dim)
        self.autoencoder = Autoencoder(self.layout.numel, config.hidden_size, config.latent_size)
        self.register_buffer("latent_mean", torch.zeros(config.latent_size))
        self.register_buffer("latent_std", torch.ones(()))
        self.condition = nn.Linear(config.condition_dim, config.condition_channels * config.latent_size)
        blocks = len(config.block_out_channels)
        self.denoiser = UNet1DModel(
            sample_size=config.latent_size,
            in_channels=1 + config.condition_channels,
            out_channels=1,
            time_embedding_type="positional",
            use_timestep_embedding=True,
            act_fn="silu",
            block_out_channels=tuple(config.block_out_channels),
            down_block_types=("DownResnetBlock1D",) * blocks,
            mid_block_type="MidResTemporalBlock1D",
            up_block_types=("UpResnetBlock1D",) * blocks,
            out_block_type="OutConv1DBlock",
            norm_num_groups=4,
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Modules come initialised."""

    # ------------------------------------------------------------------ the two stages
    @torch.no_grad()
    def fit(self, parameters: Tensor, conditions: Tensor) -> None:
        """Before stage 1: statistics of snapshots `[N, P]` and task vectors `[M, d]`, and the autoencoder's centre."""
        self.statistics.fit(parameters, conditions)
        self.autoencoder.fit(self.statistics.normalize(parameters))

    def reconstruction_loss(self, parameters: Tensor) -> Tensor:
        """Stage 1: squared error of `[B, P]` adapters through the autoencoder, with noise on its input and its latent."""
        l = self.statistics.normalize(parameters)
        latents = self.autoencoder.encode(l + self.config.input_noise * torch.randn_like(l))
        decoded = self.autoencoder.decode(latents + self.config.latent_noise * torch.randn_like(latents))
        return (decoded - l).square().mean()

    @torch.no_grad()
    def fit_latents(self, parameters: Tensor) -> None:
        """Between the stages: mean of each number of the latents of snapshots `[N, P]`, and one standard deviation for all."""
        latents = self.autoencoder.encode(self.statistics.normalize(parameters))
        self.latent_mean.copy_(latents.mean(0))
        # One for all: numbers that hardly vary would otherwise be as much work as those that make the adapter.
        self.latent_std.copy_((latents - self.latent_mean).std(correction=0))

    @torch.no_grad()
    def encode(self, parameters: Tensor) -> Tensor:
        """`[B, P]` adapters in their own units -> `[B, k]` normalised latents."""
        return (self.autoencoder.encode(self.statistics.normalize(parameters)) - self.latent_mean) / self.latent_std

    def decode(self, latents: Tensor) -> Tensor:
        """`[B, k]` normalised latents -> `[B, P]` adapters in their own units, fp32."""
        return self.statistics.denormalize(self.autoencoder.decode(latents * self.latent_std + self.latent_mean))

    @functools.cached_property
    def noise_scheduler(self) -> DDPMScheduler:
        """The noise schedule of training; made on first use, as `from_pretrained` would make its tensors on the meta device."""
        return DDPMScheduler(self.config.num_train_timesteps, prediction_type=PREDICTION)

    def diffusion_loss(self, latents: Tensor, condition: Tensor, noise: Tensor) -> Tensor:
        """Stage 2: squared error of the velocity that is read from noisy latents at random timesteps.

        Args:
            latents (`Tensor`): `[B, k]`, normalised.
            condition (`Tensor`): `[B, d]` task vectors.
            noise (`Tensor`): `[B, k]`, standard normal.

        Returns:
            `Tensor`: `[]`.
        """
        timesteps: Any = torch.randint(self.config.num_train_timesteps, (len(latents),), device=latents.device)
        noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)
        return F.mse_loss(self(noisy, timesteps, condition), self.noise_scheduler.get_velocity(latents, noise, timesteps))

    def forward(self, latents: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """The velocity at noisy latents.

        Args:
            latents (`Tensor`): `[B, k]`, normalised and noisy.
            timesteps (`Tensor`): `[B]` or `[]`.
            condition (`Tensor`): `[B, d]` task vectors.

        Returns:
            `Tensor`: `[B, k]`.
        """
        channels = self.condition(self.statistics.normalize_condition(condition)).unflatten(1, (-1, self.config.latent_size))
        return self.denoiser(torch.cat([latents[:, None], channels], dim=1), timesteps).sample[:, 0]

    # ------------------------------------------------------------------ sampling
    @torch.no_grad()
    def sample(self, condition: Tensor, num_samples: int = 1, generator: Generators = None, temperature: float = 1.0) -> Tensor:
        """Draw adapters: DDIM without noise of its own (eta 0), from `z ~ N(0, temperature^2 I)`.

        Args:
            condition (`Tensor`): `[d]` or `[n, d]` task vectors.
            num_samples (`int`, defaults to 1): Adapters for each task vector.
            generator (`torch.Generator` or a list of them, *optional*): One for all, or one for each adapter. The same seed gives the
                same adapter, alone or in a batch, up to rounding.
            temperature (`float`, defaults to 1.0): Standard deviation of z.

        Returns:
            `Tensor`: `[n * num_samples, P]` fp32, in the units of the adapters; the samples of one task vector stand together.

        Raises:
            `ValueError`: If a shape, the number of generators, or the temperature does not fit.
        """
        rows = as_conditions(condition, num_samples, temperature, self.config.condition_dim).to(self.device)
        latents = temperature * draw_noise(len(rows), self.config.latent_size, generator, self.device)
        # Latents are no pictures: nothing bounds them to [-1, 1]. "trailing" starts at the last timestep, where all is noise.
        scheduler = DDIMScheduler(
            self.config.num_train_timesteps, prediction_type=PREDICTION, clip_sample=False, timestep_spacing="trailing"
        )
        scheduler.set_timesteps(self.config.num_inference_steps, device=self.device)
        for timestep in scheduler.timesteps:
            latents = scheduler.step(self(latents, timestep, rows), timestep, latents, eta=0.0).prev_sample
        return self.decode(latents)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights; the autoencoder's encoder, nearly half of them, is not needed to sample but is part of the model."""
        return stored_bytes(self)
