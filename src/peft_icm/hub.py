"""Hugging Face Hub: find a folder, fill a card from hub_cards/, push both in one commit."""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, DatasetCardData, EvalResult, HfApi, ModelCard, ModelCardData, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from .adapter_layout import AdapterLayout
from .configuration_icm import ICMConfig

BASE_FOLDER = "base_model"
CARD = "README.md"
REPORT = "memorisation.json"
MARK = re.compile(r"\n<!-- written by peft_icm, sha256 ([0-9a-f]{64}) -->\n*$")
# The Hub's pipeline tags by the classes of base models; a class that reads pictures and text may be listed under both.
_PIPELINES = {
    "image-text-to-text": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "text-generation": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}


def cards_folder() -> Path:
    """Folder of the card templates: `hub_cards/` inside an installed wheel, or at the top of a checkout."""
    installed = Path(__file__).parent / "hub_cards"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "hub_cards"


# ---------------------------------------------------------------------- pull
def resolve(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    allow_patterns: Sequence[str] | None = None,
    repo_type: str = "model",
) -> Path:
    """The local folder of a folder or a Hub repo; what is missing is downloaded.

    Args:
        name (`str` or `Path`): A folder or `"org/name"`.
        revision (`str`, *optional*): Branch, tag or commit.
        token (`str` or `bool`, *optional*): Access token; by default the stored one.
        cache_dir (`str` or `Path`, *optional*): Cache; by default that of huggingface_hub.
        local_files_only (`bool`, defaults to `False`): Look only in the cache.
        allow_patterns (`Sequence[str]`, *optional*): Download only these files.
        repo_type (`str`, defaults to `"model"`): `"model"` or `"dataset"`.

    Returns:
        `Path`

    Raises:
        `OSError`: If there is no such folder, repo or revision, or the Hub cannot be reached; with what to do.
    """
    if os.path.isdir(name):
        return Path(name)
    try:
        path = snapshot_download(
            str(name),
            repo_type=repo_type,
            revision=revision,
            token=token,
            cache_dir=Path(cache_dir) if cache_dir else None,
            local_files_only=local_files_only,
            allow_patterns=list(allow_patterns) if allow_patterns else None,
        )
    except HFValidationError as error:
        raise OSError(f"{str(name)!r} is neither an existing folder nor the id of a Hub repo ('org/name').") from error
    except RevisionNotFoundError as error:
        raise OSError(f"{name} has no revision {revision!r}: pass a branch, a tag or a commit that exists.") from error
    except LocalEntryNotFoundError as error:
        raise OSError(f"{name} is not in the local cache, and the Hub was not asked or did not answer: check the connection.") from error
    except RepositoryNotFoundError as error:
        raise OSError(
            f"{name} is neither a folder nor a {repo_type} repo that you may read: check the spelling, or pass token=."
        ) from error
    return Path(path)


# ---------------------------------------------------------------------- push
def push_folder(
    write: Callable[[Path], Any],
    repo_id: str,
    *,
    card: Callable[[Path], ModelCard],
    repo_type: str = "model",
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    overwrite_card: bool = False,
) -> CommitInfo:
    """Write a folder, add its card, and upload both in one commit.

    Args:
        write (`Callable[[Path], Any]`): Writes the files into an empty folder.
        repo_id (`str`): `"org/name"`; created where it does not exist.
        card (`Callable[[Path], ModelCard]`): Makes the card of the written folder.
        repo_type (`str`, defaults to `"model"`): `"model"` or `"dataset"`.
        commit_message (`str`, *optional*): Message of the commit.
        private (`bool`, *optional*): Create a private repo.
        token (`str` or `bool`, *optional*): Access token.
        revision (`str`, *optional*): Branch; created where it does not exist.
        create_pr (`bool`, defaults to `False`): Open a pull request.
        overwrite_card (`bool`, defaults to `False`): Replace a card that was edited by hand on the Hub.

    Returns:
        `huggingface_hub.CommitInfo`

    Raises:
        `huggingface_hub.errors.HfHubHTTPError`: If the Hub refuses: no token, no right to write, a failed upload. Nothing is committed
            then.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
    if revision and not create_pr:
        api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(folder)
        if overwrite_card or not _edited_by_hand(api, repo_id, repo_type, revision):
            text = str(card(folder)).rstrip("\n") + "\n"
            mark = f"\n<!-- written by peft_icm, sha256 {hashlib.sha256(text.encode()).hexdigest()} -->\n"
            (folder / CARD).write_text(text + mark, encoding="utf-8", newline="\n")
        else:
            (folder / CARD).unlink(missing_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            repo_type=repo_type,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )


def _edited_by_hand(api: HfApi, repo_id: str, repo_type: str, revision: str | None) -> bool:
    """Whether the repo has a card that does not carry the hash of its own text."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            file = api.hf_hub_download(repo_id, CARD, repo_type=repo_type, revision=revision, local_dir=scratch)
        except EntryNotFoundError:
            return False
        text = Path(file).read_bytes().decode()
    mark = MARK.search(text)
    return mark is None or hashlib.sha256(text[: mark.start()].encode()).hexdigest() != mark.group(1)


