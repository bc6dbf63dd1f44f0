"""Hugging Face Hub: find a folder, fill a card from hub_cards/, push both in one commit."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import DatasetCardData, EvalResult, ModelCard, ModelCardData
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from .files import BASE_FOLDER, REPORT

# The Hub's pipeline tags by the classes of base models; a class that reads pictures and text may be listed under both.
_PIPELINES = {
    "image-text-to-text": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "text-generation": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}


def cards_folder() -> Path:
    """Folder of the card templates: `hub_cards/` inside an installed wheel, or at the top of a checkout."""
    installed = Path(__file__).parents[1] / "hub_cards"
    return installed if installed.is_dir() else Path(__file__).parents[3] / "hub_cards"


# ---------------------------------------------------------------------- cards
def generator_card(
    config: Mapping[str, Any], *, repo_id: str, folder: str | os.PathLike[str], report: Mapping[str, Any] | None = None
) -> ModelCard:
    """The card of a generator; what is not known is left out.

    Args:
        config (`Mapping`): [`ICMConfig.to_dict`] of the generator.
        repo_id (`str`): Where it will live.
        folder (`str` or `Path`): Where it is saved, to count its bytes.
        report (`Mapping`, *optional*): What [`memorisation_report`] returned, for a section on it.

    Returns:
        `huggingface_hub.ModelCard`
    """
    layout, training = config["layout"], config.get("training") or {}
    tasks = config.get("tasks") or []
    base = f"`{BASE_FOLDER}/` of this repo" if config.get("base_model_subfolder") else layout["base_model_name_or_path"]
    adapter_bytes = _numel(layout) * getattr(torch, layout["dtype"]).itemsize
    encoder = config.get("encoder") or {}
    travelling = (
        [Path(folder) / "model.safetensors", *(Path(folder) / encoder["folder"]).rglob("*")]
        if encoder.get("folder")
        else [Path(folder) / "model.safetensors"]
    )
    generator_bytes = sum(file.stat().st_size for file in travelling if file.is_file())
    metrics = training.get("metrics") or []
    accepts = _accepts(encoder)
    first = next((task["description"] for task in tasks if task.get("description")), "what you need")
    calls = {"text": repr(first), "examples": "examples=[...]", "images": "images=[...]"}
    model_name = repo_id.split("/")[-1]
    data = ModelCardData(
        library_name="peft_icm",
        base_model=_hub_id(layout["base_model_name_or_path"]) if not config.get("base_model_subfolder") else None,
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
        base_class=layout["base_model_class"],
        base_revision=layout["revision"],
        architecture=config["architecture"],
        latent_size=config["latent_size"],
        encoder=_encoder_line(encoder),
        encoder_travels=bool(encoder.get("folder")),
        adapter_size=_size(adapter_bytes),
        generator_size=_size(generator_bytes),
        break_even=max(2, math.ceil(generator_bytes / adapter_bytes)),
        tasks=tasks,
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
    base = repo_id if base_subfolder else layout["base_model_name_or_path"]
    data = ModelCardData(
        library_name="peft",
        base_model=_hub_id(base) if not base_subfolder else None,
        pipeline_tag=_pipeline(layout),
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
        base_class=layout["base_model_class"],
        base_revision=layout["revision"],
        **_lora(layout),
    )


def collection_card(manifest: Mapping[str, Any], *, repo_id: str) -> ModelCard:
    """The card of an adapter collection.

    Args:
        manifest (`Mapping`): Its `collection.json`.
        repo_id (`str`): Where it will live.

    Returns:
        `huggingface_hub.ModelCard`
    """
    layout = manifest["layout"]
    data = DatasetCardData(tags=["icm", "lora", "peft", "adapters"], pretty_name=repo_id.split("/")[-1])
    return _fill(
        "collection",
        data,
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        base=layout["base_model_name_or_path"],
        tasks=manifest["tasks"],
        facts=_recipe_facts(manifest["metadata"]),
        **_lora(layout),
    )


def _fill(template: str, card_data: Any, **values: Any) -> ModelCard:
    return ModelCard.from_template(card_data, template_path=str(cards_folder() / f"{template}.md"), **values)


def _numel(layout: Mapping[str, Any]) -> int:
    return sum(math.prod(shape) for shape in layout["shapes"])


def _lora(layout: Mapping[str, Any]) -> dict[str, Any]:
    config = layout["peft_config"]
    targets = config.get("target_modules")
    named = targets if isinstance(targets, str) else ", ".join(f"`{name}`" for name in sorted(targets or []))
    return {"r": config["r"], "lora_alpha": config["lora_alpha"], "targets": named, "numel": _numel(layout), "dtype": layout["dtype"]}


def _pipeline(layout: Mapping[str, Any]) -> str | None:
    """What the base model does, by its class; where peft left the class out of the adapter's config, by peft's own task type."""
    if layout["base_model_class"] is None:
        return "text-generation" if layout["peft_config"].get("task_type") == "CAUSAL_LM" else None
    return next((tag for tag, classes in _PIPELINES.items() if layout["base_model_class"] in classes.values()), None)


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
