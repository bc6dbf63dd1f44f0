"""What several worlds need: a generator trained on a collection or through its tasks, and the folder that the package carries."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from peft_icm import AdapterCollection, AdapterLayout, ICMConfig, ICMGenerator, ICMTrainer, ICMTrainingArguments
from peft_icm.conditioning import ClipEncoder, JoinedEncoder, StatisticsEncoder

BUNDLED = Path(__file__).parents[2] / "src" / "peft_icm" / "bundled"
EPOCHS = 1200
PHRASINGS = 240  # of each task, round its own sentences
TASK_PHRASINGS = 24  # the same, of the many tasks of `task_trainer`
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of what is trained through tasks; what is bundled was made on CPUs


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


def task_encoder(build: Path, folder: str, reads: str) -> JoinedEncoder:
    """What hears sentences, and what a base makes of pictures or examples.

    Args:
        build (`Path`): With `encoder/` and the base.
        folder (`str`): The base's, in `build`.
        reads (`str`): `"images"` or `"examples"`.
    """
    text, read = ClipEncoder.from_pretrained(str(build / "encoder")), StatisticsEncoder.from_pretrained(str(build / folder))
    return JoinedEncoder({"text": text, reads: read}).to(DEVICE)


def task_trainer(
    build: Path, out: str, base: Any, encoder: JoinedEncoder, lora: dict[str, Any], tasks: Sequence[Any], **settings: Any
) -> ICMTrainer:
    """A trainer through the loss of tasks.

    Args:
        build (`Path`): Where checkpoints go, to `OUT.work/`.
        out (`str`): The generator's folder in it.
        base (`PreTrainedModel`): Lent.
        encoder ([`JoinedEncoder`]): Of [`task_encoder`].
        lora (`dict`): Of the adapters.
        tasks (`Sequence[Task]`): What is trained on.
        **settings: `eval_tasks`, evaluated and saved each `eval_steps`; the rest is for [`ICMTrainingArguments`].
    """
    eval_tasks = settings.pop("eval_tasks", [])
    strategy = "steps" if eval_tasks else "no"
    args = ICMTrainingArguments(
        output_dir=str(build / f"{out}.work"),
        objective="task",
        lr_scheduler_type="cosine",
        max_handful=8,
        condition_noise=0.3,
        phrasings=TASK_PHRASINGS,
        bf16=True,
        use_cpu=DEVICE == "cpu",
        eval_strategy=strategy,
        save_strategy=strategy,
        save_steps=settings.get("eval_steps", 500),
        save_total_limit=1,
        logging_steps=50,
        report_to="none",
        **settings,
    )
    return ICMTrainer(
        ICMConfig(hidden_size=384, num_components=64, latent_size=8),
        args,
        encoder=encoder,
        tasks=tasks,
        eval_tasks=eval_tasks,
        base_model=base,
        lora_config=LoraConfig(**lora),
    )


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
