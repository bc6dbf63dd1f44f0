"""The networks of the conditional VAE: context attention, and the three architectures.

All architectures speak one interface: `encode(l, v) -> (mean, logvar)`, `decode(z, v) -> l`, on normalised vectors;
`reconstruction_loss(squared_error)`; `prior_weight`, that of the squared error of a z from the prior; `fit(l)` for what is estimated
from the collection; `coordinates(z, v)` and `writer`, to decode some columns of l at a time. No BatchNorm: samples come singly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.snapshots import SnapshotMatrix
from .configuration_icm import ICMConfig
from .linear_decoder import LinearDecoder
from .statistics import Statistics
from .subspace import principal_components


class ContextAttention(nn.Module):
    """In-context conditioning: the task vector attends over the (task vector, latent) pairs of the collection's tasks.

    `v + W_o softmax(q(v) k(V)^T / sqrt(h)) u([V; Z])`, with V `[T, d]` the mean task vectors and Z `[T, k]` the posterior means of the
    T tasks, kept as persistent buffers and refreshed once an epoch. W_o starts at zero: no context at first.
    """

    conditions: Tensor
    latents: Tensor

    def __init__(self, config: ICMConfig):
        super().__init__()
        width, dim = 64, config.projected_dim
        tasks = len(config.tasks or [])
        self.query = nn.Linear(dim, width)
        self.key = nn.Linear(dim, width)
        self.value = nn.Linear(config.latent_size, width)
        self.output = nn.Linear(width, dim, bias=False)
        self.register_buffer("conditions", torch.zeros(tasks, dim))
        self.register_buffer("latents", torch.zeros(tasks, config.latent_size))

    def forward(self, condition: Tensor, hidden_tasks: Tensor | None = None) -> Tensor:
        """Enrich task vectors.

        Args:
            condition (`Tensor`): `[B, d]`, normalised.
            hidden_tasks (`Tensor`, *optional*): `[B]` indices of the task whose own pair each sample must not see; -1 for none.

        Returns:
            `Tensor`: `[B, d]`.
        """
        keys = self.key(self.conditions.to(condition.dtype))
        scores = self.query(condition) @ keys.T / keys.shape[-1] ** 0.5
        if hidden_tasks is not None:
            own = torch.arange(len(self.conditions), device=scores.device) == hidden_tasks[:, None]
            scores = scores.masked_fill(own, torch.finfo(scores.dtype).min)
        return condition + self.output(scores.softmax(-1) @ self.value(self.latents.to(condition.dtype)))


class ResidualMLP(nn.Module):
    """Linear, one pre-norm residual block, linear."""

    def __init__(self, inputs: int, hidden: int, outputs: int):
        super().__init__()
        self.input = nn.Linear(inputs, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.block = nn.Linear(hidden, hidden)
        self.output = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, inputs]` -> `[B, outputs]`."""
        x = F.gelu(self.input(x))
        return self.output(x + F.gelu(self.block(self.norm(x))))


