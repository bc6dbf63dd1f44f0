"""Model cards: plain dicts in, a `ModelCard` out, by the templates of hub_cards/. What is not known, or is of no use, is left out."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData, EvalResult, ModelCard, ModelCardData
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from .files import BASE_FOLDER, REPORT, is_local, published

# The Hub's pipeline tags by the classes of base models; a class that reads pictures and text may be listed under both.
_PIPELINES = {
    "image-text-to-text": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "text-generation": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}
# What peft loads an adapter and its base with, by the adapter's task type.
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# What is told of how an adapter was generated; a fact of another type is none.
FACTS: dict[str, type | tuple[type, ...]] = {
    "generator": str,
    "text": str,
    "images": int,
    "seed": int,
    "temperature": (int, float),
    "trainable": bool,
}


def cards_folder() -> Path:
    """Folder of the card templates: `hub_cards/` inside an installed wheel, or at the top of a checkout."""
    installed = Path(__file__).parents[1] / "hub_cards"
    return installed if installed.is_dir() else Path(__file__).parents[3] / "hub_cards"


# ---------------------------------------------------------------------- cards
def generator_card(
    config: Mapping[str, Any], *, repo_id: str, folder: str | os.PathLike[str], report: Mapping[str, Any] | None = None
) -> ModelCard:
    """The card of a generator.

    Args:
        config (`Mapping`): [`ICMConfig.to_dict`] of the generator.
        repo_id (`str`): Where it will live.
        folder (`str` or `Path`): Where it is saved, to count its bytes.
        report (`Mapping`, *optional*): What [`memorisation_report`] returned, for a section on it.

    Returns:
        `huggingface_hub.ModelCard`
    """
    layout, training, encoder = (_mapping(config.get(name)) for name in ("layout", "training", "encoder"))
    tasks = _tasks(config.get("tasks"))
    travels = bool(config.get("base_model_subfolder"))
    named = layout.get("base_model_name_or_path")
    adapter_bytes = _numel(layout) * _BYTES.get(str(layout.get("dtype")), 4)
    files = [Path(folder) / "model.safetensors"]
    if encoder.get("folder"):
        files += (Path(folder) / str(encoder["folder"])).rglob("*")
    generator_bytes = sum(file.stat().st_size for file in files if file.is_file())
    metrics = [metric for metric in _list(training.get("metrics")) if _is_metric(metric)]
    accepts = _accepts(encoder)
    first = next((task["description"] for task in tasks if task["description"]), "what you need")
    calls = {"text": repr(first), "examples": "examples=[...]", "images": "images=[...]"}
    model_name = repo_id.split("/")[-1]
    data = ModelCardData(
        library_name="peft_icm",
        base_model=None if travels else _hub_id(named),
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
        pictures_too=encoder.get("kind") == "clip" and encoder.get("projected", True),
        call=calls.get(accepts, "task_vector=vector"),
        base=f"`{BASE_FOLDER}/` of this repo" if travels else _base_words(named),
        base_class=layout.get("base_model_class"),
        base_revision=layout.get("revision"),
        architecture=config.get("architecture"),
        latent_size=config.get("latent_size"),
        encoder=_encoder_line(encoder),
        encoder_travels=bool(encoder.get("folder")),
        adapter_size=_size(adapter_bytes),
        generator_size=_size(generator_bytes),
        break_even=max(2, math.ceil(generator_bytes / max(1, adapter_bytes))),
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
    repo_id: str | None = None,
    with_base: bool = False,
    **facts: Any,
) -> ModelCard:
    """The card of one adapter.

    Args:
        layout (`Mapping`): [`AdapterLayout.to_dict`] of it.
        repo_id (`str`, *optional*): Where it will live.
        with_base (`bool`, defaults to `False`): Whether the base model lies in that repo too, beside the adapter.
        **facts: How it was generated, if it was: `generator` (repo or folder), `text`, `images` (their number), `seed`, `temperature`, and
            `trainable` if it was generated to be trained on. What is none of these, or of another type, is left out. Without any of them
            the card does not say that the adapter was generated.

    Returns:
        `huggingface_hub.ModelCard`
    """
    known = {
        name: published(facts[name])
        for name, kind in FACTS.items()
        if isinstance(facts.get(name), kind) and (kind is bool or not isinstance(facts[name], bool))
    }
    named = layout.get("base_model_name_or_path")
    base = _shared(named)
    base_class, task_type = layout.get("base_model_class"), _mapping(layout.get("peft_config")).get("task_type")
    data = ModelCardData(
        library_name="peft",
        base_model=_hub_id(base) if not with_base else None,
        pipeline_tag=_pipeline(layout),
        tags=["lora", "icm", "generated"] if known else ["lora"],
        icm=known or None,
    )
    return _fill(
        "adapter",
        data,
        facts={name: _cell(value) for name, value in known.items()},
        with_base=with_base,
        base=_base_words(named) if not with_base else "in this repo",
        base_class=base_class if isinstance(base_class, str) and base_class.isidentifier() else "AutoModelForCausalLM",
        auto_class=_AUTO_CLASSES.get(str(task_type), "AutoPeftModel"),
        base_revision=layout.get("revision") if not with_base else None,
        base_code=json.dumps(base or "path/to/the/base"),
        adapter_code=json.dumps(repo_id or "path/to/this/folder"),
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
    layout = _mapping(manifest.get("layout"))
    title = repo_id.split("/")[-1]
    return _fill(
        "collection",
        DatasetCardData(tags=["icm", "lora", "peft", "adapters"], pretty_name=title),
        title=title,
        repo_id=repo_id,
        base=_base_words(layout.get("base_model_name_or_path")),
        tasks=_tasks(manifest.get("tasks")),
        facts=_recipe_facts(_mapping(manifest.get("metadata"))),
        **_lora(layout),
    )


def _fill(template: str, card_data: Any, **values: Any) -> ModelCard:
    return ModelCard.from_template(card_data, template_path=str(cards_folder() / f"{template}.md"), **values)


# ---------------------------------------------------------------------- what the templates are filled with
def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []


def _cell(value: Any) -> str:
    """Text that stays in its line, and in its cell of a table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _tasks(value: Any) -> list[dict[str, Any]]:
    """Name, description and number of snapshots of each task, of a generator's config or a collection's manifest."""
    tasks = []
    for task in filter(None, map(_mapping, _list(value))):
        first = next(iter(_list(task.get("descriptions"))), task.get("description"))
        description = _cell(first) if isinstance(first, str) else ""
        tasks.append({"name": _cell(task.get("name")), "description": description, "snapshots": task.get("snapshots")})
    return tasks


