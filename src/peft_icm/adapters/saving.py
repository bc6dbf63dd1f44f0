"""Vector -> PeftModel: load the base, attach an adapter, swap its values, save it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo, ModelCard
from peft import PeftModel

from ..hub.cards import adapter_card
from ..hub.files import BASE_FOLDER, CARD, copy_base, push_folder
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
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        model.save_pretrained(temporary, selected_adapters=[adapter_name], save_embedding_layers=False)
        source = Path(temporary) if adapter_name == "default" else Path(temporary) / adapter_name
        layout = AdapterLayout.from_pretrained(source)
        facts = _provenance(model).get(adapter_name, {})
        (source / CARD).write_text(str(adapter_card(layout.to_dict(), **facts)), encoding="utf-8")
        for file in sorted(source.iterdir()):
            if file.is_file():
                os.replace(file, target / file.name)
    return target


def push_adapter(
    adapter: PeftModel | str | os.PathLike[str],
    repo_id: str,
    adapter_name: str = "default",
    *,
    commit_message: str = "Upload generated adapter",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    overwrite_card: bool = False,
) -> CommitInfo:
    """Push one adapter to the Hub in one commit, with the card of [`save_adapter`].

    A base model that is a local folder travels along in `base_model/`; the card's snippet loads it from there.

    Args:
        adapter (`PeftModel`, `str` or `Path`): A model that carries the adapter, or the folder where [`save_adapter`] saved it.
        repo_id (`str`): `"org/name"`; created where it does not exist.
        adapter_name (`str`, defaults to `"default"`): Which adapter of a model.
        commit_message (`str`, defaults to `"Upload generated adapter"`): Message of the commit.
        private (`bool`, *optional*): Create a private repo.
        token (`str` or `bool`, *optional*): Access token; by default the stored one.
        revision (`str`, *optional*): Branch.
        create_pr (`bool`, defaults to `False`): Open a pull request instead of committing.
        overwrite_card (`bool`, defaults to `False`): Replace a card that was edited by hand.

    Returns:
        `huggingface_hub.CommitInfo`: Of the one commit.

    Raises:
        `ValueError`: If the model has no such adapter, or the folder holds none.
    """
    if isinstance(adapter, PeftModel):
        _check_name(adapter, adapter_name)
    else:
        AdapterLayout.from_pretrained(Path(adapter))

    def write(folder: Path) -> None:
        if isinstance(adapter, PeftModel):
            save_adapter(adapter, folder, adapter_name)
        else:
            for name in ("adapter_config.json", "adapter_model.safetensors", CARD):
                shutil.copy(Path(adapter) / name, folder / name)
        file = folder / "adapter_config.json"
        config = json.loads(file.read_text())
        if os.path.isdir(config["base_model_name_or_path"] or ""):
            copy_base(config["base_model_name_or_path"], folder)
            file.write_text(json.dumps({**config, "base_model_name_or_path": repo_id}, indent=2, sort_keys=True))

    def card(folder: Path) -> ModelCard:
        facts = ModelCard.load(folder / CARD).data.get("icm") or {}
        subfolder = BASE_FOLDER if (folder / BASE_FOLDER).is_dir() else None
        return adapter_card(AdapterLayout.from_pretrained(folder).to_dict(), repo_id=repo_id, base_subfolder=subfolder, **facts)

    return push_folder(
        write,
        repo_id,
        card=card,
        commit_message=commit_message,
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
        overwrite_card=overwrite_card,
    )
