"""A figure of each evaluation, sent where `report_to` sends the log."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from ..figures import plot_bars

if TYPE_CHECKING:
    from .trainer import ICMTrainer

Bars = tuple[list[str], dict[str, Tensor], str]  # names of tasks, by kind one number `[T]` of each, what the numbers are
FIGURE = "eval/tasks"
REPORTERS = (TensorBoardCallback, TrackioCallback, WandbCallback)
SHOWN = 24  # tasks, those that do worst


class ReportFigure(TrainerCallback):
    """Draws what an evaluation found of each task, the worst tasks first, and sends it to tensorboard, trackio and wandb."""

    def __init__(self, trainer: ICMTrainer):
        self.trainer = trainer

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The log of this evaluation was sent just before."""
        reporters = [one for one in self.trainer.callback_handler.callbacks if isinstance(one, REPORTERS)]
        if not reporters or not state.is_world_process_zero:
            return
        names, bars, label = self.trainer.objective.bars(kwargs["eval_dataloader"].dataset, self.trainer.found)
        worst = next(iter(bars.values())).argsort()[:SHOWN].tolist()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "tasks.png")
            plot_bars([names[task] for task in worst], {kind: row[worst].tolist() for kind, row in bars.items()}, label, file)
            picture = Image.open(file).convert("RGB")
        for reporter in reporters:
            if isinstance(reporter, TensorBoardCallback):
                reporter.tb_writer.add_image(FIGURE, np.asarray(picture), state.global_step, dataformats="HWC")
                reporter.tb_writer.flush()
            else:
                library = importlib.import_module("trackio" if isinstance(reporter, TrackioCallback) else "wandb")  # one interface
                library.log({FIGURE: library.Image(picture), "train/global_step": state.global_step})
