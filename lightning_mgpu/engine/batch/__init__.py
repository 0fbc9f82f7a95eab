"""Split batches and join outputs: the only package that does either.

`containers` knows the structures, `layout` decides which parts of a batch have an entry per sample,
`splitting` acts on that. `roles` tells how outputs are joined, `joining` does it, and `samples`
takes joined ones apart again. `docs/batches.md` has the rules as a table.
"""

from lightning_mgpu.engine.batch.containers import leaves, map_leaves
from lightning_mgpu.engine.batch.joining import gather, join, weighted_mean
from lightning_mgpu.engine.batch.layout import BatchLayout, Hint
from lightning_mgpu.engine.batch.roles import JoinMemory
from lightning_mgpu.engine.batch.samples import join_samples
from lightning_mgpu.engine.batch.splitting import Shard, batch_size, scatter, split

__all__ = [
    "BatchLayout",
    "Hint",
    "JoinMemory",
    "Shard",
    "batch_size",
    "gather",
    "join",
    "join_samples",
    "leaves",
    "map_leaves",
    "scatter",
    "split",
    "weighted_mean",
]
