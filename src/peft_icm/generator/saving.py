"""A generator on disk and on the Hub: loaded with every tensor that it needs, saved whole, pushed with a card."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Self, Unpack

import torch
from huggingface_hub import CommitInfo
from torch import Tensor
from transformers import PreTrainedModel

from ..disk import inside, replacing_folder
from ..hub.bases import copy_base
from ..hub.cards import generator_card
from ..hub.files import BASE_FOLDER, PICTURE, REPORT, PushOptions, published, push_folder, resolve
from ..hub.space import GENERATOR_FOLDER, space_card, write_space
from ..pictures import Picture, open_picture
from ..remote import is_url
from .belongings import LOADING, Source
from .configuration_icm import ICMConfig
from .generation import AdapterMixin
from .weights import SAVED_DTYPES, check_weights, hash_weights, in_dtype, weight_files, weight_names

ENCODER_FOLDER = "encoder"
_OWN_FILES = ("config.json", "model*.safetensors", "model.safetensors.index*.json")  # not those of encoder/ and base_model/


class SavedModel(AdapterMixin, PreTrainedModel):
    """The side of [`ICMGenerator`] that meets disks and Hubs."""

    config: ICMConfig

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        config: ICMConfig | str | os.PathLike[str] | None = None,
        subfolder: str = "",
        variant: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a generator from a folder or the Hub: every tensor that its config asks for, and nothing else.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): `"org/name"` or a folder.
            config ([`ICMConfig`], `str` or `Path`, *optional*): In the place of the folder's own.
            subfolder (`str`, defaults to `""`): Where in the folder or repo.
            variant (`str`, *optional*): As in transformers.
            **kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `dtype`, `device_map`, as in transformers; the first four
                reach its encoder and base model too, which come from the commit that was found here.

        Returns:
            [`ICMGenerator`]: In eval mode. Its encoder and base model are loaded when they are first needed.

        Raises:
            `OSError`: One line: the repo, the revision or the files can't be found or read.
            `ValueError`: One line: a field of the config is wrong, a tensor is missing, unexpected, of another shape or not finite, or the
                weights are not those that were saved with the config.
        """
        name = str(pretrained_model_name_or_path)
        names = ("revision", "token", "cache_dir", "local_files_only")
        given = {option: value for option in names if (value := kwargs.pop(option, None)) is not None}
        if is_url(name):
            name = str(resolve(name))  # a copy of all that lies there, encoder and base too, is a folder like any other
        root = resolve(name, allow_patterns=[str(PurePosixPath(subfolder, file)) for file in _OWN_FILES], **given)
        folder = inside(root, subfolder) if subfolder else root
        fields = {field: kwargs.pop(field) for field in ICMConfig.__annotations__ if field in kwargs}
        own: ICMConfig = config if isinstance(config, ICMConfig) else ICMConfig.from_pretrained(config or folder, **fields)
        if own.layout is None:
            raise ValueError(f"{folder} holds no generator: its config.json is missing, or has no layout. Name a folder that holds one.")
        found = check_weights(weight_files(folder, variant), cls._expected(own))
        if own.weights_sha256 not in (None, found):
            raise ValueError(f"The weights in {folder} are not those that its config.json was saved with: download or save it again.")
        with LOADING:
            loaded = super().from_pretrained(folder, *model_args, config=own, variant=variant, **{**kwargs, "use_safetensors": True})
        generator = loaded[0] if isinstance(loaded, tuple) else loaded
        generator.config.weights_sha256 = None  # of what is on disk
        generator.config.name_or_path = generator.name_or_path = name
        generator._source = Source(name=name, subfolder=subfolder, sha256=found, **given)
        generator._source.pop("revision", None)
        if not os.path.isdir(name):
            generator._source["revision"] = generator.config._commit_hash = root.name
        return loaded

    @property
    def saved_sha256(self) -> str | None:
        """sha256 of the weights that this generator was loaded from; `None` where it was loaded from nowhere."""
        return self._source.get("sha256")

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        *,
        dtype: str | torch.dtype | None = None,
        with_base_model: bool = False,
        safe_serialization: bool = True,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save config, weights and, where it is small, the task encoder: the folder stands on its own, and is old or new, never half.

        Args:
            save_directory (`str` or `Path`): The folder.
            is_main_process (`bool`, defaults to `True`): Whether this process writes.
            dtype (`str` or `torch.dtype`, *optional*): Of what is written: `"float32"`, `"bfloat16"`, `"float16"`, or `"int8"` for the
                linear map of `"principal"` and `"direct"`, nearly all of a large generator, with a scale a row: it loads as that, and a
                `"direct"` one does not train. By default the dtype that the generator has. Statistics and readers stay in fp32.
            with_base_model (`bool`, defaults to `False`): Copy a base model that is a local folder into `base_model/`.
            safe_serialization (`bool`, defaults to `True`): There for those who pass it; there is no other way.
            push_to_hub (`bool`, defaults to `False`): Push it afterwards, as `repo_id` or the name of the folder.
            **kwargs: As in transformers: `state_dict`, `max_shard_size`, `variant`, and with `push_to_hub` what
                [`~ICMGenerator.push_to_hub`] takes.

        Raises:
            `OSError`: If `save_directory` is a file, or cannot be written.
            `ValueError`: If `safe_serialization` is off, `dtype` is none of these, or a weight is not finite (in that dtype).
        """
        _check_safe(safe_serialization)
        dtype = self._check_dtype(dtype)
        target = Path(save_directory)
        if target.exists() and not target.is_dir():
            raise OSError(f"{target} is a file: choose a folder.")
        push = {name: kwargs.pop(name) for name in (*PushOptions.__annotations__, "repo_id") if name in kwargs}
        if not is_main_process:
            super().save_pretrained(save_directory, is_main_process=False, **kwargs)
            return
        variant = kwargs.get("variant")
        with replacing_folder(target) as folder:
            self._write(folder, target, dtype, with_base_model, **kwargs)
            written = {file.name for file in folder.iterdir()}
        single, index = weight_names(variant)
        if written & {single, index}:
            for stale in {target / single, target / index, *target.glob(f"{single.removesuffix('.safetensors')}-*-of-*.safetensors")}:
                if stale.name not in written:
                    stale.unlink(missing_ok=True)
        if push_to_hub:
            options = {**push, "dtype": dtype, "with_base_model": with_base_model, "max_shard_size": kwargs.get("max_shard_size", "50GB")}
            self.push_to_hub(options.pop("repo_id", None) or target.resolve().name, **options)

    def _write(self, folder: Path, target: Path, dtype: str | None, with_base_model: bool, **kwargs: Any) -> None:
        """Everything of a saved generator, into an empty folder."""
        changes: dict[str, Any] = {}
        if dtype is not None:
            changes["basis_dtype" if dtype == "int8" else "dtype"] = dtype
            kwargs["state_dict"] = in_dtype(kwargs.get("state_dict") or self.state_dict(), dtype)
        encoder = self.config.encoder or {}
        if encoder.get("folder") or any(part.get("folder") for part in encoder.get("parts", {}).values()):
            self.encoder.save_pretrained(folder / ENCODER_FOLDER)
            # Where this generator found its encoder may be outside of the folder; what is saved has its own.
            changes["encoder"] = {**encoder, "folder": ENCODER_FOLDER}
            if "parts" in encoder:
                parts = {name: {**part, "folder": f"{ENCODER_FOLDER}/{name}"} for name, part in encoder["parts"].items()}
                changes["encoder"]["parts"] = parts
        base = self._local_base(with_base_model)
        if base is not None and with_base_model:
            copy_base(base, folder)
            changes |= {"base_model_subfolder": BASE_FOLDER, "layout": {**self.layout.to_dict(), "base_model_name_or_path": None}}
        elif self.config.base_model_subfolder and not (target / self.config.base_model_subfolder).is_dir():
            # It does not travel: on this machine it is still found.
            changes |= {"base_model_subfolder": None, "layout": {**self.layout.to_dict(), "base_model_name_or_path": base}}
        super().save_pretrained(folder, **kwargs)
        config = ICMConfig.from_pretrained(folder)
        for field, value in changes.items():
            setattr(config, field, value)
        if any(folder.glob("model*.safetensors")):
            config.weights_sha256 = hash_weights(weight_files(folder, kwargs.get("variant")))
        config.save_pretrained(folder)

    def _check_dtype(self, dtype: str | torch.dtype | None) -> str | None:
        name = None if dtype is None else str(dtype).removeprefix("torch.")
        if name not in (None, *SAVED_DTYPES):
            raise ValueError(f"dtype={name!r} is none that a generator is saved in: choose one of {', '.join(SAVED_DTYPES)}.")
        if name == "int8" and self.config.architecture == "paper":
            raise ValueError("dtype='int8' is for 'principal' and 'direct': architecture='paper' has no basis, choose 'bfloat16'.")
        return name

    def _local_base(self, download: bool) -> str | None:
        """The folder of the base model, if it has one on this machine."""
        if self.config.base_model_subfolder and (download or not self._source.on_hub) and "name" in self._source:
            return str(self._resolve(self.config.base_model_subfolder))
        name = self.layout.base_model_name_or_path
        return name if name and not self._source.on_hub and os.path.isdir(name) else None

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        dtype: str | torch.dtype | None = None,
        with_base_model: bool = False,
        max_shard_size: int | str = "50GB",
        safe_serialization: bool = True,
        report: Mapping[str, Any] | None = None,
        picture: Picture | None = None,
        **push: Unpack[PushOptions],
    ) -> CommitInfo:
        """Push the generator in one commit, with a card that tells what is known and nothing else.

        A card that was edited by hand, beside the generator or on the Hub, is kept.

        Args:
            repo_id (`str`): `"org/name"`; created where it does not exist.
            dtype (`str` or `torch.dtype`, *optional*): See [`~ICMGenerator.save_pretrained`].
            with_base_model (`bool`, defaults to `False`): Push a base model that is a local folder too, in `base_model/`. Without it others
                pass `base_model=`.
            max_shard_size (`int` or `str`, defaults to `"50GB"`): Of a weight file.
            safe_serialization (`bool`, defaults to `True`): There for those who pass it; there is no other way.
            report (`Mapping`, *optional*): What [`memorisation_report`] returned: goes along as `memorisation.json`, and its means into
                the card.
            picture (`PIL.Image.Image`, `str` or `Path`, *optional*): What its adapters do, such as the figure that `peft-icm demo` draws:
                goes along as `picture.png`, without its metadata, and into the card and the Hub's widget.
            **push: `commit_message`, `commit_description`, `tags`, `private`, `token`, `revision`, `create_pr` and `overwrite_card`: see
                [`PushOptions`].

        Returns:
            `huggingface_hub.CommitInfo`: Of the one commit.

        Raises:
            `ValueError`: If `safe_serialization` is off, `dtype` is none, `picture` is no picture, or a file names a folder of this
                machine; nothing is on the Hub then.
        """
        _check_safe(safe_serialization)
        self._check_dtype(dtype)
        push["commit_message"] = push.get("commit_message") or "Upload ICMGenerator"
        shown = None if picture is None else open_picture(picture)

        def write(folder: Path) -> None:
            self._write_published(folder, repo_id, with_base_model, max_shard_size, dtype)
            if report is not None:
                (folder / REPORT).write_text(json.dumps(report, indent=1), encoding="utf-8")
            if shown is not None:
                shown.save(folder / PICTURE)

        return push_folder(
            write,
            repo_id,
            card=lambda folder: generator_card(ICMConfig.from_pretrained(folder).to_dict(), repo_id=repo_id, folder=folder, report=report),
            source=None if self._source.on_hub or "name" not in self._source else Path(self._source["name"], self._source["subfolder"]),
            **push,
        )

    def _write_published(
        self,
        folder: Path,
        repo_id: str,
        with_base_model: bool,
        max_shard_size: int | str = "50GB",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        """A saved generator that names nothing of this machine."""
        self.save_pretrained(folder, dtype=dtype, with_base_model=with_base_model, max_shard_size=max_shard_size)
        config = ICMConfig.from_pretrained(folder)
        layout = dict(config.layout or {})
        named = layout.get("base_model_name_or_path")
        told = published(named)
        if config.base_model_subfolder is None and (named is None or (told != named and "/" not in told)):
            layout["base_model_name_or_path"] = None
            warnings.warn(
                f"{repo_id} goes without its base model, {named or 'which it does not name'}: others pass base_model=, or push it"
                " with_base_model=True.",
                stacklevel=5,
            )
        else:
            layout["base_model_name_or_path"] = told
        config.layout, config.training, config.encoder = layout, published(config.training), published(config.encoder)
        config.save_pretrained(folder)

    def push_space(
        self,
        repo_id: str,
        *,
        with_base_model: bool = False,
        commit_message: str = "Upload the page of an ICMGenerator",
        private: bool | None = True,
        token: str | bool | None = None,
    ) -> CommitInfo:
        """Push the page of `peft-icm app` for this generator as a Space, with all that it runs.

        A generator from the Hub is named there, with its commit; one of this machine goes along.

        Args:
            repo_id (`str`): `"org/name"`; created where it does not exist.
            with_base_model (`bool`, defaults to `False`): Push a base model that is a local folder too: the page cannot do without.
            commit_message (`str`, defaults to `"Upload the page of an ICMGenerator"`): Message of the commit.
            private (`bool`, *optional*, defaults to `True`): Create a private Space.
            token (`str` or `bool`, *optional*): Access token; by default the stored one.

        Returns:
            `huggingface_hub.CommitInfo`: Of the one commit.

        Raises:
            `ValueError`: If the base model is a local folder that may not go along, or none is named; nothing is on the Hub then.
        """
        name = self._source["name"] if self._source.on_hub else None
        if name is None and not with_base_model and os.path.isdir(self._own_base()[0]):
            raise ValueError("The base model is a folder of this machine, which a Space cannot reach: push it with_base_model=True.")

        def write(folder: Path) -> None:
            write_space(folder, name, self._source.get("revision"), self._source.get("subfolder", "") if name else "")
            if name is None:
                self._write_published(folder / GENERATOR_FOLDER, repo_id, with_base_model)

        return push_folder(
            write,
            repo_id,
            card=lambda _: space_card(repo_id, name),
            repo_type="space",
            commit_message=commit_message,
            private=private,
            token=token,
        )

    @classmethod
    def _expected(cls, config: ICMConfig) -> dict[str, Tensor]:
        """The tensors of a generator of this config, on the meta device: names and shapes at no cost."""
        with torch.device("meta"):
            return cls(config).state_dict()


def _check_safe(safe_serialization: bool) -> None:
    if not safe_serialization:
        raise ValueError("safe_serialization=False: generators are saved as safetensors only, leave it out.")
