"""A frozen base in parts over processes: each holds its share, and gathers a block's weights while it is in it."""

from __future__ import annotations

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from .arguments import ICMTrainingArguments


def shard(base: PreTrainedModel, args: ICMTrainingArguments) -> None:
    """Shard a base by torch's `fully_shard`, block by block, and leave the generator to DDP: the Trainer's FSDP would do the reverse.

    Args:
        base (`PreTrainedModel`): Frozen; stays sharded. Its blocks are those that transformers never splits over devices.
        args ([`ICMTrainingArguments`]): Its `fsdp` is taken away from the Trainer; of `fsdp_config` nothing is read.

    Raises:
        `ValueError`: If there is one process.
    """
    if args.world_size == 1:
        raise ValueError("fsdp=True shares the base out over processes, and this is the only one: start several with torchrun.")
    mesh = init_device_mesh(args.device.type, (args.world_size,))
    blocks = set(base._no_split_modules or ())
    for module in [module for module in base.modules() if type(module).__name__ in blocks]:
        fully_shard(module, mesh=mesh)
    fully_shard(base, mesh=mesh)
    args.fsdp_plugin_args = None
