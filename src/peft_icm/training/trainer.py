"""ICMTrainer: transformers' Trainer, with one of two objectives."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import (
    IntervalStrategy,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput

from ..adapters.collection import AdapterCollection
from ..collecting.folder import make_folder
from ..conditioning import TaskEncoder
from ..generator.configuration_icm import ICMConfig
from ..generator.modeling_icm import ICMGenerator
from ..hub.cards import generator_card
from ..hub.files import CARD, check_pushable, marked
from .arguments import ICMTrainingArguments
from .recipe import keep_others_out, let_others_in
from .reconstruction import Reconstruction
from .reporting import ReportFigure
from .through_task import ThroughTask


class RefreshContext(TrainerCallback):
    """Recomputes the context's pairs, or the spread over the tasks, before the first step of every epoch and once at the end.

    It stands before the callbacks of `report_to`, so that the last evaluation is of their run: they close it when training ends.
    """

    def __init__(self, trainer: ICMTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A checkpoint is loaded by now."""
        self.trainer.objective.begin()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refresh at the first step of an epoch; a run resumed in mid-epoch has its pairs in the checkpoint."""
        steps = max(1, state.max_steps // max(1, round(state.num_train_epochs)))
        if state.global_step % steps == 0:
            self.trainer.refresh_context()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave the generator with the pairs of its final weights, and evaluate it."""
        self.trainer.refresh_context()
        if self.trainer.eval_dataset is not None:
            self.trainer.measured = self.trainer.evaluate()


def _or_the_order_of_0_1_0(init: Callable[..., None]) -> Callable[..., None]:
    """An `__init__` that takes collection, model, args, encoder in the order of 0.1.0 too, with a warning."""

    @functools.wraps(init)
    def either(self: Any, *args: Any, **kwargs: Any) -> None:
        if not (args and isinstance(args[0], AdapterCollection)):
            return init(self, *args, **kwargs)
        warnings.warn(
            "ICMTrainer(collection, model, args) is deprecated, write ICMTrainer(model, args, collection=collection).",
            FutureWarning,
            stacklevel=2,
        )
        init(self, **dict(zip(("collection", "model", "args", "encoder"), args, strict=False)), **kwargs)

    return either


def _repo_id(args: TrainingArguments) -> str:
    return args.hub_model_id or Path(args.output_dir or ".").absolute().name


