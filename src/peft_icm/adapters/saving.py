"""PeftModel -> folder and Hub: one adapter, with a card that is true of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

from huggingface_hub import CommitInfo, ModelCard
from peft import PeftModel
from safetensors.torch import load_file

from ..disk import replacing_folder
from ..hub.bases import copy_base
from ..hub.cards import ADAPTED, CHANGED, FACTS, GENERATED, adapter_card
from ..hub.files import CARD, PushOptions, edited_by_hand, marked, published, push_folder
from .attach import PROVENANCE, check_finite
from .gguf import write_gguf
from .layout import AdapterLayout

CONFIG, WEIGHTS, GGUF = "adapter_config.json", "adapter_model.safetensors", "adapter_model.gguf"
Format = Literal["peft", "gguf"]
FORMATS: tuple[str, ...] = get_args(Format)
# Of the weights that a card was written for, in its front matter.
_SHA256 = re.compile(r"^ *sha256: ['\"]?([0-9a-f]{64})['\"]?\r?$", re.MULTILINE)


def save_adapter(model: PeftModel, folder: str | Path, adapter_name: str = "default", *, format: Format = "peft") -> Path:
    """Save one adapter as an ordinary PEFT folder, with a card that says where it came from, or as the GGUF file of llama.cpp and Ollama.

    Unlike `model.save_pretrained`, it never writes embedding layers of the base, puts the adapter into `folder` itself whatever its
    name, writes to a temporary folder first, and adds generator, text and seed to the card, and whether the weights still are those
    that were generated. A card that a person has edited is kept.

    Args:
        model (`PeftModel`): Carries the adapter.
        folder (`str` or `Path`): Where to; files of the same names are replaced, but for a card that was edited by hand.
        adapter_name (`str`, defaults to `"default"`): Which adapter.
        format (`str`, defaults to `"peft"`): `"gguf"` writes `adapter_model.gguf` alone, without a card, for a base that is a Llama,
            Mistral, Qwen2 or Qwen3 ([`write_gguf`]); it needs `peft-icm[gguf]`.

    Returns:
        `Path`: `folder`.

    Raises:
        `ValueError`: If the model is no `PeftModel`, as what [`~ICMGenerator.load_into`] fills, or has no such adapter, a value is not
            finite, `format` is none, or llama.cpp cannot hold the adapter; nothing is written then.
        `OSError`: If `format` is `"gguf"` and the package gguf is missing.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(f"The model is a {type(model).__name__}, must be a PeftModel: make the adapter by generate_adapter or attach.")
    if adapter_name not in model.peft_config:
        raise ValueError(f"No adapter named {adapter_name!r}: the model has {sorted(model.peft_config)}.")
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown: choose one of {', '.join(FORMATS)}.")
    target = Path(folder)
    if format == "gguf":
        with replacing_folder(target) as new:
            write_gguf(model, new / GGUF, adapter_name)
        return target
    with replacing_folder(target) as new:
        model.save_pretrained(str(new), selected_adapters=[adapter_name], save_embedding_layers=False)
        if adapter_name != "default":
            for file in (new / adapter_name).iterdir():
                os.replace(file, new / file.name)
            (new / adapter_name).rmdir()
        layout, sha256 = _weights(new)
        facts = dict(vars(model.peft_config[adapter_name]).get(PROVENANCE, {}))
        if facts:
            facts["sha256"] = facts["sha256"][layout.dtype]
        made, by_hand = adapter_card(layout.to_dict(), **_as_it_is(facts, sha256)), _card_by_hand(target / CARD, sha256)
        (new / CARD).write_bytes(marked(str(made)).encode() if by_hand is None else by_hand)
    return target


def _weights(folder: Path) -> tuple[AdapterLayout, str]:
    layout, state_dict = AdapterLayout.from_pretrained(folder), load_file(folder / WEIGHTS)
    check_finite(layout, state_dict)
    return layout, layout.sha256(state_dict)