class PrincipalNetwork(LinearDecoder):
    """CVAE in the principal subspace of the collection (the default architecture).

    The adapters of a collection span few directions: T tasks and their short trajectories. Those directions are estimated once from
    the training snapshots by PCA, `l = c + (a * s) U` with U `[R, P]` orthonormal, and a small perceptron models `p(a | z, v)`. U, c and
    s are parameters without gradient: they follow the weights' dtype and are never trained.

    Eq. 6 leaves the decoder's variance open. Here it is the maximum-likelihood scalar of each sample, which turns the reconstruction
    term of Eq. 8, per coordinate, into `1/2 log(mean squared error)`: the scale of the adapters drops out, and the KL term keeps its
    weight however small the error becomes, so that z is used.

    A z from the posterior can tell the decoder which task it is, and the task vector is then left unread. So the squared error of a z
    from N(0, I) is part of the loss, as in the hybrid objective of Sohn, Lee and Yan (2015): what every adapter of a task
    shares has to come from v, and z is left with what differs between them.
    """

    prior_weight = 1.0
    ERROR_FLOOR = 1e-4  # of the pooled variance: errors below it earn nothing

    def __init__(self, config: ICMConfig):
        super().__init__()
        rank, hidden = config.num_components or 0, config.hidden_size
        self.start(config, config.adapter_layout.numel**-0.5, trained=False)
        self.scale = nn.Parameter(torch.ones(rank), requires_grad=False)
        self.condition = nn.Linear(config.projected_dim, hidden // 2)
        self.encoder = ResidualMLP(rank + hidden // 2, hidden, 2 * config.latent_size)
        self.decoder = ResidualMLP(config.latent_size + hidden // 2, hidden, rank)

    @torch.no_grad()
    def fit(self, parameters: Tensor | SnapshotMatrix) -> None:
        """PCA of normalised snapshots `[N, P]` ([`principal_components`]); components past N - 1 stay zero.

        A basis of 8 bits is estimated in bf16, in the place of its codes: the scale of a row is that of all its columns.
        """
        rows, eight_bits = SnapshotMatrix.of(parameters), not self.basis.is_floating_point()
        if eight_bits:
            self.basis = nn.Parameter(torch.empty_like(self.basis, dtype=torch.bfloat16), requires_grad=False)
        singular = principal_components(rows, self.center, self.basis)
        if eight_bits:
            self.quantize()
        self.scale.fill_(1.0)
        self.scale[: len(singular)] = (singular / len(rows) ** 0.5).to(self.scale.dtype)

    @property
    def used(self) -> int:
        """r, the components that are in use: they stand first, the others are zero."""
        return int(self.basis.any(1).sum())

    @torch.no_grad()
    def project(self, parameters: Tensor, used: int) -> Tensor:
        """What the loss needs of normalised adapters, without P: their coordinates, and how far from the subspace they lie.

        Args:
            parameters (`Tensor`): `[N, P]`; overwritten.
            used (`int`): r, see [`~PrincipalNetwork.used`].

        Returns:
            `Tensor`: `[N, r + 1]` fp32: in each of the r components in use the coordinate a; the mean square of the rest, which is
            orthogonal to them.
        """
        parameters.sub_(self.center)
        coordinates: Any = sum(parameters[:, part] @ basis[:used].to(parameters.dtype).T for part, basis in self.columns())
        for part, basis in self.columns():
            parameters[:, part].addmm_(coordinates, basis[:used].to(parameters.dtype), alpha=-1)
        rest = parameters.square_().mean(1)
        return torch.cat([coordinates / self.scale[:used].to(parameters.dtype), rest[:, None]], dim=1)

    def encode(self, parameters: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior of z (Eq. 3): `[B, P]`, `[B, d]` -> mean and log-variance, `[B, k]` each."""
        return self.encode_coordinates((parameters - self.center) @ self.rows.to(parameters.dtype).T / self.scale, condition)

    def encode_coordinates(self, coordinates: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """The same of coordinates `[B, r]`."""
        coordinates = F.pad(coordinates, (0, len(self.scale) - coordinates.shape[1]))
        hidden = torch.cat([coordinates, F.gelu(self.condition(condition))], dim=1)
        mean, logvar = self.encoder(hidden).chunk(2, dim=1)
        return mean, logvar

    def coordinate_error(self, latent: Tensor, condition: Tensor, coordinates: Tensor) -> Tensor:
        """`[B]`: the mean squared error of what [`~PrincipalNetwork.decode`] makes against adapters given as `[B, r + 1]`, fp32.

        U is orthonormal, so that the squared error is that of the coordinates and the rest's.
        """
        decoded = self.decoder(torch.cat([latent, F.gelu(self.condition(condition))], dim=1)).float()
        used = coordinates.shape[1] - 1
        error = (decoded[:, :used] - coordinates[:, :-1]) * self.scale[:used]
        return error.square().sum(1) / self.basis.shape[1] + coordinates[:, -1]

    def coordinates(self, latent: Tensor, condition: Tensor) -> Tensor:
        """`[B, k]`, `[B, d]` -> `[B, R]`, of which `l = c + a U`."""
        return self.decoder(torch.cat([latent, F.gelu(self.condition(condition))], dim=1)) * self.scale

    def decode(self, latent: Tensor, condition: Tensor) -> Tensor:
        """Mean of l (Eq. 6): `[B, k]`, `[B, d]` -> `[B, P]`."""
        return self.combine(self.coordinates(latent, condition))

    def reconstruction_loss(self, squared_error: Tensor) -> Tensor:
        """`[B]` mean squared errors -> `[B]` negative log-likelihoods per coordinate, up to a constant."""
        return 0.5 * torch.log(squared_error + self.ERROR_FLOOR)


class DirectNetwork(LinearDecoder):
    """A perceptron and one linear map to all of A and B, which the loss of the tasks trains (`objective="task"`).

    `l = c + a U` with `a [B, R]` from z and v, U `[R, P]` and c `[P]` trained: c is one LoRA for all tasks, a U what the task adds to it.
    c starts as peft starts a LoRA (A random, B zero) and U near zero, so that training begins at the base. A depends on the condition too:
    it is the direction that is read. The norm of a is bounded by a LayerNorm, as that of the latent in Code2LoRA (arXiv 2606.06492).

    Trained by reconstruction first, z has the posterior of Eq. 3, from what of l is in U's span. The buffer `spread` `[R, R]` is the
    covariance of a over the tasks trained on and over z: how far adapters of tasks lie from each other; `prior_strength` `[]`
    is the weight of that as a prior ([`~ICMGenerator.adapt`]), 300 where nobody has fitted it ([`~ICMGenerator.fit_prior`]).
    """

    spread: Tensor
    prior_strength: Tensor
    prior_weight = 1.0
    STARTING_DEVIATION = 2e-3  # of U
    STARTING_SIZE = 0.25  # of a, its root mean square: at 1 a step of 1e-3 moves l too far

    def __init__(self, config: ICMConfig):
        super().__init__()
        rank, hidden = config.num_components or 0, config.hidden_size
        inputs = config.latent_size + config.projected_dim
        self.start(config, self.STARTING_DEVIATION, trained=True)
        self.encoder = ResidualMLP(rank + config.projected_dim, rank, 2 * config.latent_size)
        self.register_buffer("spread", torch.zeros(rank, rank))
        self.register_buffer("prior_strength", torch.tensor(300.0))
        steps = (nn.Linear(inputs, hidden), nn.GELU(), nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.GELU(), nn.LayerNorm(hidden))
        bounded = nn.LayerNorm(rank)
        nn.init.constant_(bounded.weight, self.STARTING_SIZE)
        self.decoder = nn.Sequential(*steps, nn.Linear(hidden, rank), bounded)

    def fit(self, parameters: Tensor | SnapshotMatrix) -> None:
        """Start at the mean of normalised adapters `[N, P]`; nothing else is estimated outside training."""
        with torch.no_grad():
            self.center.copy_(SnapshotMatrix.of(parameters).average())

    def encode(self, parameters: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior of z (Eq. 3): `[B, P]`, `[B, d]` -> mean and log-variance, `[B, k]` each."""
        coordinates = F.layer_norm((parameters - self.center) @ self.rows.to(parameters.dtype).T, self.basis.shape[:1])
        mean, logvar = self.encoder(torch.cat([coordinates, condition], dim=1)).chunk(2, dim=1)
        return mean, logvar

    def coordinates(self, latent: Tensor, condition: Tensor) -> Tensor:
        """`[B, k]`, `[B, d]` -> `[B, R]`, of which `l = c + a U`."""
        return self.decoder(torch.cat([latent, condition], dim=1))

    def decode(self, latent: Tensor, condition: Tensor) -> Tensor:
        """Mean of l (Eq. 6): `[B, k]`, `[B, d]` -> `[B, P]`."""
        return self.combine(self.coordinates(latent, condition))

    @torch.no_grad()
    def measure(self, latents: Tensor, conditions: Tensor) -> None:
        """Estimate `spread` from z `[N, k]` and the normalised task vectors `[N, d]` of the tasks."""
        self.spread.copy_(self.decoder(torch.cat([latents, conditions], dim=1)).T.cov(correction=0))

    def deviations(self) -> Tensor:
        """`[P]`: standard deviation of each number of l over tasks and z, `sqrt(diag(U^T C U))`."""
        rows = self.rows.to(self.spread.dtype)
        return ((self.spread @ rows) * rows).sum(0).clamp(min=0).sqrt()

    def reconstruction_loss(self, squared_error: Tensor) -> Tensor:
        """`[B]` mean squared errors -> `[B]`, half of each: a Gaussian of unit variance (Eq. 6)."""
        return 0.5 * squared_error


class PaperNetwork(nn.Module):
    """The convolutional CVAE of the paper (Eqs. 2-9): `x = [l; v]` through one-dimensional convolutions, `[z; v]` through their mirror.

    Channels, kernel 7 and stride 2 are those of the published code; layers past the twelfth have stride 1. GroupNorm stands in the
    place of BatchNorm. `[l; v]` is zero-padded to a multiple of the total stride; the output is cropped to P, so that padding never
    enters the loss. The variance that Eq. 6 leaves open is one, as the published squared error implies.
    """

    prior_weight = 0.0
    CHANNELS = (8, 16, 32, 64, 128, 256, 256, 128, 64, 32, 16, 8)

    def __init__(self, config: ICMConfig):
        super().__init__()
        layers, hidden, dim = config.num_conv_layers, config.hidden_size, config.projected_dim
        self.size = config.adapter_layout.numel
        channels = [1, *self.CHANNELS[:layers], *[8] * (layers - len(self.CHANNELS))]
        strides = [2 if index < len(self.CHANNELS) else 1 for index in range(layers)]
        total_stride = 2 ** strides.count(2)
        self.padded = -(-(self.size + dim) // total_stride) * total_stride
        self.narrow = (channels[-1], self.padded // total_stride)
        width = channels[-1] * self.narrow[1]

        def convolution(kind: type[nn.Conv1d | nn.ConvTranspose1d], inputs: int, outputs: int, stride: int) -> nn.Module:
            extra: dict[str, Any] = {"output_padding": stride - 1} if kind is nn.ConvTranspose1d else {}
            layer = kind(inputs, outputs, kernel_size=7, stride=stride, padding=3, **extra)
            return nn.Sequential(layer, nn.GroupNorm(1, outputs), nn.LeakyReLU())

        steps = list(zip(channels[:-1], channels[1:], strides, strict=True))
        self.encoder = nn.Sequential(*(convolution(nn.Conv1d, i, o, stride) for i, o, stride in steps))
        self.to_hidden = nn.Linear(width, hidden)
        self.to_posterior = nn.Linear(hidden, 2 * config.latent_size)
        self.from_latent = nn.Linear(config.latent_size + dim, width)
        mirrored = [(o, max(i, 8), stride) for i, o, stride in reversed(steps)]
        self.decoder = nn.Sequential(*(convolution(nn.ConvTranspose1d, i, o, stride) for i, o, stride in mirrored))
        self.output = nn.Conv1d(8, 1, kernel_size=7, padding=3)

    def fit(self, parameters: Tensor | SnapshotMatrix) -> None:
        """Nothing is estimated outside training."""

    def encode(self, parameters: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior of z (Eqs. 2 and 3): `[B, P]`, `[B, d]` -> mean and log-variance, `[B, k]` each."""
        x = torch.cat([parameters, condition], dim=1)
        x = F.pad(x, (0, self.padded - x.shape[1]))[:, None]
        hidden = F.leaky_relu(self.to_hidden(self.encoder(x).flatten(1)))
        mean, logvar = self.to_posterior(hidden).chunk(2, dim=1)
        return mean, logvar

    def decode(self, latent: Tensor, condition: Tensor) -> Tensor:
        """Mean of l (Eqs. 5 and 6): `[B, k]`, `[B, d]` -> `[B, P]`."""
        x = self.from_latent(torch.cat([latent, condition], dim=1)).unflatten(1, self.narrow)
        return self.output(self.decoder(x))[:, 0, : self.size]

    coordinates = decode  # a convolution has none: its columns are made together

    @torch.no_grad()
    def writer(self, coordinates: Tensor, statistics: Statistics) -> Callable[[int, Tensor], Tensor]:
        """As [`LinearDecoder.writer`], of the decoded `[B, P]`."""
        whole = statistics.denormalize(coordinates)
        return lambda first, out: out.copy_(whole[:, first : first + out.shape[1]])

    def reconstruction_loss(self, squared_error: Tensor) -> Tensor:
        """`[B]` mean squared errors, as published."""
        return squared_error


NETWORKS: dict[str, type[PrincipalNetwork | DirectNetwork | PaperNetwork]] = {
    "principal": PrincipalNetwork,
    "direct": DirectNetwork,
    "paper": PaperNetwork,
}
