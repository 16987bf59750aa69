"""Where a rank stands among the others: which ones share rows with it, and which ones heads.

Ranks are numbered with those that share heads side by side, for they exchange most, then those that
share rows; a stage's ranks are neighbours. With several kinds of sharing each kind has groups of
its own (torch.distributed's device mesh).
"""

from __future__ import annotations

from typing import NamedTuple

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh

from longspan.attention.ranks import RankGroup
from longspan.attention.spare_sms import EXCHANGE_SMS
from longspan.config import EngineConfig


def exchange_sms(config: EngineConfig) -> int:
    """Return how many SMs NCCL may take where ranks only share rows, and exchange keys and queries
    beside matrix products; 0: as many as it likes, for sums of all activations wait for it."""
    only_rows = config.num_ranks == config.context_parallel > 1
    return EXCHANGE_SMS if only_rows and config.device != "cpu" else 0


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
    """Ranks through which rows of activations pass, in order: one ring for each rank of a stage, of
    ranks that have the same rows and heads."""

    @property
    def ring(self) -> tuple[int, ...]:
        """The ring that this rank is in."""
        return next(ring for ring in self.rings if self.rank in ring)

    @classmethod
    def join(cls, rank: int, config: EngineConfig) -> RankMesh:
        """Make the groups of a rank, where torch.distributed is set up; on all ranks at a time."""
        size, rows, heads = config.num_ranks, config.context_parallel, config.tensor_parallel
        stages, own = config.pipeline_parallel, rows * heads
        sizes = {name: count for name, count in
                 (("stages", stages), ("rows", rows), ("heads", heads)) if count > 1}
        groups = dict[str, ProcessGroup | None]()
        if len(sizes) > 1:  # with one kind of sharing its group is the default one
            assert config.device is not None
            grid = init_device_mesh(config.device.split(":")[0], tuple(sizes.values()),
                                    mesh_dim_names=tuple(sizes))
            groups = {name: grid.get_group(name) for name in sizes}
        return cls(
            rank, size, stage=rank // own,
            rows=RankGroup(rank // heads % rows, rows, groups.get("rows"),
                           num_sms=exchange_sms(config)) if rows > 1 else None,
            heads=RankGroup(rank % heads, heads, groups.get("heads")) if heads > 1 else None,
            rings=tuple(tuple(range(first, size, own)) for first in range(own)))