def copy_base(base: str | os.PathLike[str], folder: Path) -> None:
    """Copy a base model's folder into `base_model/` of `folder`; checkpoints and pickles stay behind."""
    ignored = shutil.ignore_patterns(".*", "checkpoint-*", "*.bin", "*.pt", "*.pth", "*.pkl")
    shutil.copytree(base, folder / BASE_FOLDER, dirs_exist_ok=True, ignore=ignored)


# ---------------------------------------------------------------------- cards
def generator_card(
    config: ICMConfig, *, repo_id: str, folder: str | os.PathLike[str], report: Mapping[str, Any] | None = None
) -> ModelCard:
    """The card of a generator; what is not known is left out.

    Args:
        config ([`ICMConfig`]): Of the generator.
        repo_id (`str`): Where it will live.
        folder (`str` or `Path`): Where it is saved, to count its bytes.
        report (`Mapping`, *optional*): What [`memorisation_report`] returned, for a section on it.

    Returns:
        `huggingface_hub.ModelCard`
    """
    layout, training = config.adapter_layout, config.training or {}
    base = f"`{BASE_FOLDER}/` of this repo" if config.base_model_subfolder else layout.base_model_name_or_path
    adapter_bytes = layout.numel * getattr(torch, layout.dtype).itemsize
    encoder = config.encoder or {}
    travelling = (
        [Path(folder) / "model.safetensors", *(Path(folder) / encoder["folder"]).rglob("*")]
        if encoder.get("folder")
        else [Path(folder) / "model.safetensors"]
    )
    generator_bytes = sum(file.stat().st_size for file in travelling if file.is_file())
    metrics = training.get("metrics") or []
    accepts = _accepts(encoder)
    first = next((task["description"] for task in config.tasks or [] if task.get("description")), "what you need")
    calls = {"text": repr(first), "examples": "examples=[...]", "images": "images=[...]"}
    model_name = repo_id.split("/")[-1]
    data = ModelCardData(
        library_name="peft_icm",
        base_model=_hub_id(layout.base_model_name_or_path) if not config.base_model_subfolder else None,
        tags=["icm", "lora", "peft", "hypernetwork", "adapter-generator"],
        model_name=model_name if metrics else None,
        eval_results=[
            EvalResult(
                task_type=_pipeline(layout) or "other",
                dataset_type="peft_icm",
                dataset_name=metric["dataset"],
                metric_type=metric["type"],
                metric_name=metric["name"],
                metric_value=metric["value"],
            )
            for metric in metrics
        ]
        or None,
    )
    return _fill(
        "generator",
        data,
        title=model_name,
        repo_id=repo_id,
        accepts=accepts,
        pictures_too=encoder.get("kind") == "clip" and encoder["projected"],
        call=calls.get(accepts, "task_vector=vector"),
        base=base,
        base_class=layout.base_model_class,
        base_revision=layout.revision,
        architecture=config.architecture,
        latent_size=config.latent_size,
        encoder=_encoder_line(encoder),
        encoder_travels=bool(encoder.get("folder")),
        adapter_size=_size(adapter_bytes),
        generator_size=_size(generator_bytes),
        break_even=max(2, math.ceil(generator_bytes / adapter_bytes)),
        tasks=config.tasks or [],
        facts=_training_facts(training),
        metrics=metrics,
        report=report,
        report_file=REPORT,
        **_lora(layout),
    )


