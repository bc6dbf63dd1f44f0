"""AdapterCollection: the snapshots, task vectors and descriptions of many tasks' LoRAs, on disk and on the Hub."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..conditioning import Picture, TaskEncoder, open_images
from ..hub.cards import collection_card
from ..hub.files import published, push_folder, resolve
from .gauge import canonicalize
from .layout import AdapterLayout, KeyMap, map_keys

FORMAT = 1
MANIFEST = "collection.json"


@dataclass
class AdapterCollection:
    """What an [`ICMGenerator`] is trained on.

    Args:
        layout ([`AdapterLayout`]): One for all adapters.
        snapshots (`dict[str, Tensor]`): `[K, P]` for each task, oldest first; the last is the task's own LoRA.
        descriptions (`dict[str, list[str]]`): Sentences that ask for the task.
        task_vectors (`dict[str, Tensor]`): `[M, d]` fp32 for each task, one for each description, example or picture.
        encoder (`dict`, *optional*): Config of the encoder that made them.
        metadata (`dict`): How the collection was made; JSON-able.

    Raises:
        `ValueError`: If a task has snapshots of another width than the layout, or a value that is not finite.
    """

    layout: AdapterLayout
    snapshots: dict[str, Tensor]
    descriptions: dict[str, list[str]]
    task_vectors: dict[str, Tensor] = field(default_factory=dict)
    encoder: dict[str, Any] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    _source: str | None = field(default=None, init=False, repr=False, compare=False)  # where it was loaded from: its card goes along

    def __post_init__(self) -> None:
        """Check every tensor."""
        if not self.snapshots:
            raise ValueError("A collection needs at least one task.")
        for task, tensor in self.snapshots.items():
            if tensor.ndim != 2 or tensor.shape[1] != self.layout.numel or not len(tensor):
                raise ValueError(f"Task {task!r}: expected snapshots of shape (K, {self.layout.numel}), found {tuple(tensor.shape)}.")
            bad = (~torch.isfinite(tensor)).nonzero()
            if len(bad):
                row, column = bad[0].tolist()
                key = self.layout.key_at(column)
                raise ValueError(f"Task {task!r}: snapshot {row} holds {tensor[row, column].item()} in {key}. Train it again.")

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in order."""
        return list(self.snapshots)

    def final(self, task: str) -> Tensor:
        """`[P]`: the last snapshot, the task's own LoRA."""
        return self.snapshots[task][-1]

    def encode(
        self,
        encoder: TaskEncoder,
        examples: Mapping[str, Sequence[str]] | None = None,
        images: Mapping[str, Sequence[Picture]] | None = None,
    ) -> None:
        """Compute the task vectors; those of a task's descriptions and of its pictures stand together, so that either is learned.

        Args:
            encoder (`TaskEncoder`): Reads the descriptions, the examples or the pictures.
            examples (`Mapping[str, Sequence[str]]`, *optional*): Examples of each task, for encoders that read examples.
            images (`Mapping[str, Sequence[PIL.Image.Image, str or Path]]`, *optional*): Pictures of each task or their paths, for
                encoders that read pictures.

        Raises:
            `ValueError`: If a task has nothing that this encoder reads.
        """
        sources: dict[str, Mapping[str, Sequence[Any]]] = {"text": self.descriptions, "examples": examples or {}, "images": images or {}}
        read = {name: sources[name] for name in encoder.accepts}
        for task in self.tasks:
            if not any(source.get(task) for source in read.values()):
                raise ValueError(f"The {encoder.kind} encoder reads {' or '.join(read)}; task {task!r} has none.")
        vectors = {}
        for task in self.tasks:
            parts = [open_images(source[task]) if name == "images" else source[task] for name, source in read.items() if source.get(task)]
            vectors[task] = torch.cat([encoder.encode(part) for part in parts])
        self.task_vectors = vectors
        self.encoder = dict(encoder.config)

    # ------------------------------------------------------------------ made from LoRAs that exist
    @classmethod
    def from_adapters(
        cls,
        adapters: Sequence[str | Path],
        descriptions: Sequence[str | list[str]],
        *,
        gauge: bool = True,
        key_map: KeyMap = (),
        **hub_kwargs: Any,
    ) -> AdapterCollection:
        """Make a collection of LoRAs that exist already.

        Args:
            adapters (`Sequence[str or Path]`): Folders or Hub ids of PEFT LoRAs of one layout.
            descriptions (`Sequence[str or list[str]]`): One sentence, or several, for each.
            gauge (`bool`, defaults to `True`): Put every pair of factors into the balanced gauge; the products BA do not change.
            key_map (`Sequence[tuple[str, str]]`, *optional*): (regex, replacement) pairs for the keys of adapters that were trained on
                another module tree, such as [`FLORENCE2_KEY_MAP`]; see [`map_keys`].
            **hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`.

        Returns:
            [`AdapterCollection`]: One snapshot for each adapter; tasks are named after the folders.

        Raises:
            `ValueError`: If the numbers differ, two adapters share a name, or their layouts differ.
        """
        if len(adapters) != len(descriptions) or not adapters:
            raise ValueError(f"Expected one description for each adapter, found {len(adapters)} and {len(descriptions)}.")
        layout: AdapterLayout | None = None
        snapshots: dict[str, Tensor] = {}
        texts: dict[str, list[str]] = {}
        for adapter, description in zip(adapters, descriptions, strict=True):
            folder = resolve(str(adapter), allow_patterns=["adapter_*"], **hub_kwargs)
            found = AdapterLayout.from_pretrained(folder, key_map=key_map)
            layout = layout or found
            if found.fingerprint != layout.fingerprint:
                raise ValueError(f"{adapter} has another layout than {adapters[0]}: {layout.difference(found)}.")
            state_dict = map_keys(load_file(folder / "adapter_model.safetensors"), key_map)
            name = Path(str(adapter)).name
            if name in snapshots:
                raise ValueError(f"Two adapters are named {name!r}: rename a folder.")
            snapshots[name] = layout.flatten(canonicalize(state_dict) if gauge else state_dict)[None]
            texts[name] = [description] if isinstance(description, str) else list(description)
        assert layout is not None
        metadata = {"made_from": [str(adapter) for adapter in adapters], "gauge": "balanced" if gauge else "as found"}
        return cls(layout, snapshots, texts, metadata=metadata)

    # ------------------------------------------------------------------ disk and Hub
    def save_pretrained(self, folder: str | Path) -> None:
        """Write the collection; a failure half-way leaves what was there before.

        Args:
            folder (`str` or `Path`): Replaced by this collection if it holds one; refused if it holds something else.

        Raises:
            `ValueError`: If the folder holds something that is no collection.
        """
        target = Path(folder)
        if target.exists() and any(target.iterdir()) and not (target / MANIFEST).is_file():
            raise ValueError(f"{target} is neither empty nor a collection: choose another folder.")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        try:
            self._write(temporary)
            if target.exists():
                old = temporary.with_suffix(".old")
                os.replace(target, old)
                os.replace(temporary, target)
                shutil.rmtree(old)
            else:
                os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _write(self, folder: Path) -> None:
        folder.chmod(0o755)
        (folder / "snapshots").mkdir()
        for task, tensor in self.snapshots.items():
            tensors = {"snapshots": tensor.contiguous()}
            if task in self.task_vectors:
                tensors["task_vectors"] = self.task_vectors[task].float().contiguous()
            save_file(tensors, folder / "snapshots" / f"{task}.safetensors", metadata={"format": "pt"})
        manifest = {
            "format": FORMAT,
            "layout": self.layout.to_dict(),
            "tasks": [
                {"name": task, "snapshots": len(self.snapshots[task]), "descriptions": self.descriptions.get(task, [])}
                for task in self.tasks
            ],
            "encoder": self.encoder,
            "metadata": self.metadata,
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path, **hub_kwargs: Any) -> AdapterCollection:
        """Load a collection from a folder or a data set repo of the Hub.

        Args:
            folder (`str` or `Path`): A local folder or `"org/name"`.
            **hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`.

        Returns:
            [`AdapterCollection`]

        Raises:
            `ValueError`: If it is no collection, or a file of it is missing, truncated or does not fit.
        """
        root = resolve(str(folder), repo_type="dataset", **hub_kwargs)
        if not (root / MANIFEST).is_file():
            raise ValueError(f"{folder} is no adapter collection: it has no {MANIFEST}.")
        manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
        if manifest.get("format") != FORMAT:
            raise ValueError(f"{folder} has collection format {manifest.get('format')}, this peft_icm reads {FORMAT}.")
        snapshots, vectors, texts = {}, {}, {}
        for entry in manifest["tasks"]:
            name = entry["name"]
            file = root / "snapshots" / f"{name}.safetensors"
            try:
                tensors = load_file(file)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{file} is missing or corrupted ({error}). Download or collect it again.") from error
            snapshots[name] = tensors["snapshots"]
            texts[name] = entry["descriptions"]
            if "task_vectors" in tensors:
                vectors[name] = tensors["task_vectors"]
        layout = AdapterLayout.from_dict(manifest["layout"])
        collection = cls(layout, snapshots, texts, vectors, manifest["encoder"], manifest["metadata"])
        collection._source = str(folder)
        return collection

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload AdapterCollection",
        commit_description: str | None = None,
        tags: Sequence[str] | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        overwrite_card: bool = False,
    ) -> CommitInfo:
        """Push the collection as a data set repo, in one commit, with a card; what names a folder of this machine is left out.

        A card of the folder that it was loaded from is pushed as it is, if a person has edited it.

        Args:
            repo_id (`str`): `"org/name"`; created where it does not exist.
            commit_message (`str`, defaults to `"Upload AdapterCollection"`): Message of the commit.
            commit_description (`str`, *optional*): What stands below the message.
            tags (`Sequence[str]`, *optional*): More tags for the card.
            private (`bool`, *optional*): Create a private repo.
            token (`str` or `bool`, *optional*): Access token.
            revision (`str`, *optional*): Branch.
            create_pr (`bool`, defaults to `False`): Open a pull request instead of committing.
            overwrite_card (`bool`, defaults to `False`): Replace a card that was edited by hand on the Hub.

        Returns:
            `huggingface_hub.CommitInfo`: Of the one commit.
        """
        layout = replace(self.layout, base_model_name_or_path=published(self.layout.base_model_name_or_path))
        told = replace(self, layout=layout, encoder=published(self.encoder), metadata=published(self.metadata))
        return push_folder(
            told._write,
            repo_id,
            card=lambda folder: collection_card(json.loads((folder / MANIFEST).read_text(encoding="utf-8")), repo_id=repo_id),
            source=self._source,
            repo_type="dataset",
            commit_message=commit_message,
            commit_description=commit_description,
            tags=tags,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            overwrite_card=overwrite_card,
        )
