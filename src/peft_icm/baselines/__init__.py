"""What a generator has to beat, behind its own interface: a condition in, adapters out ([`AdapterSource`]).

The diffusion baseline is imported from its own module, `peft_icm.baselines.cond_p_diff`, because diffusers is slow to import.
"""

from .base import AdapterSource, stored_bytes
from .compression import CompressedAdapters
from .stored import (
    CoordinateGaussian,
    GreedySoup,
    MeanOverTasks,
    NearestAdapter,
    NoisySnapshot,
    SingleAdapter,
    SnapshotMean,
    StoredAdapters,
)

__all__ = [
    "AdapterSource",
    "CompressedAdapters",
    "CoordinateGaussian",
    "GreedySoup",
    "MeanOverTasks",
    "NearestAdapter",
    "NoisySnapshot",
    "SingleAdapter",
    "SnapshotMean",
    "StoredAdapters",
    "stored_bytes",
]
