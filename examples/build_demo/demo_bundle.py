"""What both bundles need: a generator trained on a collection, and the folder that the package carries."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from peft_icm import AdapterCollection, AdapterLayout, ICMConfig, ICMGenerator, ICMTrainer, ICMTrainingArguments
from peft_icm.conditioning import ClipEncoder

BUNDLED = Path(__file__).parents[2] / "src" / "peft_icm" / "bundled"
EPOCHS = 1200
PHRASINGS = 240  # of each task, round its own sentences


def train_generator(
    collection: Path, encoder: Path, config: ICMConfig, folder: Path, descriptions: Mapping[str, list[str]], images: Any = None
) -> None:
    """Train a generator on sentences, and pictures where there are any; the log goes to `FOLDER_trainer/`."""
    clip = ClipEncoder.from_pretrained(str(encoder))
    adapters = AdapterCollection.from_pretrained(collection)
    adapters.descriptions = dict(descriptions)
    adapters.metadata["base_model"] = "base_model"
    adapters.encode(clip, images=images)
    args = ICMTrainingArguments(
        output_dir=f"{folder}_trainer",
        num_train_epochs=EPOCHS,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        eval_strategy="steps",
        eval_steps=500,
        logging_steps=250,
        save_strategy="no",
        report_to=[],
        phrasings=PHRASINGS,
        use_cpu=True,
    )
    trainer = ICMTrainer(config, args, collection=adapters, encoder=clip)
    trainer.train()
    trainer.generator.save_pretrained(folder)


def write_bundle(name: str, generator: Path, collection: Path, tasks: Sequence[Any]) -> Path:
    """Write generator and own LoRAs in bf16, the base, and the encoder that the bundles share; returns the bundle's folder."""
    target = BUNDLED / name
    shutil.rmtree(target, ignore_errors=True)
    (target / "tasks").mkdir(parents=True)
    model = ICMGenerator.from_pretrained(generator, dtype=torch.bfloat16)
    model.save_pretrained(target / "generator", with_base_model=True)
    shutil.rmtree(BUNDLED / "encoder", ignore_errors=True)
    (target / "generator" / "encoder").rename(BUNDLED / "encoder")
    # The text tower is the same to the bit in each: only the hashes of the whole change with the image tower.
    for folder in BUNDLED.glob("*/generator"):
        config = ICMConfig.from_pretrained(folder)
        if (config.encoder or {})["kind"] == "joined":  # the open world is bundled after this
            continue
        config.encoder = {**model.config.encoder, "folder": "../../encoder"}
        config.save_pretrained(folder)
    full = AdapterCollection.from_pretrained(collection)
    own = {task.name: full.final(task.name)[None].to(torch.bfloat16) for task in tasks}
    layout = AdapterLayout.from_dict({**full.layout.to_dict(), "base_model_name_or_path": None})
    metadata = {**full.metadata, "base_model": "base_model"}
    AdapterCollection(layout, own, {task.name: task.descriptions[:1] for task in tasks}, metadata=metadata).save_pretrained(target / "own")
    return target


def bundled_size() -> str:
    """What all bundles weigh."""
    return f"{BUNDLED}: {sum(file.stat().st_size for file in BUNDLED.rglob('*') if file.is_file()) / 1e6:.2f} MB"
