"""AdapterCollection: the snapshots, task vectors and descriptions of many tasks' LoRAs, on disk and on the Hub."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from huggingface_hub import CommitInfo
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import disk, remote
from ..conditioning import Picture, TaskEncoder, open_images
from ..hub.cards import collection_card
from ..hub.files import PushOptions, published, push_folder, resolve
from .gauge import align
from .layout import ADAPTER_FILES, AdapterLayout, KeyMap, map_keys
from .snapshots import SnapshotFiles, check_finite, open_shard

FORMAT = 1
MANIFEST = "collection.json"
MAX_TASKS, MAX_MANIFEST_BYTES = 100_000, 2**30


@dataclass
class AdapterCollection:
    """What an [`ICMGenerator`] is trained on.

    Args:
        layout ([`AdapterLayout`]): One for all adapters.
        snapshots (`Mapping[str, Tensor]`): `[K, P]` for each task, oldest first; the last is the task's own LoRA. The values of a `dict`
            are checked at once, those of any other mapping, such as [`SnapshotFiles`], when they are read to be trained on or saved.
        descriptions (`dict[str, list[str]]`): Sentences that ask for the task.
        task_vectors (`dict[str, Tensor]`): `[M, d]` fp32 for each task, one for each description, example or picture.
        encoder (`dict`, *optional*): Config of the encoder that made them.
        metadata (`dict`): How the collection was made; JSON-able.

    Raises:
        `ValueError`: If a task has snapshots of another width than the layout, or, of a `dict`, a value that is not finite (those of
            other mappings: when they are read); if its task vectors are not
            `[M, d]` of one d, or not finite; or if its name is no plain file name.
    """

    layout: AdapterLayout
    snapshots: Mapping[str, Tensor]
    descriptions: dict[str, list[str]]
    task_vectors: dict[str, Tensor] = field(default_factory=dict)
    encoder: dict[str, Any] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    _source: str | None = field(default=None, init=False, repr=False, compare=False)  # where it was loaded from: its card goes along

    def __post_init__(self) -> None:
        """Check every name and tensor."""
        if not self.snapshots:
            raise ValueError("A collection needs at least one task.")
        for task in self.snapshots:
            disk.safe_name(task, "task")
            if isinstance(self.snapshots, dict):
                check_finite(task, self.rows(task), self.layout)
            elif isinstance(self.snapshots, SnapshotFiles):
                self.rows(task)  # mapped: nothing is read
        for task, texts in self.descriptions.items():
            if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"Task {task!r}: expected a list of sentences, found {str(texts)[:60]!r}.")
        for name, tasks in (("descriptions", self.descriptions), ("task_vectors", self.task_vectors)):
            if strangers := sorted(tasks.keys() - self.snapshots.keys()):
                raise ValueError(f"{name} name {strangers[0]!r}, which has no snapshots: the tasks are {self.tasks[:5]}.")
        self._check_vectors(self.task_vectors)

    def _check_vectors(self, vectors: Mapping[str, Tensor]) -> None:
        widths: dict[int, str] = {}
        for task, tensor in vectors.items():
            if not _is_matrix(tensor):
                raise ValueError(f"Task {task!r}: expected task vectors of shape (M, d), one row or more, found {_shape(tensor)}.")
            if not torch.isfinite(tensor).all():
                raise ValueError(f"Task {task!r}: its task vectors hold NaN or infinite values. Encode it again, in float32.")
            widths.setdefault(tensor.shape[1], task)
        if len(widths) > 1:
            (width, task), (other, another) = list(widths.items())[:2]
            raise ValueError(f"Task vectors of one width are needed: task {task!r} has {width}, task {another!r} has {other}.")

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in order."""
        return list(self.snapshots)

    def rows(self, task: str) -> Tensor:
        """`[K, P]`: the snapshots of a task; `ValueError` if they are of another shape."""
        found = self.snapshots[task]
        if not _is_matrix(found) or found.shape[1] != self.layout.numel:
            raise ValueError(f"Task {task!r}: expected snapshots of shape (K, {self.layout.numel}), found {_shape(found)}.")
        return found

    def final(self, task: str) -> Tensor:
        """`[P]`: the last snapshot, the task's own LoRA."""
        return self.rows(task)[-1]

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
            `ValueError`: If a task has nothing that this encoder reads, or its vectors are not finite.
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
        self._check_vectors(vectors)
        self.task_vectors = vectors
        self.encoder = dict(encoder.config)

    # ------------------------------------------------------------------ made from LoRAs that exist
    @classmethod
    def from_adapters(
        cls,
        adapters: Sequence[str | Path],
        descriptions: Sequence[str | list[str]],
        *,
        gauge: bool = False,
        key_map: KeyMap = (),
        **hub_kwargs: Any,
    ) -> AdapterCollection:
        """Make a collection of LoRAs that exist already.

        Args:
            adapters (`Sequence[str or Path]`): Folders or Hub ids of PEFT LoRAs of one layout.
            descriptions (`Sequence[str or list[str]]`): One sentence, or several, for each.
            gauge (`bool`, defaults to `False`): Turn every adapter as near to the first as its products BA allow, which stay what they
                are (`adapters.gauge.align`): for LoRAs of different random starts. Those of one start have one gauge as they are.
            key_map (`Sequence[tuple[str, str]]`, *optional*): (regex, replacement) pairs for the keys of adapters that were trained on
                another module tree, such as [`FLORENCE2_KEY_MAP`]; see [`map_keys`].
            **hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`.

        Returns:
            [`AdapterCollection`]: One snapshot for each adapter; tasks are named after the folders.

        Raises:
            `ValueError`: If the numbers differ, two adapters share a name, their layouts differ, or one holds NaN.
        """
        if len(adapters) != len(descriptions) or not adapters:
            raise ValueError(f"Expected one description for each adapter, found {len(adapters)} and {len(descriptions)}.")
        layout: AdapterLayout | None = None
        reference: dict[str, Tensor] | None = None
        snapshots: dict[str, Tensor] = {}
        texts: dict[str, list[str]] = {}
        for adapter, description in zip(adapters, descriptions, strict=True):
            folder = resolve(str(adapter), allow_patterns=ADAPTER_FILES, **hub_kwargs)
            found = AdapterLayout.from_pretrained(folder, key_map=key_map)
            if layout is None:
                layout = found
            if found.fingerprint != layout.fingerprint:
                raise ValueError(f"{adapter} has another layout than {adapters[0]}: {layout.difference(found)}.")
            name = adapter_name(adapter, folder)
            if name in snapshots:
                raise ValueError(f"Two adapters are named {name!r}: rename a folder.")
            state_dict = map_keys(_load(folder / "adapter_model.safetensors"), key_map)
            for key, tensor in state_dict.items():
                if not torch.isfinite(tensor).all():
                    raise ValueError(f"{adapter} holds NaN or infinite values in {key}. Train it again.")
            reference = reference or state_dict
            snapshots[name] = layout.flatten(align(state_dict, reference) if gauge else state_dict)[None]
            texts[name] = [description] if isinstance(description, str) else list(description)
        assert layout is not None
        metadata = {"made_from": [str(adapter) for adapter in adapters], "gauge": "aligned to the first" if gauge else "as found"}
        return cls(layout, snapshots, texts, metadata=metadata)

    # ------------------------------------------------------------------ disk and Hub
    def save_pretrained(self, folder: str | Path) -> None:
        """Write the collection; a failure half-way leaves what was there before, at a URL no collection.

        Args:
            folder (`str` or `Path`): Replaced by this collection if it holds one; refused if it holds something else. Or a URL of one that
                fsspec opens, such as `"s3://bucket/loras"`.

        Raises:
            `ValueError`: If the folder holds something that is no collection.
            `OSError`: If the URL cannot be written to.
        """
        if remote.is_url(folder):
            with tempfile.TemporaryDirectory() as scratch:
                self._write(Path(scratch))
                remote.upload(Path(scratch), str(folder), last=MANIFEST)
            return
        target = Path(folder)
        if target.is_dir() and any(target.iterdir()) and not (target / MANIFEST).is_file():
            raise ValueError(f"{target} is neither empty nor a collection: choose another folder.")
        with disk.replacing_folder(target) as temporary:
            self._write(temporary)

    def _write(self, folder: Path) -> None:
        (folder / "snapshots").mkdir()
        counts = {}
        for task in self.tasks:  # each is asked for once: it may be read from many files, or made
            rows = self.rows(task)[:].contiguous()
            counts[task] = len(rows)
            check_finite(task, rows, self.layout)
            tensors = {"snapshots": rows}
            if task in self.task_vectors:
                tensors["task_vectors"] = self.task_vectors[task].float().contiguous()
            metadata = {"format": "pt", "layout": self.layout.fingerprint}
            save_file(tensors, disk.inside(folder, f"snapshots/{task}.safetensors"), metadata=metadata)
        manifest = {
            "format": FORMAT,
            "layout": self.layout.to_dict(),
            "tasks": [
                {"name": task, "snapshots": count, "descriptions": self.descriptions.get(task, [])} for task, count in counts.items()
            ],
            "encoder": self.encoder,
            "metadata": self.metadata,
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path, **hub_kwargs: Any) -> AdapterCollection:
        """Open a collection in a folder, at a URL or in a data set repo of the Hub; its snapshots stay there and are read when asked for.

        Args:
            folder (`str` or `Path`): A local folder, a URL of one that fsspec opens, or `"org/name"`.
            **hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`.

        Returns:
            [`AdapterCollection`]

        Raises:
            `ValueError`: If it is no collection, or a file of it is missing, truncated or does not fit.
        """
        root = resolve(str(folder), repo_type="dataset", **hub_kwargs)
        if not (root / MANIFEST).is_file():
            raise ValueError(f"{folder} is no adapter collection: it has no {MANIFEST}.")
        manifest = _read_manifest(root / MANIFEST)
        try:
            layout = AdapterLayout.from_dict(manifest["layout"])
        except ValueError as error:
            raise ValueError(f"{root / MANIFEST}: {error} Download or collect it again.") from error
        # The files of the Hub's cache are links into its blobs, which lie beside the snapshots.
        bounds = root if Path(folder).is_dir() else root.parent.parent
        files: dict[str, Path] = {}
        vectors, texts = {}, {}
        for entry in manifest["tasks"]:
            name = disk.safe_name(entry.get("name"), "task")
            if name in files:
                raise ValueError(f"{root / MANIFEST} names the task {name!r} twice.")
            file = files[name] = disk.inside(bounds, (root / "snapshots" / f"{name}.safetensors").absolute())
            with open_shard(file) as shard:
                shape = shard.get_slice("snapshots").get_shape() if "snapshots" in shard.keys() else []  # noqa: SIM118 - no dict
                if shape[:1] != [entry.get("snapshots", *shape[:1])]:
                    raise ValueError(
                        f"{file} does not hold the {entry.get('snapshots')} snapshots that {MANIFEST} names. Collect it again."
                    )
                if (shard.metadata() or {}).get("layout", layout.fingerprint) != layout.fingerprint:
                    raise ValueError(f"{file} is of another layout than {MANIFEST}. Download or collect it again.")
                if "task_vectors" in shard.keys():  # noqa: SIM118
                    vectors[name] = shard.get_tensor("task_vectors").clone()
            texts[name] = entry.get("descriptions") or []
        try:
            collection = cls(layout, SnapshotFiles(files), texts, vectors, manifest.get("encoder"), manifest.get("metadata") or {})
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        collection._source = str(folder)
        return collection

    def push_to_hub(
        self,
        repo_id: str,
        **push: Unpack[PushOptions],
    ) -> CommitInfo:
        """Push the collection as a data set repo, in one commit, with a card; what names a folder of this machine is left out.

        A card of the folder that it was loaded from is pushed as it is, if a person has edited it.

        Args:
            repo_id (`str`): `"org/name"`; created where it does not exist.
            **push: `commit_message`, `commit_description`, `tags`, `private`, `token`, `revision`, `create_pr` and `overwrite_card`: see
                [`PushOptions`].

        Returns:
            `huggingface_hub.CommitInfo`: Of the one commit.
        """
        layout = replace(self.layout, base_model_name_or_path=published(self.layout.base_model_name_or_path))
        told = replace(self, layout=layout, encoder=published(self.encoder), metadata=published(self.metadata))
        push.setdefault("commit_message", "Upload AdapterCollection")
        return push_folder(
            told._write,
            repo_id,
            card=lambda folder: collection_card(json.loads((folder / MANIFEST).read_text(encoding="utf-8")), repo_id=repo_id),
            source=self._source,
            repo_type="dataset",
            **push,
        )