def _as_it_is(facts: dict[str, Any], sha256: str) -> dict[str, Any]:
    """The facts of how an adapter was generated, and that it is no longer that one if it is not."""
    return {**facts, "changed": True} if facts.get("sha256", sha256) != sha256 else facts


def _card_by_hand(card: Path, sha256: str) -> bytes | None:
    """A card if a person has edited it; where it was written for other weights, without our own word that they were not trained."""
    if not card.is_file():
        return None
    text = card.read_bytes().decode(errors="surrogateescape")
    if not edited_by_hand(text):
        return None
    written_for = _SHA256.search(text)
    if written_for and written_for.group(1) != sha256:
        warnings.warn(f"{card} was edited by hand, and is kept, but it was written for other weights: look it through.", stacklevel=3)
        text = text.replace(GENERATED, CHANGED).replace(ADAPTED, CHANGED)
    return text.encode(errors="surrogateescape")


def push_adapter(
    adapter: PeftModel | str | os.PathLike[str],
    repo_id: str,
    adapter_name: str = "default",
    *,
    with_base_model: bool = False,
    **push: Unpack[PushOptions],
) -> CommitInfo:
    """Push one adapter to the Hub in one commit, with its card; what names a folder of this machine is left out.

    A card of the adapter's folder that a person has edited is pushed as it is.

    Args:
        adapter (`PeftModel`, `str` or `Path`): A model that carries the adapter, or the folder where [`save_adapter`] or peft saved it.
        repo_id (`str`): `"org/name"`; created where it does not exist.
        adapter_name (`str`, defaults to `"default"`): Which adapter of a model.
        with_base_model (`bool`, defaults to `False`): Push a base model that is a local folder too, beside the adapter, so that
            `AutoPeftModelForCausalLM.from_pretrained(repo_id)` loads both.
        **push: `commit_message`, `commit_description`, `tags`, `private`, `token`, `revision`, `create_pr` and `overwrite_card`: see
            [`PushOptions`].

    Returns:
        `huggingface_hub.CommitInfo`: Of the one commit.

    Raises:
        `ValueError`: If the model is no `PeftModel` or has no such adapter, or the folder holds none, or no safetensors base where one is
            to be pushed, or a value is not finite; nothing is on the Hub then.
    """
    if isinstance(adapter, str | os.PathLike) and not Path(adapter).is_dir():
        raise ValueError(f"{adapter} is no folder: pass a PeftModel, or the folder where its adapter is saved.")
    push.setdefault("commit_message", "Upload generated adapter")
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary)
        if isinstance(adapter, str | os.PathLike):
            layout, sha256 = _weights(Path(adapter))
            for name in (CONFIG, WEIGHTS, CARD):
                if (Path(adapter) / name).is_file():
                    shutil.copyfile(Path(adapter) / name, source / name)
            if (by_hand := _card_by_hand(Path(adapter) / CARD, sha256)) is not None:
                (source / CARD).write_bytes(by_hand)
        else:
            save_adapter(adapter, source, adapter_name)
            layout, sha256 = _weights(source)

        def write(folder: Path) -> None:
            shutil.copyfile(source / WEIGHTS, folder / WEIGHTS)
            config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
            base = config.get("base_model_name_or_path")
            if with_base_model:
                if not os.path.isdir(base or ""):
                    raise ValueError(f"with_base_model=True is for a base that is a local folder, this one is {base!r}: push without.")
                copy_base(base, folder, "")
                config |= {"base_model_name_or_path": repo_id, "revision": push.get("revision")}
            (folder / CONFIG).write_text(json.dumps(published(config), indent=2, sort_keys=True), encoding="utf-8")

        def card(folder: Path) -> ModelCard:
            saved = source / CARD
            found = ModelCard.load(saved, ignore_metadata_errors=True).data.get("icm") if saved.is_file() else None
            facts = {name: value for name, value in found.items() if name in FACTS} if isinstance(found, dict) else {}
            return adapter_card(layout.to_dict(), repo_id=repo_id, with_base=with_base_model, **_as_it_is(facts, sha256))

        return push_folder(
            write,
            repo_id,
            card=card,
            source=source,
            **push,
        )
