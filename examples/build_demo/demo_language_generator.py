"""The stages that train on the world of language: one LoRA for all of its tasks, and a generator on top of it.

Nothing is trained on the tasks under `choose` and `unseen` of language_split.json. Settings were chosen on the former.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from demo_bundle import DEVICE, task_encoder, task_trainer
from demo_language import split
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from peft_icm import ICMGenerator, ICMTrainer
from peft_icm.conditioning import JoinedEncoder
from peft_icm.tasks.language_modeling import LanguageModelingTask, load_tasks
from peft_icm.training.conditions import excerpts

BLOCK, BATCH = 128, 16
SHARED_STEPS, STEPS = 600, 1200  # of the LoRA for all that both begin with; of the generator, and of that LoRA as its rival
PRIOR_TASKS, PRIOR_EXCERPTS, PRIOR_BLOCKS = 4, 8, 16  # of `choose`; blocks to learn from, and as many that tell
SHARED_RATE, RATE = 2e-3, 3e-4  # at 1e-3 the loss of the generator rose for the first half of the training
LORA: dict[str, Any] = {
    "r": 2,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
}


def language_tasks(build: Path, part: str) -> list[LanguageModelingTask]:
    """The tasks of one part of the split."""
    names = split()[part]
    if isinstance(names, dict):
        names = [name for group in names.values() for name in group]
    tasks = {task.name: task for task in load_tasks(build / "language")}
    return [tasks[name] for name in names]


class OfAllTasks(Dataset[dict[str, Tensor]]):
    """Blocks of many tasks; the task is drawn first, each as often as another.

    Args:
        blocks (`list[Dataset]`): Of each task.
        seed (`int`): Of the order.
    """

    def __init__(self, blocks: list[Any], count: int, seed: int):
        draw = torch.Generator().manual_seed(seed)
        self.blocks, self.tasks = blocks, torch.randint(len(blocks), (count,), generator=draw).tolist()
        self.places = torch.rand(count, generator=draw).tolist()

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        own = self.blocks[self.tasks[index]]
        return own[int(self.places[index] * len(own))]


def shared_lora(build: Path, out: str, steps: int, seed: int, start: str | None = None, rate: float = SHARED_RATE) -> None:
    """One LoRA for all tasks, in the ordinary way; from scratch, or from another one."""
    base = AutoModelForCausalLM.from_pretrained(build / "base_model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(build / "base_model")
    torch.manual_seed(seed)
    model: Any = (
        PeftModel.from_pretrained(base, str(build / start), is_trainable=True) if start else get_peft_model(base, LoraConfig(**LORA))
    )
    blocks = [task.train_dataset(tokenizer, block_size=BLOCK) for task in language_tasks(build, "train")]
    args = TrainingArguments(
        output_dir=str(build / f"{out}.work"), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=rate,
        lr_scheduler_type="cosine", warmup_steps=0.1, weight_decay=0.0, save_strategy="no", logging_steps=50, report_to="none",
        bf16=True, use_cpu=DEVICE == "cpu", seed=seed,
    )  # fmt: skip
    Trainer(model=model, args=args, train_dataset=OfAllTasks(blocks, steps * BATCH, seed)).train()
    model.save_pretrained(build / out)


def language_shared(build: Path) -> None:
    """`language_shared/`, which the generator begins with, and `language_rival/`, trained on for as many steps as the generator."""
    shared_lora(build, "language_shared", SHARED_STEPS, seed=0)
    shared_lora(build, "language_rival", STEPS, seed=1, start="language_shared")


def language_trainer(build: Path, out: str, encoder: JoinedEncoder, tasks: list[LanguageModelingTask], **settings: Any) -> ICMTrainer:
    """A trainer through the loss of tasks, whose generator begins with the LoRA for all of them.

    Args:
        build (`Path`): With `language/`, `language_shared/` and `base_model/`.
        out (`str`), encoder ([`JoinedEncoder`]), tasks (`list[LanguageModelingTask]`), **settings: See [`task_trainer`].
    """
    base = AutoModelForCausalLM.from_pretrained(build / "base_model", dtype=torch.float32)
    trainer = task_trainer(
        build,
        out,
        base,
        encoder,
        LORA,
        tasks,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=32,
        **{"learning_rate": RATE, "warmup_steps": 0.1, "dataset_kwargs": {"block_size": BLOCK}} | settings,
    )
    shared = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(build / "base_model"), str(build / "language_shared"))
    start = trainer.generator.layout.flatten(get_peft_model_state_dict(shared, save_embedding_layers=False))
    trainer.generator.network.fit(start[None])
    return trainer


def language_generator(build: Path) -> None:
    """Train through the loss of the tasks, from the LoRA for all of them."""
    trainer = language_trainer(
        build,
        "language_generator",
        task_encoder(build, "base_model", "examples"),
        language_tasks(build, "train"),
        eval_tasks=language_tasks(build, "choose"),
        max_steps=STEPS,
        eval_steps=200,
    )
    trainer.train()
    trainer.generator.save_pretrained(build / "language_generator")


def language_prior(build: Path) -> None:
    """Fit the weight of the generator as a prior of 16 blocks of text, on tasks that choose settings; their held-out texts tell."""
    generator = ICMGenerator.from_pretrained(build / "language_generator")
    base = AutoModelForCausalLM.from_pretrained(build / "base_model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(build / "base_model")
    held_out = []
    for task in language_tasks(build, "choose")[1 :: 16 // PRIOR_TASKS]:
        blocks, others = (each.train_dataset(tokenizer, block_size=BLOCK) for each in (task, replace(task, train_texts=task.test_texts)))
        parts = [[part[round(index)] for index in torch.linspace(0, len(part) - 1, PRIOR_BLOCKS).tolist()] for part in (blocks, others)]
        held_out.append((generator.task_vector(examples=excerpts(task.train_texts, PRIOR_EXCERPTS)), *parts))
    print(generator.fit_prior(held_out, base, counts=(PRIOR_BLOCKS,), progress=True))
    generator.save_pretrained(build / "language_generator")
