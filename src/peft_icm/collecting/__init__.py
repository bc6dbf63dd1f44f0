"""Tasks -> collection: one LoRA per task, all from one seed; the last K epochs of each are the snapshots of an AdapterCollection."""

from .arguments import CollectingArguments, Task
from .collector import collect, gather
from .folder import DONE
from .lora import SnapshotCallback
from .recipe import RECIPE

__all__ = ["DONE", "RECIPE", "CollectingArguments", "SnapshotCallback", "Task", "collect", "gather"]