def adapter_name(adapter: str | Path, folder: Path) -> str:
    """The task that a LoRA is in a collection: the last part of its Hub id or path.

    Args:
        adapter (`str` or `Path`): As it was asked for.
        folder (`Path`): Where it lies.

    Returns:
        `str`

    Raises:
        `ValueError`: If that is no plain file name.
    """
    return disk.safe_name(Path(str(adapter)).name or folder.resolve().name, "adapter")


def _is_matrix(tensor: Any) -> bool:
    dtype, shape = getattr(tensor, "dtype", None), getattr(tensor, "shape", ())
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point and len(shape) == 2 and all(shape)


def _shape(tensor: Any) -> str:
    return f"{tuple(tensor.shape)} of {tensor.dtype}" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is missing or corrupted ({error}). Download or collect it again.") from error


def _read_manifest(file: Path) -> dict[str, Any]:
    """The fields of a collection.json, of the types that they must have."""
    if file.stat().st_size > MAX_MANIFEST_BYTES:
        raise ValueError(f"{file} has more than {MAX_MANIFEST_BYTES} bytes: it is no manifest of a collection.")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON ({error}). Download or collect it again.") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{file} must hold a JSON object, found a {type(manifest).__name__}.")
    if manifest.get("format") != FORMAT or isinstance(manifest["format"], bool):
        raise ValueError(f"{file.parent} has collection format {str(manifest.get('format'))[:60]}, this peft_icm reads {FORMAT}.")
    for name, kinds in (("layout", dict), ("tasks", list), ("encoder", dict | None), ("metadata", dict | None)):
        if not isinstance(manifest.get(name), kinds):
            raise ValueError(f"{file}: {name} is missing or a {type(manifest.get(name)).__name__}.")
    if not 0 < len(manifest["tasks"]) <= MAX_TASKS or not all(isinstance(entry, dict) for entry in manifest["tasks"]):
        raise ValueError(f"{file}: tasks must be 1 to {MAX_TASKS} objects.")
    return manifest
