"""Where a rank stands among the others: which ones share rows with it, and which ones heads.

Ranks are numbered with those that share heads side by side: they exchange most. With several kinds
of sharing each kind has groups of its own (torch.distributed's device mesh).
"""

from __future__ import annotations

from typing import NamedTuple

from torch.distributed.device_mesh import init_device_mesh

from longspan.attention.ranks import RankGroup
from longspan.config import EngineConfig


class RankMesh(NamedTuple):
    """One rank's groups."""

    rank: int
    size: int
    rows: RankGroup | None = None
    """Ranks that share the rows of prefill chunks (context parallelism); None: there are none."""
    heads: RankGroup | None = None
    """Ranks that share the heads of each layer (tensor parallelism)."""
    stage: int = 0
    """Which slice of the layers it has (pipeline parallelism)."""
    rings: tuple[tuple[int, ...], ...] = ()
    """Ranks through which rows of activations pass, in order: one ring for each rank of a stage."""

    @property
    def ring(self) -> tuple[int, ...]:
        """The ring that this rank is in."""
        return next(ring for ring in self.rings if self.rank in ring)

    @classmethod
    def join(cls, rank: int, config: EngineConfig) -> RankMesh:
        """Make the groups of a rank, where torch.distributed is set up; on all ranks at a time."""
        size, rows, heads = config.num_ranks, config.context_parallel, config.tensor_parallel
        if size == rows:
            return cls(rank, size, rows=RankGroup(rank, size))
        if size == heads:
            return cls(rank, size, heads=RankGroup(rank, size))
        if size == config.pipeline_parallel:
            return cls(rank, size, stage=rank, rings=(tuple(range(size)),))
        assert config.device is not None
        if config.pipeline_parallel > 1:
            grid = init_device_mesh(config.device.split(":")[0], (size // heads, heads),
                                    mesh_dim_names=("stages", "heads"))
            return cls(rank, size, stage=rank // heads,
                       heads=RankGroup(rank % heads, heads, grid.get_group("heads")),
                       rings=tuple(tuple(range(first, size, heads)) for first in range(heads)))
        grid = init_device_mesh(config.device.split(":")[0], (rows, heads),
                                mesh_dim_names=("rows", "heads"))
        return cls(rank, size,
                   rows=RankGroup(rank // heads, rows, grid.get_group("rows")),
                   heads=RankGroup(rank % heads, heads, grid.get_group("heads")))
