"""What can be watched of attention while it prefills: for calibration, quality and benchmarks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from longspan import ops
from longspan.attention.metadata import PrefillSlice
from longspan.ops.types import PagedKV, QueryRotary, Selection

Region = Literal["selection", "sparse", "dense"]
"""Choosing keys, attending to the chosen ones, attending to all."""
UNWATCHED = nullcontext()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AttendedRows:
    """Consecutive queries of one prefill slice that have attended alike, in one layer."""

    layer_idx: int
    q: Tensor
    """[n, H, D] not rotated, at positions ``start`` ... ``start`` + n - 1."""
    start: int
    cache: PagedKV
    item: PrefillSlice
    rotary: QueryRotary
    selection: Selection | None
    """None: they attended to everything."""
    correction: bool
    """Tile means stood for the keys that were not selected."""
    lse: Tensor
    """[n, H] fp32, tile means included."""

    def full_lse(self) -> Tensor:
        """Return the LSE over all keys, [n, H] fp32, by dense attention."""
        if self.selection is None:
            return self.lse
        return ops.prefill_attention(*self._args())[1]

    def kept_lse(self) -> Tensor:
        """Return the LSE over the selected keys alone, [n, H] fp32: tile means are no keys."""
        if self.selection is None or not self.correction:
            return self.lse
        return ops.sparse_prefill_attention(*self._args(), self.selection, False)[1]

    def part(self, start: int, stop: int) -> AttendedRows:
        """Return the rows at positions ``start`` ... ``stop`` - 1 of these; in tile mode whole
        tiles."""
        rows = slice(start - self.start, stop - self.start)
        return replace(self, q=self.q[rows], lse=self.lse[rows], start=start)

    def output_error(self) -> Tensor:
        """Return how far each output is from that of dense attention of the same queries, keys and
        values, as a share of the latter's length: [n, H] fp32."""
        if self.selection is None:
            return torch.zeros_like(self.lse)
        full = ops.prefill_attention(*self._args())[0].float()
        own = ops.sparse_prefill_attention(*self._args(), self.selection, self.correction)[0]
        size = torch.linalg.vector_norm(full, dim=-1).clamp_min(1e-20)
        return torch.linalg.vector_norm(own.float() - full, dim=-1) / size

    def recall(self) -> Tensor:
        """Return the share of each query's attention mass that its selection keeps, [n, H] fp32."""
        return torch.exp(self.kept_lse() - self.full_lse())

    def _args(self) -> tuple[Tensor, PagedKV, Tensor, int, QueryRotary, float]:
        """Return the arguments as the attention ops take them."""
        return (self.q, self.cache, self.item.block_table, self.start, self.rotary,
                self.item.scale)


class AttentionObserver:
    """Told what prefill does, layer by layer; this one does not listen. A subclass overrides what
    it is interested in: it runs in the middle of the pass and must change nothing. Decode is not
    observed."""

    def region(self, name: Region) -> AbstractContextManager[None]:
        """Return a context that is entered around each call of an op, for timing."""
        return UNWATCHED

    def attended(self, rows: AttendedRows) -> None:
        """Observe one call of dense or sparse attention, after it and outside of its region."""
