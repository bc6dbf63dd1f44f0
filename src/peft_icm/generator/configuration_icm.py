"""ICMConfig: everything about a generator that is not a weight."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..adapters.layout import AdapterLayout

ARCHITECTURES = ("principal", "paper")


@strict
class ICMConfig(PreTrainedConfig):
    r"""Configuration of an [`ICMGenerator`].

    Args:
        architecture (`str`, defaults to `"principal"`): `"principal"`: a multi-layer perceptron CVAE in the principal subspace of
            the collection's adapters. `"paper"`: the convolutional CVAE of In-Context Meta LoRA Generation, Eqs. 2-9.
        layout (`dict`): [`AdapterLayout.to_dict`] of the adapters that are generated.
        encoder (`dict`): The task encoder's config: kind, checkpoint, dim, sha256 of its weights.
        condition_dim (`int`, defaults to 512): d, the width of a task vector.
        latent_size (`int`, defaults to 64): k, the width of z (Eq. 7). The published code of the paper has 256.
        hidden_size (`int`, defaults to 256): Width of the hidden layers.
        num_components (`int`, *optional*): `"principal"` only: dimensions of the principal subspace. By default as many as make
            2^20 numbers, at least 9 and at most 96.
        num_conv_layers (`int`, defaults to 12): `"paper"` only: convolutional layers of encoder and decoder; those past the
            twelfth have stride 1 (Table 5).
        kl_weight (`float`, defaults to 0.005): Weight of the KL term, in nats (section 4.1).
        context (`bool`, defaults to `True`): Whether the decoder attends over the (task vector, latent) pairs of the
            collection's tasks.
        tasks (`list[dict]`): `{"name", "description"}` of each task trained on, in the order of the context's pairs.
        base_model_subfolder (`str`, *optional*): Where the base model lies inside the generator's own repo, if it travels in it.
        training (`dict`): Facts of the training, for the model card.

    Raises:
        `ValueError`: If `architecture` is unknown or a size is not positive.

    Example:

    ```python
    >>> ICMConfig(architecture="paper").num_conv_layers
    12

    ```
    """

    model_type = "icm"

    architecture: str = "principal"
    layout: dict[str, Any] | None = None
    encoder: dict[str, Any] | None = None
    condition_dim: int = 512
    latent_size: int = 64
    hidden_size: int = 256
    num_components: int | None = None
    num_conv_layers: int = 12
    kl_weight: float = 0.005
    context: bool = True
    tasks: list[dict[str, Any]] | None = None
    base_model_subfolder: str | None = None
    training: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what follows from the layout."""
        if self.num_components is None and self.layout is not None:
            self.num_components = min(96, max(9, 2**20 // self.adapter_layout.numel))
        super().__post_init__(**kwargs)

    def validate_icm(self) -> None:
        """Part of `@strict`-powered validation."""
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture={self.architecture!r} is unknown: choose one of {', '.join(ARCHITECTURES)}.")
        for name in ("condition_dim", "latent_size", "hidden_size", "num_conv_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.kl_weight < 0:
            raise ValueError(f"kl_weight={self.kl_weight} must not be negative.")

    @property
    def adapter_layout(self) -> AdapterLayout:
        """The layout of the generated adapters.

        Raises:
            `ValueError`: If the configuration has none.
        """
        if self.layout is None:
            raise ValueError("This ICMConfig has no layout: pass layout=AdapterLayout.from_peft_model(model).to_dict().")
        return AdapterLayout.from_dict(self.layout)
