"""Vector -> PeftModel: load the base, attach an adapter, swap its values, save it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, ModelCard
from peft import PeftModel

from ..disk import replacing_folder
from ..hub.cards import FACTS, adapter_card
from ..hub.files import CARD, copy_base, marked, published, push_folder
from .attach import _provenance
from .layout import AdapterLayout

logger = logging.getLogger(__name__)


def _check_name(model: PeftModel, adapter_name: str) -> None:
    if adapter_name not in model.peft_config:
        raise ValueError(f"No adapter named {adapter_name!r}: the model has {sorted(model.peft_config)}.")


def save_adapter(model: PeftModel, folder: str | Path, adapter_name: str = "default") -> Path:
    """Save one adapter as an ordinary PEFT folder, with a card that says where it came from.

    Unlike `model.save_pretrained`, it never writes embedding layers of the base, puts the adapter into `folder` itself whatever its
    name, writes to a temporary folder first, and adds generator, text and seed to the card.

    Args:
        model (`PeftModel`): Carries the adapter.
        folder (`str` or `Path`): Where to; files of the same names are replaced.
        adapter_name (`str`, defaults to `"default"`): Which adapter.

    Returns:
        `Path`: `folder`.

    Raises:
        `ValueError`: If the model has no such adapter.
    """
    _check_name(model, adapter_name)
    target = Path(folder)
    with tempfile.TemporaryDirectory() as temporary, replacing_folder(target) as new:
        model.save_pretrained(temporary, selected_adapters=[adapter_name], save_embedding_layers=False)
        source = Path(temporary) if adapter_name == "default" else Path(temporary) / adapter_name
        layout = AdapterLayout.from_pretrained(source)
        facts = _provenance(model).get(adapter_name, {})
        if facts and not model.peft_config[adapter_name].inference_mode:
            facts = {**facts, "trainable": True}
        (source / CARD).write_text(marked(str(adapter_card(layout.to_dict(), **facts))), encoding="utf-8")
        for file in sorted(source.iterdir()):
            if file.is_file():
                shutil.copyfile(file, new / file.name)
    return target


def push_adapter(
    adapter: PeftModel | str | os.PathLike[str],
    repo_id: str,
    adapter_name: str = "default",
    *,
    with_base_model: bool = False,
    commit_message: str = "Upload generated adapter",
    commit_description: str | None = None,
    tags: Sequence[str] | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    overwrite_card: bool = False,
) -> CommitInfo:
    """Push one adapter to the Hub in one commit, with its card; what names a folder of this machine is left out.

    A card of the adapter's folder that a person has edited is pushed as it is.

    Args:
        adapter (`PeftModel`, `str` or `Path`): A model that carries the adapter, or the folder where [`save_adapter`] or peft saved it.
        repo_id (`str`): `"org/name"`; created where it does not exist.
        adapter_name (`str`, defaults to `"default"`): Which adapter of a model.
        with_base_model (`bool`, defaults to `False`): Push a base model that is a local folder too, beside the adapter, so that
            `AutoPeftModelForCausalLM.from_pretrained(repo_id)` loads both.
        commit_message (`str`, defaults to `"Upload generated adapter"`): Message of the commit.
        commit_description (`str`, *optional*): What stands below the message.
        tags (`Sequence[str]`, *optional*): More tags for the card.
        private (`bool`, *optional*): Create a private repo.
        token (`str` or `bool`, *optional*): Access token; by default the stored one.
        revision (`str`, *optional*): Branch.
        create_pr (`bool`, defaults to `False`): Open a pull request instead of committing.
        overwrite_card (`bool`, defaults to `False`): Replace a card that was edited by hand on the Hub.

    Returns:
        `huggingface_hub.CommitInfo`: Of the one commit.

    Raises:
        `ValueError`: If the model has no such adapter, or the folder holds none, or no safetensors base where one is to be pushed;
            nothing is on the Hub then.
    """
    source = None if isinstance(adapter, PeftModel) else Path(adapter)
    if source is not None and not source.is_dir():
        raise ValueError(f"{source} is no folder: pass a PeftModel, or the folder where its adapter is saved.")

    layout: dict[str, Any] = {}

    def write(folder: Path) -> None:
        if isinstance(adapter, PeftModel):
            save_adapter(adapter, folder, adapter_name)
        else:
            AdapterLayout.from_pretrained(Path(adapter))
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                shutil.copyfile(Path(adapter) / name, folder / name)
        layout.update(AdapterLayout.from_pretrained(folder).to_dict())
        file = folder / "adapter_config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        base = config.get("base_model_name_or_path")
        if with_base_model:
            if not os.path.isdir(base or ""):
                raise ValueError(f"with_base_model=True is for a base that is a local folder, this one is {base!r}: push without.")
            copy_base(base, folder, "")
            config |= {"base_model_name_or_path": repo_id, "revision": revision}
        file.write_text(json.dumps(published(config), indent=2, sort_keys=True), encoding="utf-8")

    def card(folder: Path) -> ModelCard:
        saved = (folder if source is None else source) / CARD
        found = ModelCard.load(saved, ignore_metadata_errors=True).data.get("icm") if saved.is_file() else None
        facts = {name: value for name, value in found.items() if name in FACTS} if isinstance(found, dict) else {}
        return adapter_card(layout, repo_id=repo_id, with_base=with_base_model, **facts)

    return push_folder(
        write,
        repo_id,
        card=card,
        source=source,
        commit_message=commit_message,
        commit_description=commit_description,
        tags=tags,
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
        overwrite_card=overwrite_card,
    )
