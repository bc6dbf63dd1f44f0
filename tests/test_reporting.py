"""Where `report_to` sends the log: our own metrics, and a figure of each evaluation."""

import io

import pytest
import task_worlds
import torch
from PIL import Image
from test_training import arguments, config, tiny_collection

from peft_icm import ICMTrainer
from peft_icm.training.reporting import SHOWN


def reconstruction(folder, tasks=3, **options):
    args = arguments(folder / "out", num_train_epochs=4, logging_steps=2, eval_strategy="epoch", **options)
    return ICMTrainer(config(), args, collection=tiny_collection(tasks=tasks))


def through_task(folder, **options):
    (folder / "base").mkdir()
    world = task_worlds.text_world(folder / "base")
    return task_worlds.trainer(world, folder / "out", max_steps=4, eval_strategy="steps", eval_steps=2, **options)


def drawn(trainer):
    """Of the last evaluation."""
    return trainer.objective.bars(trainer.callback_handler.eval_dataloader.dataset, trainer.found)


def is_a_figure(file):
    with Image.open(file) as picture:
        return picture.format == "PNG" and picture.width > 400 and len(picture.convert("L").getcolors()) > 2


@pytest.mark.parametrize(
    ("build", "metric", "steps"), [(reconstruction, "train/kl", [2, 4, 6, 8]), (through_task, "eval/unseen_gain", [2, 4])]
)
def test_tensorboard(build, metric, steps, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "log"))
    trainer = build(tmp_path, report_to=["tensorboard"])
    trainer.train()
    (events,) = [EventAccumulator(str(file)).Reload() for file in (tmp_path / "log").glob("events.*")]  # the last evaluation is of the run
    logged = set(events.Tags()["scalars"])
    told = {name for row in trainer.state.log_history for name in row if name.startswith("eval_")}
    assert told and {f"eval/{name.removeprefix('eval_')}" for name in told} <= logged and metric in logged
    drawn = events.Images("eval/tasks")
    assert sorted({image.step for image in drawn}) == steps
    assert all(is_a_figure(io.BytesIO(image.encoded_image_string)) for image in drawn)


def test_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "log"))  # read when it is imported
    pytest.importorskip("trackio", reason="trackio wants pillow<13: pip install trackio")
    reconstruction(tmp_path, report_to=["trackio"], project="icm").train()
    (run,) = (tmp_path / "log" / "media" / "icm").iterdir()
    files = list(run.rglob("*.png"))
    assert len(files) == 5 and all(map(is_a_figure, files))


def test_what_is_drawn(tmp_path):
    trainer = reconstruction(tmp_path, tasks=SHOWN + 2)
    metrics = trainer.evaluate()
    names, bars, _ = drawn(trainer)
    variance = torch.stack([part.mean() for part in trainer.eval_dataset.variances])
    assert names == trainer.collection.tasks
    for kind, metric in (("posterior", "mse"), ("z ~ N(0, I)", "prior_mse"), ("z = 0", "zero_mse")):
        unexplained = (1 - bars[kind]) * variance
        assert unexplained.mean().item() == pytest.approx(metrics[f"eval_{metric}"], rel=1e-4)
        assert unexplained.std() > 0


def test_what_is_drawn_through_the_task(tmp_path):
    trainer = through_task(tmp_path)
    metrics = trainer.evaluate()
    names, bars, _ = drawn(trainer)
    assert names == ["letters"] and len(trainer.callback_handler.eval_dataloader.dataset) == 16
    gain = metrics["eval_unseen_base_loss"] - metrics["eval_unseen_shared_loss"]
    assert bars["no condition"].item() == pytest.approx(gain, abs=1e-5)