def adapter_card(
    layout: Mapping[str, Any],
    *,
    generator: str | None = None,
    text: str | None = None,
    seed: int | None = None,
    temperature: float | None = None,
    images: int | None = None,
    repo_id: str | None = None,
    base_subfolder: str | None = None,
) -> ModelCard:
    """The card of one generated adapter.

    Args:
        layout (`Mapping`): [`AdapterLayout.to_dict`] of it.
        generator (`str`, *optional*): Repo or folder of the generator.
        text (`str`, *optional*): The sentence.
        seed (`int`, *optional*): Seed of z.
        temperature (`float`, *optional*): Standard deviation of z.
        images (`int`, *optional*): Number of pictures it was generated from.
        repo_id (`str`, *optional*): Where it will live.
        base_subfolder (`str`, *optional*): Where the base lies inside that repo.

    Returns:
        `huggingface_hub.ModelCard`
    """
    facts = {"generator": generator, "text": text, "images": images, "seed": seed, "temperature": temperature}
    found = AdapterLayout.from_dict(dict(layout))
    base = repo_id if base_subfolder else found.base_model_name_or_path
    data = ModelCardData(
        library_name="peft",
        base_model=_hub_id(base) if not base_subfolder else None,
        pipeline_tag=_pipeline(found),
        tags=["lora", "icm", "generated"],
        icm={name: value for name, value in facts.items() if value is not None} or None,
    )
    return _fill(
        "adapter",
        data,
        repo_id=repo_id,
        **facts,
        base=base,
        base_subfolder=base_subfolder,
        base_class=found.base_model_class,
        base_revision=found.revision,
        **_lora(found),
    )


def collection_card(manifest: Mapping[str, Any], *, repo_id: str) -> ModelCard:
    """The card of an adapter collection.

    Args:
        manifest (`Mapping`): Its `collection.json`.
        repo_id (`str`): Where it will live.

    Returns:
        `huggingface_hub.ModelCard`
    """
    layout = AdapterLayout.from_dict(manifest["layout"])
    data = DatasetCardData(tags=["icm", "lora", "peft", "adapters"], pretty_name=repo_id.split("/")[-1])
    return _fill(
        "collection",
        data,
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        base=layout.base_model_name_or_path,
        tasks=manifest["tasks"],
        facts=_recipe_facts(manifest["metadata"]),
        **_lora(layout),
    )


def _fill(template: str, card_data: Any, **values: Any) -> ModelCard:
    return ModelCard.from_template(card_data, template_path=str(cards_folder() / f"{template}.md"), **values)


def _lora(layout: AdapterLayout) -> dict[str, Any]:
    config = layout.lora_config()
    targets = config.target_modules
    named = targets if isinstance(targets, str) else ", ".join(f"`{name}`" for name in sorted(targets or []))
    return {"r": config.r, "lora_alpha": config.lora_alpha, "targets": named, "numel": layout.numel, "dtype": layout.dtype}


def _pipeline(layout: AdapterLayout) -> str | None:
    """What the base model does, by its class; where peft left the class out of the adapter's config, by peft's own task type."""
    if layout.base_model_class is None:
        return "text-generation" if layout.peft_config.get("task_type") == "CAUSAL_LM" else None
    return next((tag for tag, classes in _PIPELINES.items() if layout.base_model_class in classes.values()), None)


def _accepts(encoder: Mapping[str, Any]) -> str:
    if not encoder:
        return "task_vector"
    if encoder["kind"] == "hidden_state":
        return "images" if "prompt" in encoder else "examples"
    return "text"


def _encoder_line(encoder: Mapping[str, Any]) -> str:
    if not encoder:
        return ""
    where = f"in `{encoder['folder']}/` of this repo" if encoder.get("folder") else f"`{encoder['checkpoint']}`"
    return f"task vector of {encoder['dim']} numbers by the `{encoder['kind']}` encoder {where}"


def _training_facts(training: Mapping[str, Any]) -> list[tuple[str, Any]]:
    names = {
        "snapshots": "snapshots trained on",
        "held_out_snapshots": "snapshots held out",
        "epochs": "epochs",
        "steps": "steps",
        "learning_rate": "learning rate",
        "seed": "seed",
        "data": "data",
    }
    own = [(title, training[name]) for name, title in names.items() if training.get(name) is not None]
    return own + _recipe_facts(training.get("collection") or {})


def _recipe_facts(recipe: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What a collection's metadata tells, one row for each plain value."""
    plain = [(name, value) for name, value in recipe.items() if isinstance(value, str | int | float) and name != "base_model"]
    rows = [(f"collection: {name.replace('_', ' ')}", value) for name, value in plain]
    versions = recipe.get("versions") or {}
    return rows + ([("versions", ", ".join(f"{name} {value}" for name, value in versions.items()))] if versions else [])


def _hub_id(name: str | None) -> str | None:
    """A name that the Hub accepts as base_model in a card; a local path is none."""
    return name if name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not os.path.isdir(name) else None


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
