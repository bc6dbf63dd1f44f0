"""ICMConfig: everything about a generator that is not a weight."""

import math
import os
from collections.abc import Callable
from functools import wraps
from pathlib import PurePosixPath
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from ..adapters.layout import AdapterLayout
from ..disk import safe_name
from .condition_space import SPACES, projected_dim

ARCHITECTURES = ("principal", "direct", "paper")
MAX_TASKS = 10_000
# A generator of a repo is built before its weights are read: what a config can ask for has a bound.
BOUNDS = {"condition_dim": 65_536, "latent_size": 65_536, "hidden_size": 65_536, "num_components": 4_096, "num_conv_layers": 64}
DTYPES = (None, "float32", "bfloat16", "float16", "float64", torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Fields by which transformers reads other files or builds other modules.
FOREIGN = ("transformers_weights", "quantization_config", "fusion_config", "distributed_config", "auto_map")


def _value_errors(cls: type) -> type:
    """`@strict` raises exceptions of its own, of two lines: here they are ValueErrors of one."""

    def plain(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def checked(*args: Any, **kwargs: Any) -> Any:
            try:
                return method(*args, **kwargs)
            except (StrictDataclassError, TypeError, AttributeError) as error:
                cause = error.__cause__ or error
                raise ValueError(f"{cls.__name__}: {' '.join(str(cause).split())}") from error

        return checked

    for name in ("__init__", "__setattr__", "validate"):
        setattr(cls, name, plain(getattr(cls, name)))
    return cls


@_value_errors
@strict
class ICMConfig(PreTrainedConfig):
    r"""Configuration of an [`ICMGenerator`].

    Args:
        architecture (`str`, defaults to `"principal"`): `"principal"`: a multi-layer perceptron CVAE in the principal subspace of
            the collection's adapters. `"direct"`: a perceptron and a trained linear map to all of A and B, for training through the
            tasks' own loss ([`ICMTrainingArguments`], `objective="task"`). `"paper"`: the convolutional CVAE of In-Context Meta LoRA
            Generation, Eqs. 2-9.
        layout (`dict`): [`AdapterLayout.to_dict`] of the adapters that are generated.
        encoder (`dict`): The task encoder's config: kind, checkpoint, dim, sha256 of its weights.
        condition_dim (`int`, defaults to 512): d, the width of a task vector.
        latent_size (`int`, defaults to 64): k, the width of z (Eq. 7). The published code of the paper has 256.
        hidden_size (`int`, defaults to 256): Width of the hidden layers.
        num_components (`int`, *optional*): `"principal"`: dimensions of the principal subspace. By default as many as make
            2^20 numbers, at least 9 and at most 96, and no more than two for each task: the tasks and their trajectories span few.
            `"direct"`: rows of the linear map, by default 64.
        basis_dtype (`str`, *optional*): `"int8"`: the linear map of `"principal"` or `"direct"` is kept in 8 bits with a scale a row. The
            map of `"principal"` is estimated (in bf16) and not trained, that of `"direct"` cannot be trained so. Written by
            `save_pretrained(..., dtype="int8")`.
        num_conv_layers (`int`, defaults to 12): `"paper"` only: convolutional layers of encoder and decoder, at most 64; those past
            the twelfth have stride 1 (Table 5).
        kl_weight (`float`, defaults to 0.005): Weight of the KL term, in nats (section 4.1).
        context (`bool`, defaults to `True`): Whether the decoder attends over the (task vector, latent) pairs of the
            collection's tasks.
        tasks (`list[dict]`): `{"name", "description"}` of each task trained on, in the order of the context's pairs.
        words (`list[str]`, *optional*): What a misspelt word of a request may stand for ([`respell`]): [`ICMTrainer`] writes those of the
            tasks' sentences. `None` is that of older generators: requests are read as they are spelt.
        condition_space (`str`, *optional*): What is done to task vectors before they are used, see [`ConditionSpace`]: `"none"`,
            `"whitening"`, `"lda"` or `"head"`. With any but `"none"` the generator tells how familiar a request is ([`Reading`]).
            [`ICMTrainer`] writes `"lda"` where it builds a `"principal"` generator of two tasks or more. `None` is that of
            generators saved by 0.1.0: `"none"`.
        text_reader (`bool`, defaults to `False`): `"direct"` only: whether the generator tells how familiar a sentence is, though its
            network sees task vectors as they are ([`TextReader`]). [`ICMTrainer`] writes `True` where it builds a generator of two tasks
            or more with an encoder that reads text.
        base_model_subfolder (`str`, *optional*): Where the base model lies inside the generator's own repo, if it travels in it.
        training (`dict`): Facts of the training, for the model card.
        weights_sha256 (`str`, *optional*): Of the tensors beside a saved config; written by `save_pretrained` and checked when they are
            loaded.

    Raises:
        `ValueError`: If a field is of another type or out of its bounds, or the layout is none.

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
    basis_dtype: str | None = None
    num_conv_layers: int = 12
    kl_weight: float | int = 0.005
    context: bool = True
    tasks: list[dict[str, Any]] | None = None
    words: list[str] | None = None
    condition_space: str | None = None
    text_reader: bool = False
    base_model_subfolder: str | None = None
    training: dict[str, Any] | None = None
    weights_sha256: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what follows from the layout and the tasks."""
        foreign = next((name for name in FOREIGN if kwargs.get(name) is not None), None)
        if foreign:
            raise ValueError(f"{foreign}={kwargs[foreign]!r} is no field of a generator: take it out.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is none of a generator: choose one of float32, bfloat16, float16, float64.")
        if self.num_components is None and self.architecture == "direct":
            self.num_components = 64
        elif self.num_components is None and self.layout is not None:
            by_size = min(96, max(9, 2**20 // self.adapter_layout.numel))
            self.num_components = min(by_size, 2 * len(self.tasks)) if self.tasks else by_size
        super().__post_init__(**kwargs)

    def validate_icm(self) -> None:
        """Part of `@strict`-powered validation."""
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture={self.architecture!r} is unknown: choose one of {', '.join(ARCHITECTURES)}.")
        if self.basis_dtype not in (None, "int8"):
            raise ValueError(f"basis_dtype={self.basis_dtype!r} is unknown: choose 'int8' or None.")
        if self.basis_dtype and self.architecture == "paper":
            raise ValueError(f"basis_dtype={self.basis_dtype!r} is for 'principal' and 'direct': architecture='paper' has no basis.")
        for name, bound in BOUNDS.items():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}={value} must be at least 1.")
            if value is not None and value > bound:
                raise ValueError(f"{name}={value} must be at most {bound}.")
        if isinstance(self.kl_weight, bool) or self.kl_weight < 0 or not math.isfinite(self.kl_weight):
            raise ValueError(f"kl_weight={self.kl_weight} must not be negative, and finite.")
        if self.layout is not None:
            AdapterLayout.from_dict(self.layout)
        if self.base_model_subfolder is not None:
            _check_subfolder("base_model_subfolder", self.base_model_subfolder)
        self._validate_tasks()
        self._validate_encoder()
        self._validate_reading()

    def _validate_tasks(self) -> None:
        if self.tasks is not None and len(self.tasks) > MAX_TASKS:
            raise ValueError(f"tasks has {len(self.tasks)} entries, must have at most {MAX_TASKS}.")
        for index, task in enumerate(self.tasks or []):
            safe_name(task.get("name"), "task")
            if not isinstance(task.get("description", ""), str | None):
                raise ValueError(f"tasks[{index}]: description={task['description']!r} must be a string.")

    def _validate_encoder(self) -> None:
        encoder = self.encoder
        if encoder is None:
            return
        for name in ("kind", "checkpoint", "sha256", "folder"):
            if not isinstance(encoder.get(name, ""), str | None):
                raise ValueError(f"encoder: {name}={encoder[name]!r} must be a string.")
        dim = encoder.get("dim", self.condition_dim)
        if isinstance(dim, bool) or dim != self.condition_dim:
            raise ValueError(f"encoder: dim={dim!r} must be the condition_dim, {self.condition_dim}.")
        parts = encoder.get("parts", {})
        if not isinstance(parts, dict) or not all(isinstance(part, dict) for part in parts.values()):
            raise ValueError(f"encoder: parts={parts!r:.80} must be an object of configs.")
        for part in (encoder, *parts.values()):
            if part.get("folder") and (not isinstance(part["folder"], str) or PurePosixPath(part["folder"]).is_absolute()):
                raise ValueError(f"encoder: folder={part['folder']!r} must be a relative path inside the generator's folder.")

    def _validate_reading(self) -> None:
        if self.condition_space not in (None, *SPACES):
            raise ValueError(f"condition_space={self.condition_space!r} is unknown: choose one of {', '.join(SPACES)}.")
        alone = self.layout is not None and len(self.tasks or []) < 2
        if self.reads and alone:
            raise ValueError(f"condition_space={self.condition_space!r} tells tasks apart: it needs two or more, choose 'none'.")
        if self.text_reader and alone:
            raise ValueError("text_reader=True tells tasks apart: it needs two or more, choose False.")
        if self.text_reader and (self.architecture != "direct" or self.reads):
            raise ValueError("text_reader=True is for architecture='direct' with condition_space='none': others read by their space.")
        text = (self.encoder or {}).get("parts", {}).get("text", {})
        if isinstance(text.get("dim"), bool) or not isinstance(self.text_dim, int) or not 1 <= self.text_dim <= self.condition_dim:
            raise ValueError(f"encoder: parts: text: dim={self.text_dim!r} must be from 1 to the condition_dim, {self.condition_dim}.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:  # type: ignore[override]
        """Load a configuration, as in transformers.

        Raises:
            `OSError`: One line: it can't be found, or is no JSON.
            `ValueError`: One line that names the file and the field that is wrong.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except OSError as error:
            raise OSError(" ".join(str(error).split())) from error
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise ValueError(f"config.json of {pretrained_model_name_or_path}: {' '.join(str(error).split())}") from error

    @property
    def reads(self) -> bool:
        """Whether the generator has a condition space, and tells what it knows from what it does not."""
        return self.condition_space not in (None, "none")

    @property
    def text_dim(self) -> int:
        """The width of what a sentence is encoded to: with an encoder of parts, that of the part for text, which stands first."""
        return (self.encoder or {}).get("parts", {}).get("text", {}).get("dim", self.condition_dim)

    @property
    def projected_dim(self) -> int:
        """m, the width of the task vectors that the networks see."""
        return projected_dim(self.condition_space, self.condition_dim, len(self.tasks or []))

    @property
    def adapter_layout(self) -> AdapterLayout:
        """The layout of the generated adapters.

        Raises:
            `ValueError`: If the configuration has none.
        """
        if self.layout is None:
            raise ValueError("This ICMConfig has no layout: pass layout=AdapterLayout.from_peft_model(model).to_dict().")
        return AdapterLayout.from_dict(self.layout)


def _check_subfolder(field: str, value: str) -> None:
    path = PurePosixPath(value)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{field}={value!r} must be a relative path inside the generator's folder.")
    for part in path.parts:
        safe_name(part, field)