def _is_metric(metric: Any) -> bool:
    named = isinstance(metric, Mapping) and all(isinstance(metric.get(name), str) for name in ("type", "name", "dataset"))
    return named and isinstance(metric.get("value"), int | float)


def _numel(layout: Mapping[str, Any]) -> int:
    return sum(math.prod(shape) for shape in _list(layout.get("shapes")))


def _lora(layout: Mapping[str, Any]) -> dict[str, Any]:
    config = _mapping(layout.get("peft_config"))
    targets = config.get("target_modules")
    names = [targets] if isinstance(targets, str) else sorted(map(str, targets)) if isinstance(targets, list | tuple | set) else []
    return {
        "r": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "targets": ", ".join(f"`{_cell(name)}`" for name in names),
        "numel": _numel(layout),
        "dtype": layout.get("dtype"),
    }


def _pipeline(layout: Mapping[str, Any]) -> str | None:
    """What the base model does, by its class; where peft left the class out of the adapter's config, by peft's own task type."""
    base_class = layout.get("base_model_class")
    if base_class is None:
        return "text-generation" if _mapping(layout.get("peft_config")).get("task_type") == "CAUSAL_LM" else None
    return next((tag for tag, classes in _PIPELINES.items() if base_class in classes.values()), None)


def _accepts(encoder: Mapping[str, Any]) -> str:
    if not encoder:
        return "task_vector"
    if encoder.get("kind") == "hidden_state":
        return "images" if "prompt" in encoder else "examples"
    return "text"


def _encoder_line(encoder: Mapping[str, Any]) -> str:
    if not encoder:
        return ""
    where = f"in `{encoder['folder']}/` of this repo" if encoder.get("folder") else f"`{published(encoder.get('checkpoint'))}`"
    return f"task vector of {encoder.get('dim')} numbers by the `{encoder.get('kind')}` encoder {where}"


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
    own = [(title, _cell(published(training[name]))) for name, title in names.items() if training.get(name) is not None]
    return own + _recipe_facts(_mapping(training.get("collection")))


def _recipe_facts(recipe: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What a collection's metadata tells, one row for each plain value."""
    plain = [(name, value) for name, value in recipe.items() if isinstance(value, str | int | float) and name != "base_model"]
    rows = [(f"collection: {_cell(name).replace('_', ' ')}", _cell(published(value))) for name, value in plain]
    versions = _mapping(recipe.get("versions"))
    return rows + ([("versions", _cell(", ".join(f"{name} {value}" for name, value in versions.items())))] if versions else [])


def _shared(name: Any) -> str | None:
    """The name of a base model by which others find it; a folder of this machine has none."""
    if not isinstance(name, str) or not name:
        return None
    told = published(name)
    return told if "/" in told or not is_local(name) else None


def _base_words(name: Any) -> str | None:
    if not isinstance(name, str) or not name:
        return None
    return _cell(published(name)) + ("" if _shared(name) else ", a folder that is not in this repo")


def _hub_id(name: Any) -> str | None:
    """A name that the Hub accepts as base_model in a card."""
    shared = _shared(name)
    return shared if shared and re.fullmatch(r"[\w.-]+/[\w.-]+", shared) else None


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
