"""Run by torchrun in test_training.py: train two epochs and write the logged losses."""

import json
import sys
from pathlib import Path

from test_training import arguments, tiny_collection

from peft_icm import ICMConfig, ICMTrainer


def main():
    folder, batch = Path(sys.argv[1]), int(sys.argv[2])
    args = arguments(folder / "out", num_train_epochs=2, per_device_train_batch_size=batch, logging_steps=1, ddp_backend="gloo")
    trainer = ICMTrainer(ICMConfig(latent_size=4, hidden_size=16, num_components=6), args, collection=tiny_collection())
    trainer.train()
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        result = {"losses": losses, "processes": trainer.args.world_size, "eval": trainer.generator.config.training["metrics"]}
        (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
