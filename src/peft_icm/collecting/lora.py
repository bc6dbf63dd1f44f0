"""One task's LoRA, by transformers' Trainer."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from ..adapters.examples import collate
from ..adapters.layout import AdapterLayout
from ..disk import inside, replacing_file, safe_name
from .arguments import CollectingArguments, Task
from .folder import DONE


class SnapshotCallback(TrainerCallback):
    """Saves the LoRA of each of the last K epochs as `epoch-0101.safetensors`, atomically.

    Args:
        folder (`Path`): Where to.
        num_snapshots (`int`): K.

    Raises:
        `ValueError`: If the LoRA holds a value that is not finite; nothing is written then.
    """

    def __init__(self, folder: Path, num_snapshots: int):
        self.folder, self.num_snapshots = folder, num_snapshots

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save, if this is one of the last K epochs."""
        epoch = round(state.epoch or 0)
        if epoch <= args.num_train_epochs - self.num_snapshots:
            return
        state_dict = get_peft_model_state_dict(kwargs["model"], save_embedding_layers=False)
        tensors = {key: value.detach().cpu().contiguous() for key, value in state_dict.items()}
        for key, value in tensors.items():
            if not torch.isfinite(value).all():
                raise ValueError(f"Task {self.folder.name!r}: {key} is not finite after epoch {epoch}. Lower the learning rate.")
        with replacing_file(self.folder / f"epoch-{epoch:04d}.safetensors") as temporary:
            save_file(tensors, temporary)


def train_lora(
    base: nn.Module, processor: Any, task: Task, lora_config: LoraConfig, args: CollectingArguments, root: Path, data_sha256: str
) -> nn.Module:
    """Train the LoRA of one task in its folder, whose `done.json` is written last.

    Args:
        base (`nn.Module`): The base model; lent.
        processor: Of the base model.
        task ([`Task`]): The task.
        lora_config (`LoraConfig`): Left as it is.
        args ([`CollectingArguments`]): The recipe.
        root (`Path`): The work folder.
        data_sha256 (`str`): Of the task's data, noted in `done.json`.

    Returns:
        `nn.Module`: The base as it was.

    Raises:
        `ValueError`: If the LoRA holds a value that is not finite.
    """
    folder = inside(root, safe_name(task.name, "task"))
    shutil.rmtree(folder, ignore_errors=True)  # an unfinished run of this task
    folder.mkdir(parents=True)
    set_seed(args.seed)
    model = get_peft_model(base, copy.deepcopy(lora_config))  # peft resolves target_modules in place
    assert isinstance(model, PeftModel)
    with tempfile.TemporaryDirectory() as scratch:
        training_args = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=args.num_train_epochs,
            per_device_train_batch_size=args.per_device_train_batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type=args.lr_scheduler_type,
            warmup_steps=0.05,
            weight_decay=0.0,
            seed=args.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        training_args._n_gpu = min(1, training_args.n_gpu)  # the Trainer would split batches over all that it sees
        trainer = Trainer(
            model=model,
            args=training_args,
            train_dataset=task.train_dataset(processor, **args.dataset_kwargs),
            data_collator=collate,
            callbacks=[SnapshotCallback(folder, args.num_snapshots)],
        )
        trainer.remove_callback(PrinterCallback)  # it prints on stdout, which is the caller's
        loss = trainer.train().training_loss
    done = {"layout": AdapterLayout.from_peft_model(model).to_dict(), "train_loss": round(loss, 4), "data_sha256": data_sha256}
    with replacing_file(folder / DONE) as temporary:
        temporary.write_text(json.dumps(done))
    return model.unload()
