"""AdapterLayout: the ordered tensors of one LoRA on one base model, and the vector they flatten into."""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .functional import normal_config, scales
from .tensors import PREFIX, KeyMap, check_tensors, expected_shape, groups, map_keys, module_of, natural, outside_adapters, ranks_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What is downloaded of an adapter's repo: with the configurations below it, by which a folder of named adapters is known.
ADAPTER_FILES = ("adapter_*", "*/adapter_config.json")
_SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def _json_config(config: LoraConfig) -> dict[str, Any]:
    """The fields of a configuration as its adapter_config.json has them."""
    return json.loads(json.dumps(config.to_dict(), default=lambda value: sorted(value) if isinstance(value, set) else str(value)))


def _read_config(folder: Path) -> dict[str, Any]:
    """The fields of a folder's adapter_config.json."""
    file = folder / "adapter_config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is missing or no JSON ({error}). Save the adapter again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a JSON object, found a {type(values).__name__}. Save the adapter again.")
    return values


@dataclass(frozen=True)
class AdapterLayout:
    """The ordered (key, shape) pairs of one LoRA on one base model, with its PEFT configuration.

    A layout turns a PEFT state dict into one vector `l` of [`~AdapterLayout.numel`] = P numbers (the paper's `l_t`, section 4.1)
    and back, bit-exactly. It is always derived from an adapter, never typed in.

    Args:
        keys (`tuple[str, ...]`): Keys of `peft.get_peft_model_state_dict`, in natural order (`layers.2` before `layers.10`).
        shapes (`tuple[tuple[int, ...], ...]`): Shape of each tensor, in the order of `keys`.
        dtype (`str`): `"float32"`, `"bfloat16"` or `"float16"`: the dtype of every tensor.
        peft_config (`dict`): The LoRA configuration, without what names the base.
        base_model_class (`str`, *optional*): Class of the base model, e.g. `"LlamaForCausalLM"`; not checked where unknown.
        base_model_name_or_path (`str`, *optional*): Hub id or folder of the base model.
        revision (`str`, *optional*): Revision of the base model on the Hub.

    Example:

    ```python
    >>> from peft import LoraConfig, get_peft_model
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> llama = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    >>> lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    >>> layout = AdapterLayout.from_peft_model(get_peft_model(LlamaForCausalLM(llama), lora))
    >>> layout.numel
    128
    >>> layout.shapes[0]
    (2, 16)

    ```
    """

    keys: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    peft_config: dict[str, Any] = field(hash=False)
    base_model_class: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None

    # ------------------------------------------------------------------ derived from an adapter
    @classmethod
    def from_peft_model(cls, model: PeftModel, adapter_name: str = "default") -> AdapterLayout:
        """Derive the layout of the adapter `adapter_name` of `model` (which may be on the meta device).

        Raises:
            `ValueError`: If `model` is no `PeftModel`, has no such adapter, or the adapter is not a plain LoRA.
        """
        if not isinstance(model, PeftModel):
            raise ValueError(f"Expected a peft.PeftModel, got {type(model).__name__}. Wrap the base with get_peft_model first.")
        if adapter_name not in model.peft_config:
            raise ValueError(f"No adapter named {adapter_name!r}: the model has {sorted(model.peft_config)}.")
        config: Any = model.peft_config[adapter_name]
        base = model.get_base_model()
        state_dict = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
        layout = cls.from_state_dict(state_dict, config, base_model_class=type(base).__name__)
        name = config.base_model_name_or_path or getattr(base, "name_or_path", None) or None
        revision = config.revision or getattr(getattr(base, "config", None), "_commit_hash", None)
        return cls(**{**layout._fields(), "base_model_name_or_path": name, "revision": revision})

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], config: LoraConfig, *, base_model_class: str | None = None) -> AdapterLayout:
        """Derive the layout from the tensors of an adapter and its configuration.

        Args:
            state_dict (`Mapping[str, Tensor]`): As `peft.get_peft_model_state_dict` returns it.
            config (`LoraConfig`): The configuration of the adapter.
            base_model_class (`str`, *optional*): Class of the base model.

        Raises:
            `ValueError`: If a key is not a LoRA matrix, or dtypes are mixed or not one of fp32, bf16 and fp16.
        """
        dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in state_dict.values()}
        if not isinstance(config, LoraConfig):
            raise ValueError(f"Only LoRA adapters have a layout, found {type(config).__name__}.")
        return cls._build({key: tuple(tensor.shape) for key, tensor in state_dict.items()}, dtypes, _json_config(config), base_model_class)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, key_map: KeyMap = (), **hub_kwargs: Any) -> AdapterLayout:
        """Derive the layout from a saved PEFT adapter; only the header of its safetensors file is read.

        Args:
            folder (`str` or `Path`): A local folder or a Hub id.
            key_map (`Sequence[tuple[str, str]]`, *optional*): See [`map_keys`]; for adapters of another module tree. The names in the
                adapter's configuration stay as they are.
            **hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`.

        Raises:
            `ValueError`: If the folder holds no safetensors LoRA, or the file is corrupted.
        """
        from ..hub.files import resolve

        path = resolve(str(folder), allow_patterns=ADAPTER_FILES, **hub_kwargs)
        weights = path / "adapter_model.safetensors"
        if not weights.is_file():
            raise ValueError(f"{folder} holds no adapter_model.safetensors: {_where_instead(path)}")
        config = _read_config(path)
        try:
            with safe_open(weights, framework="pt") as file:
                headers = map_keys({key: file.get_slice(key) for key in file.keys()}, key_map)  # noqa: SIM118 - no mapping
                shapes = {key: tuple(header.get_shape()) for key, header in headers.items()}
                dtypes = {_SAFETENSORS_DTYPES.get(header.get_dtype(), header.get_dtype()) for header in headers.values()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{weights} is not a readable safetensors file ({error}). Save or download it again.") from error
        mapping = config.get("auto_mapping")
        try:
            return cls._build(shapes, dtypes, config, mapping.get("base_model_class") if isinstance(mapping, dict) else None)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def _build(
        cls, shapes: Mapping[str, tuple[int, ...]], dtypes: set[str], config: Mapping[str, Any], base_model_class: Any
    ) -> AdapterLayout:
        if len(dtypes) > 1 or not dtypes <= DTYPES.keys():
            raise ValueError(f"All tensors must share one dtype of {sorted(DTYPES)}, found {sorted(dtypes)}.")
        keys = sorted(shapes, key=natural)
        return cls.from_dict(
            {
                "keys": keys,
                "shapes": [shapes[key] for key in keys],
                "dtype": next(iter(dtypes), "float32"),
                "peft_config": config,
                "base_model_class": base_model_class,
                "base_model_name_or_path": config.get("base_model_name_or_path") or None,
                "revision": config.get("revision"),
            }
        )

    # ------------------------------------------------------------------ what it says
    @functools.cached_property
    def numel(self) -> int:
        """P, the number of parameters of one adapter."""
        return sum(self.sizes)

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Number of elements of each tensor, in the order of `keys`."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the adapter as a `torch.dtype`."""
        return DTYPES[self.dtype]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors of one adapter."""
        return self.numel * self.torch_dtype.itemsize

    @functools.cached_property
    def modules(self) -> list[str]:
        """Names of the base's modules that carry a LoRA, in the order of `keys`."""
        return list(dict.fromkeys(module_of(key) for key in self.keys))

    def key_at(self, index: int) -> str:
        """The key of the tensor that coordinate `index` of a vector belongs to."""
        return self.keys[bisect.bisect_right(list(itertools.accumulate(self.sizes)), index)]

    def difference(self, other: AdapterLayout) -> str:
        """The first thing in which `other` differs, in words: key, expected and found shape, or a field of the configuration."""
        mine, theirs = dict(zip(self.keys, self.shapes, strict=True)), dict(zip(other.keys, other.shapes, strict=True))
        for key in sorted(mine.keys() | theirs.keys(), key=natural):
            if mine.get(key) != theirs.get(key):
                return f"{key}: expected shape {mine.get(key, 'none')}, found {theirs.get(key, 'none')}"
        for name in ("lora_alpha", "use_rslora", "alpha_pattern"):
            if self.peft_config.get(name) != other.peft_config.get(name):
                return f"{name}: expected {self.peft_config.get(name)}, found {other.peft_config.get(name)}"
        return "nothing"

    @functools.cached_property
    def ranks(self) -> dict[str, int]:
        """Rank of each module's LoRA, in the order of [`~AdapterLayout.modules`]."""
        return ranks_of(self.keys, self.shapes)

    @functools.cached_property
    def scales(self) -> list[float]:
        """s of each module, in the order of [`~AdapterLayout.modules`]: the update of its weight is s BA."""
        return scales(self.peft_config, self.ranks)

    @property
    def fingerprint(self) -> str:
        """Hex digest over keys, shapes and the scale of each module, all that makes the function; dtype and base id do not enter."""
        text = json.dumps([self.keys, self.shapes, self.scales])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def lora_config(self) -> LoraConfig:
        """A fresh `peft.LoraConfig` of this adapter that names its base and revision."""
        config = LoraConfig.from_peft_type(**self.peft_config)
        config.base_model_name_or_path = self.base_model_name_or_path
        config.revision = self.revision
        return config

    # ------------------------------------------------------------------ vector and tensors
    def flatten(self, state_dict: Mapping[str, Tensor]) -> Tensor:
        """Concatenate the tensors of an adapter into one vector, bit-exactly.

        Args:
            state_dict (`Mapping[str, Tensor]`): Exactly the tensors of this layout.

        Returns:
            `Tensor`: `[P]`, in the layout's dtype.

        Raises:
            `ValueError`: If a key is missing or unknown, or a shape or dtype differs; names the first such key.
        """
        self._check(state_dict)
        return torch.cat([state_dict[key].detach().reshape(-1) for key in self.keys])

    def parts(self, state_dict: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """The vector of an adapter a part `[n]` at a time, so that it is never whole beside the adapter.

        Raises:
            `ValueError`: As [`~AdapterLayout.flatten`], before the first part.
        """
        self._check(state_dict)
        for group in groups(self.sizes):
            flat = [state_dict[key].detach().reshape(-1) for key in self.keys[group]]
            yield flat[0] if len(flat) == 1 else torch.cat(flat)

    def sha256(self, state_dict: Mapping[str, Tensor]) -> str:
        """Hex digest over the values of an adapter, bit by bit: whether it still is what it was."""
        return self.digests(state_dict, [self.dtype])[self.dtype]

    def digests(self, state_dict: Mapping[str, Tensor], dtypes: Iterable[str]) -> dict[str, str]:
        """[`~AdapterLayout.sha256`] of what an adapter would be after a cast to each of some dtypes, in one walk.

        Raises:
            `ValueError`: As [`~AdapterLayout.flatten`].
        """
        found = {dtype: hashlib.sha256() for dtype in dtypes}
        for part in self.parts(state_dict):
            for dtype, digest in found.items():
                digest.update(part.to("cpu", DTYPES[dtype]).view(torch.uint8).numpy().data)
        return {dtype: digest.hexdigest() for dtype, digest in found.items()}

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Cut a vector into the named tensors of an adapter; the inverse of [`~AdapterLayout.flatten`].

        Args:
            vector (`Tensor`): `[P]`; converted to the layout's dtype where it has another.

        Returns:
            `dict[str, Tensor]`: One contiguous tensor for each key.

        Raises:
            `ValueError`: If `vector` is not of shape `[P]`.
        """
        if tuple(vector.shape) != (self.numel,):
            raise ValueError(f"Expected a vector of shape ({self.numel},), found {tuple(vector.shape)}.")
        parts = vector.to(self.torch_dtype).split(self.sizes)
        return {key: part.reshape(shape).clone() for key, shape, part in zip(self.keys, self.shapes, parts, strict=True)}

    def _check(self, state_dict: Mapping[str, Tensor]) -> None:
        for key, shape in zip(self.keys, self.shapes, strict=True):
            if key not in state_dict:
                raise ValueError(f"The adapter lacks {key}: expected shape {shape}, found nothing.")
            found = state_dict[key]
            if tuple(found.shape) != shape:
                raise ValueError(f"{key}: expected shape {shape}, found {tuple(found.shape)}. The adapter is of another layout.")
            if found.dtype != self.torch_dtype:
                raise ValueError(f"{key}: expected dtype {self.dtype}, found {found.dtype}. Convert the adapter first.")
        unknown = sorted(set(state_dict) - set(self.keys), key=natural)
        if unknown:
            shape = tuple(state_dict[unknown[0]].shape)
            raise ValueError(f"{unknown[0]}: expected no such key, found shape {shape}. The adapter is of another layout.")

    def check_base(self, base: nn.Module) -> None:
        """Refuse a base model that this LoRA does not fit, before anything is touched.

        Args:
            base (`nn.Module`): The base model, bare or already carrying LoRA layers.

        Raises:
            `ValueError`: Names the first key with the expected and the found shape, or the class that does not fit.
        """
        if self.base_model_class and type(base).__name__ != self.base_model_class:
            raise ValueError(f"The adapters are for a {self.base_model_class}, found a {type(base).__name__}.")
        ranks = self.ranks
        modules = {name: getattr(module, "base_layer", module) for name, module in outside_adapters(base).items()}
        for key, shape in zip(self.keys, self.shapes, strict=True):
            name = module_of(key)
            if name not in modules:
                raise ValueError(f"{key}: expected shape {shape}, found no module {name} in the base model.")
            found = expected_shape(key, shape, ranks[name], modules[name])
            if found != shape:
                raise ValueError(f"{key}: expected shape {shape}, found a base model that needs {found}.")
        config, known = self.lora_config(), set(self.modules)
        for name in modules:
            targeted = bool(check_target_module_exists(config, name))
            if targeted and name not in known:
                raise ValueError(
                    f"{PREFIX}{name}.lora_A.weight: expected no such module, found one in the base model, which has more"
                    f" LoRA targets than the layout's {len(known)}."
                )
            if name in known and not targeted:
                raise ValueError(
                    f"{PREFIX}{name}.lora_A.weight: expected target_modules that name this module, found {config.target_modules}."
                    " Correct them in the adapter's adapter_config.json."
                )

    # ------------------------------------------------------------------ JSON
    def _fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def to_dict(self) -> dict[str, Any]:
        """The layout as JSON-able values; [`~AdapterLayout.from_dict`] reads them back."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterLayout:
        """Read a layout that [`~AdapterLayout.to_dict`] wrote; whatever makes a layout goes through here.

        Raises:
            `ValueError`: If a field is missing, unknown or of another type, a key is no LoRA matrix or has no partner, shapes and the
                configuration's ranks do not fit, or the configuration is of another function than a plain LoRA's.
        """
        if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
            raise ValueError(f"A layout must be an object, found a {type(values).__name__}.")
        needed = {"keys", "shapes", "dtype", "peft_config"}
        if needed - values.keys() or values.keys() - cls.__dataclass_fields__.keys():
            wrong = sorted(needed - values.keys()) or sorted(values.keys() - cls.__dataclass_fields__.keys())
            raise ValueError(f"A layout has the fields {', '.join(cls.__dataclass_fields__)}: {wrong[0][:60]!r} is missing or unknown.")
        keys, shapes = check_tensors(values["keys"], values["shapes"])
        if not isinstance(values["dtype"], str) or values["dtype"] not in DTYPES:
            raise ValueError(f"dtype={str(values['dtype'])[:60]!r} must be one of {sorted(DTYPES)}.")
        if not isinstance(values["peft_config"], Mapping):
            raise ValueError(f"peft_config must be an object, found a {type(values['peft_config']).__name__}.")
        texts = {name: values.get(name) for name in ("base_model_class", "base_model_name_or_path", "revision")}
        for name, text in texts.items():
            if not (text is None or (isinstance(text, str) and len(text) <= 4096 and text.isprintable())):
                raise ValueError(f"{name}={str(text)[:60]!r} must be a string or null.")
        return cls(keys, shapes, values["dtype"], normal_config(values["peft_config"], ranks_of(keys, shapes)), **texts)


def same_function(config: LoraConfig, layout: AdapterLayout) -> bool:
    """Whether an adapter of this configuration computes the same function of the same tensors as one of `layout`."""
    try:
        return scales(normal_config(_json_config(config), layout.ranks), layout.ranks) == layout.scales
    except ValueError:
        return False


def _where_instead(path: Path) -> str:
    """What to do with a folder that has no weights in safetensors: where they lie, or how they are converted."""
    if (path / "adapter_model.bin").is_file():
        return "convert its adapter_model.bin: load it with PeftModel.from_pretrained and save it with save_pretrained."
    named = sorted(file.parent.name for file in path.glob("*/adapter_config.json"))
    if named:
        return f"its adapters lie in {', '.join(f'{name}/' for name in named[:5])}: name that folder, after a download if it is a repo's."
    return "save it with PeftModel.save_pretrained."
