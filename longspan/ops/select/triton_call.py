"""What the kernels of one vertical-slash selection share: probe rows, keys, zones, budgets."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from longspan.ops.types import Budget, PagedKV


class Probes(NamedTuple):
    """Probe rows of one head, as the kernels take them."""

    last: int
    last_first: int
    last_step: int
    strided_first: int
    step: int
    num_rows: int


class Call(NamedTuple):
    """What all KV heads of one selection share."""

    queries: Tensor
    """[zones, H, RP, D] rotated probe rows, scale * log2(e) in them"""
    cache: PagedKV
    block_table: Tensor
    budget: Budget
    probes: Probes
    context_len: int
    inter_end: int
    """Key tiles [0, inter_end) are of the inter zone, those up to succ_end of the succ zone."""
    succ_end: int

    @property
    def padded_rows(self) -> int:
        """Rows of one head, those of padding included."""
        return self.queries.shape[2]

    @property
    def tile_len(self) -> int:
        """Tokens of a key tile, a KV block."""
        return self.cache.k.shape[1]

    @property
    def num_tiles(self) -> int:
        """Key tiles, the last one perhaps not full."""
        return -(-self.context_len // self.tile_len)

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.queries.shape[1]

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.num_heads // self.cache.k.shape[2]

    @property
    def max_columns(self) -> tuple[int, ...]:
        """Columns of each head, no more than there are keys."""
        return tuple(min(count, self.context_len) for count in self.budget.vertical)

    @property
    def mask_from(self) -> int:
        """The first key tile that is not wholly before every probe row."""
        first = self.probes.last_first
        if self.probes.num_rows > self.probes.last:
            first = min(first, self.probes.strided_first)
        return first // self.tile_len

    @property
    def zones(self) -> tuple[int, int, int, int]:
        """How many there are, all key tiles, and where the inter and the succ zone end."""
        return self.queries.shape[0], self.num_tiles, self.inter_end, self.succ_end


class Heads(NamedTuple):
    """Consecutive KV heads that are worked on together."""

    first: int
    number: int