class ICMTrainer(Trainer):
    """Trains an [`ICMGenerator`]: on the snapshots of an [`AdapterCollection`], or through the loss of tasks on a base model.

    With `args.objective="reconstruction"` it logs, on held-out snapshots: `eval_kl` (nats), `eval_active_units` (latent dimensions whose
    posterior mean has a variance above 0.01, Burda et al. 2016), `eval_mse` (from the posterior), `eval_prior_mse` (z ~ N(0, I)),
    `eval_zero_mse` (z = 0), all in pooled, normalised units, and `eval_variance_explained`.

    With `args.objective="task"` the base reads examples of the tasks under the generated adapters, each example of a batch under one of its
    own, and its loss trains the generator: no LoRA is collected. On examples of `eval_tasks`, which nothing is trained on, it logs
    `eval_unseen_loss`, `eval_unseen_shared_loss` (without a condition: one LoRA for all tasks), `eval_unseen_base_loss` (without an
    adapter), all in nats per token, and `eval_unseen_gain`, the first below the second. A generator that was trained by reconstruction may
    be trained on like that, where its layout has linear targets alone.

    To tensorboard, trackio and wandb (`args.report_to`) goes with each evaluation a figure of the tasks that do worst, `eval/tasks`.

    Args:
        model ([`ICMGenerator`] or [`ICMConfig`], *optional*): What to train. A config, or nothing, builds a new generator, whose
            layout, encoder and tasks are those of the collection and whose statistics are estimated from it; for `"task"` a `"direct"` one.
        args ([`ICMTrainingArguments`], *optional*): Defaults where not given.
        collection (`AdapterCollection`, *optional*): With task vectors; for `"reconstruction"`.
        encoder (`TaskEncoder`, *optional*): The encoder of the task vectors; saved with the generator if it is a local one. `"task"` needs
            it.
        tasks (`Sequence[Task]`, *optional*): What `"task"` trains on.
        eval_tasks (`Sequence[Task]`, *optional*): Tasks that nothing is trained on.
        base_model (`str`, `Path` or `PreTrainedModel`, *optional*): The base that `"task"` trains for; its weights stay as they are.
        lora_config (`LoraConfig`, *optional*): Of the adapters of a new generator of `"task"`.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*): Of the base; by default that beside it.
        **kwargs: For transformers' `Trainer`.

    Raises:
        `ValueError`: If the collection has no task vectors or holds a value that is not finite, the model has another layout, what the
            objective needs is missing, or a target is no linear layer.
        `OSError`: If `args.output_dir` is a file, or a checkpoint cannot be written.
    """

    @_or_the_order_of_0_1_0
    def __init__(
        self,
        model: ICMGenerator | ICMConfig | None = None,
        args: ICMTrainingArguments | None = None,
        collection: AdapterCollection | None = None,
        encoder: TaskEncoder | None = None,
        *,
        tasks: Sequence[Any] | None = None,
        eval_tasks: Sequence[Any] = (),
        base_model: str | os.PathLike[str] | PreTrainedModel | None = None,
        lora_config: LoraConfig | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ):
        args = args or ICMTrainingArguments()
        make_folder(args.output_dir or ".", "output_dir")
        if args.push_to_hub and args.process_index == 0:  # before anything is encoded
            args.hub_model_id = check_pushable(_repo_id(args), private=args.hub_private_repo, token=args.hub_token)
        self.collection = collection
        self.objective: Reconstruction | ThroughTask
        if args.objective == "task":
            args.remove_unused_columns = False  # they are the base's, not the generator's
            if not tasks or base_model is None or encoder is None:
                raise ValueError("objective='task' needs tasks=, base_model= and encoder=.")
            self.objective = ThroughTask(model, args, tasks, eval_tasks, base_model, lora_config, encoder, processing_class)
        else:
            if collection is None:
                raise ValueError("ICMTrainer needs collection=, an AdapterCollection with task vectors.")
            self.objective = Reconstruction(model or ICMConfig(), args, collection, encoder)
        self.generator = self.objective.generator
        self.measured: dict[str, float] = {}  # at the end of training
        evaluated: Any = self.objective.eval_dataset
        if evaluated is None:
            args.eval_strategy = IntervalStrategy.NO
        super().__init__(
            model=self.generator,
            args=args,
            data_collator=self.objective.data_collator,
            train_dataset=self.objective.train_dataset,
            eval_dataset=evaluated,
            compute_metrics=self.objective.metrics,
            **kwargs,
        )
        self.label_names = list(self.objective.label_names)
        self.model_accepts_loss_kwargs = args.objective == "task"  # its loss is a mean over all tokens of a batch, whoever computes them
        self.callback_handler.callbacks.insert(0, RefreshContext(self))
        self.add_callback(ReportFigure(self))

    # ------------------------------------------------------------------ what the objective decides
    def _get_dataloader(self, dataset: Any, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        dataset = dataset if is_training else self.objective.evaluated(dataset)
        return super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)  # type: ignore[misc]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.objective.sampler(train_dataset or self.train_dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return self.objective.sampler(eval_dataset, evaluate=True)

    def refresh_context(self) -> None:
        """Recompute what is measured on the training tasks: the context's pairs, or the spread of their adapters."""
        self.objective.refresh()

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's loss.

        Raises:
            `ValueError`: If it is not finite.
        """
        loss, outputs = self.objective.loss(self, model, inputs, num_items_in_batch)
        if not loss.detach().isfinite().all():
            raise ValueError(
                f"The loss is not finite at step {self.state.global_step + 1}: lower the learning rate. The last checkpoint is as it was."
            )
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the objective kept since the last log."""
        if "loss" in logs:
            logs |= self.objective.logged()
        super().log(logs, start_time)

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Any, Tensor]:
        """The objective's figures of each held-out sample."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.objective.predict(self, model, inputs)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Keep what was found, for [`ReportFigure`]: the log takes numbers alone."""
        self.found = super().evaluation_loop(dataloader, *args, **kwargs)
        return self.found

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except RuntimeError as error:
            if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
                raise
            raise OSError(  # torch's writer tells of a full disk by positions in a file
                f"The checkpoint of step {self.state.global_step} cannot be written into {self.args.output_dir}"
                f" ({' '.join(str(error).split())}): if its disk is full make room, delete it and resume from the one before."
            ) from error

    # ------------------------------------------------------------------ the end
    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, then note the facts of the training in the generator's config, for its card.

        Raises:
            `ValueError`: If another process is training into the same `output_dir`.
        """
        if self.is_world_process_zero():
            keep_others_out(self.args.output_dir or ".")
        try:
            output = super().train(*args, **kwargs)
        finally:
            self.objective.end()
            let_others_in(self.args.output_dir or ".")
        self.generator.config.training = {
            "objective": self.args.objective,  # type: ignore[attr-defined]
            "epochs": self.state.num_train_epochs,
            "steps": self.state.global_step,
            "seed": self.args.seed,
            "learning_rate": self.args.learning_rate,
            **self.objective.facts(self.measured),
        }
        return output

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card of peft_icm in the place of the Trainer's."""
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir or ".")
            card = generator_card(self.generator.config.to_dict(), repo_id=_repo_id(self.args), folder=folder)
            (folder / CARD).write_text(marked(str(card)), encoding="utf-8")

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's; of `args.push_to_hub` the repo is there since the trainer was made."""
        if self.args.push_to_hub:
            self.hub_model_id, self.push_in_progress = self.args.hub_model_id, None  # type: ignore[assignment]
        else:
            super().init_hf_repo(*args, **kwargs)

    def push_to_hub(self, commit_message: str | None = "End of training", **kwargs: Any) -> Any:  # type: ignore[override]
        """Push the generator and its card in one commit; see [`ICMGenerator.push_to_hub`]."""
        if not self.is_world_process_zero():
            return None
        options = {"private": self.args.hub_private_repo, "token": self.args.hub_token, **kwargs}
        return self.generator.push_to_hub(_repo_id(self.args), commit_message=commit_message or "End of training", **options)
