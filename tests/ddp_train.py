"""Run by torchrun in test_training.py: train and write the logged losses."""

import json
import os
import sys
from pathlib import Path

import torch
from test_training import arguments, tiny_collection

from peft_icm import ICMConfig, ICMTrainer


def by_reconstruction(folder, batch):
    args = arguments(folder / "out", num_train_epochs=2, per_device_train_batch_size=batch, logging_steps=1, ddp_backend="gloo")
    return ICMTrainer(ICMConfig(latent_size=4, hidden_size=16, num_components=6), args, collection=tiny_collection())


def through_tasks(folder, batch, **options):
    from task_worlds import text_world, trainer

    return trainer(text_world(folder / "base"), folder / "out", per_device_train_batch_size=batch, ddp_backend="gloo", **options)


def through_a_sharded_base(folder, batch):
    """In several processes; one has the base whole."""
    built = through_tasks(folder, batch, fsdp=int(os.environ["WORLD_SIZE"]) > 1 or None)
    here = sum(getattr(weight, "_local_tensor", weight).numel() for weight in built.objective.base.parameters())
    assert here < 0.6 * sum(weight.numel() for weight in built.objective.base.parameters()) or built.args.world_size == 1
    return built


def recorded(dataset, keys):
    """The same data set, which notes what is asked of it."""

    class Recorded(type(dataset)):
        def __getitem__(self, key):
            keys.append(key)
            return super().__getitem__(key)

    dataset.__class__ = Recorded


def main():
    folder, batch, objective = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    trainer = {"reconstruction": by_reconstruction, "task": through_tasks, "sharded": through_a_sharded_base}[objective](folder, batch)
    keys = []
    recorded(trainer.train_dataset, keys)
    trainer.train()
    (folder / f"read-{trainer.args.process_index}.json").write_text(json.dumps(keys))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        result = {"losses": losses, "processes": trainer.args.world_size, "eval": trainer.generator.config.training["metrics"]}
        (folder / "result.json").write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads abort one process in some that ends in the usual way, after all is done


if __name__ == "__main__":
    main()
