"""What attention ops take besides plain tensors: tensors, integers and floats, bundled.

Shape legend (docs/shapes.md): T query tokens, S key tokens, H query heads, K KV heads, D head dim,
N KV blocks, P tokens in one KV block (also the tile length of sparse attention), B requests.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FP8_BLOCK = 128
"""Rows and columns that share a scale in block-scaled e4m3 checkpoints."""


class PagedKV(NamedTuple):
    """One layer's KV cache. Keys are stored rotated at ``position mod stride``."""

    k: Tensor
    """[N, P, K, D]; on CPUs in bf16 where fp32 is computed in, too."""
    v: Tensor
    """[N, P, K, D]"""
    k_mean: Tensor | None = None
    """[N, K, D] mean key of each full block, for the mean correction; None: dense only."""
    v_mean: Tensor | None = None
    """[N, K, D]"""
    k_scale: Tensor | None = None
    """[N, K, P] fp32, where ``k`` and ``v`` are int8 (`longspan.ops.int8_kv`); None: they are of
    the type that is computed in."""
    v_scale: Tensor | None = None
    """[N, K, P] fp32"""
    k_gain: Tensor | None = None
    """[K, D] powers of two of the type that is computed in: a key is its numbers in ``k`` times its
    scale times these. Channels of one rotation have the same."""
    k_scratch: Tensor | None = None
    """[n, P, K, D] of the type that is computed in, where int8 keys of a request are written out;
    all layers share it."""
    v_scratch: Tensor | None = None
    """[n, P, K, D]"""

    @property
    def dtype(self) -> torch.dtype:
        """The type that is computed in."""
        return self.k.dtype if self.k_gain is None else self.k_gain.dtype

    def by_block(self) -> dict[str, Tensor]:
        """Return the parts that have a row for each block, by name, in a fixed order."""
        parts = {"k": self.k, "v": self.v, "k_mean": self.k_mean, "v_mean": self.v_mean,
                 "k_scale": self.k_scale, "v_scale": self.v_scale}
        return {name: part for name, part in parts.items() if part is not None}


class Fp8Weights(NamedTuple):
    """A matrix of e4m3 numbers, or several in a stack; y = x (values * scales)^T."""

    values: Tensor
    """[..., N, K] float8_e4m3fn"""
    scales: Tensor
    """[..., N, 1] fp32, one for each output; or [..., N / 128, K / 128], both rounded up, one for
    each block of 128 x 128."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the plain numbers."""
        return tuple(self.values.shape)

    @property
    def is_blocked(self) -> bool:
        """Scales are of blocks, not of outputs."""
        return self.scales.shape[-2:] != (self.values.shape[-2], 1)

    def dense(self) -> Tensor:
        """Return the plain numbers, fp32."""
        numbers = self.values.float()
        if not self.is_blocked:
            return numbers.mul_(self.scales)
        rows, columns = (size for size in numbers.shape[-2:])
        wide = self.scales.repeat_interleave(FP8_BLOCK, -1)[..., :columns]
        return numbers.mul_(wide.repeat_interleave(FP8_BLOCK, -2)[..., :rows, :])


INT4_TILE = 32
"""Columns whose nibbles lie together, see `Int4Weights`."""


class Fp8Rows(NamedTuple):
    """Activations as e4m3: T rows of K numbers, of P that are allocated."""

    values: Tensor
    """[P, K] float8_e4m3fn; rows from T on hold anything."""
    scales: Tensor
    """[P, 1] fp32, one for each row; or [P, K / 128], rounded up, one for each group of 128: then
    rows lie side by side."""
    num_rows: int
    """T"""


class Int4Weights(NamedTuple):
    """A matrix of numbers from 0 to 15, or several in a stack; G groups of a row's K numbers."""

    packed: Tensor
    """[..., N, K / 2] uint8. Of each 32 columns byte b holds column b in its low half and column
    16 + b in its high one."""
    scales: Tensor
    """[..., N, G] fp16"""
    zeros: Tensor
    """[..., N, G] uint8; a number q stands for (q - zero) * scale."""
    order: Tensor | None = None
    """[K] int32: which input each column multiplies; None: its own."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the plain numbers."""
        return (*self.packed.shape[:-1], 2 * self.packed.shape[-1])

    @property
    def group(self) -> int:
        """Numbers in a group."""
        return 2 * self.packed.shape[-1] // self.scales.shape[-1]

    def dense(self) -> Tensor:
        """Return the plain numbers, fp32, inputs in their own order."""
        pairs = self.packed.unflatten(-1, (-1, INT4_TILE // 2))
        whole = torch.cat((pairs & 15, pairs >> 4), -1).flatten(-2).float()
        groups = whole.unflatten(-1, (-1, self.group)) - self.zeros.float()[..., None]
        numbers = (groups * self.scales.float()[..., None]).flatten(-2)
        if self.order is None:
            return numbers
        return torch.empty_like(numbers).index_copy_(-1, self.order.long(), numbers)


Quantized = Fp8Weights | Int4Weights
Matrices = Tensor | Quantized
"""A matrix [N, K], or a stack [E, N, K] of them."""


def stacked(matrices: Quantized, index: int) -> Quantized:
    """Return one matrix of a stack."""
    if isinstance(matrices, Fp8Weights):
        return Fp8Weights(matrices.values[index], matrices.scales[index])
    return Int4Weights(matrices.packed[index], matrices.scales[index], matrices.zeros[index])


class QueryRotary(NamedTuple):
    """Rotations of Dual Chunk Attention. Plain RoPE is a stride beyond the longest context."""

    cos: Tensor
    """[R, D/2] fp32, row = rotated position, R >= min(context, clamp + 1)."""
    sin: Tensor
    """[R, D/2] fp32"""
    inv_freq: Tensor
    """[D/2] fp32"""
    stride: int
    """DCA chunk length s: chunk_size - local_size, tokens."""
    clamp: int
    """chunk_size: the largest query position of the succ zone, and the inter zone's."""


class Selection(NamedTuple):
    """What each head of one prefill segment attends to, all on the device.

    A query tile is P consecutive queries of the segment (in ``tile`` mode tiles lie at absolute
    multiples of P). In ``tile`` mode window w of a tile that starts at position t covers keys t +
    offset[w] ... t + offset[w] + P - 1. In ``paper`` mode an offset is a diagonal, 0 or less, and
    the tile's windows are what `reference.paper_windows` makes of all of them. Windows of a tile
    never overlap. Columns are single key positions, ascending, seen by every query of the segment.
    In ``tile`` mode each query tile may list further key tiles, all before it and none a window
    (see `scouts`). Columns inside a window or a listed tile are not counted twice.
    """

    columns: Tensor
    """[H, V] int64, padded with -1 at the end."""
    offsets: Tensor
    """[H, W] int64, descending, each below tile_len; padded with tile_len (no key) at the end.
    In ``tile`` mode multiples of tile_len, the first of them 0."""
    tile_len: int
    aligned: bool
    """Query tiles lie at absolute multiples of tile_len (``tile`` mode)."""
    max_columns: tuple[int, ...] | None = None
    """Most columns of each head, known to the host without a sync; None: V for every head."""
    tiles: Tensor | None = None
    """[H, n, X] int32: the key tiles that each of the segment's n query tiles lists, ascending,
    padded with -1 at the end; None: nowhere any."""
    first_tile: int = 0
    """The query tile that ``tiles[:, 0]`` belongs to."""
    scouts: Tensor | None = None
    """[H, R] the rows that found ``tiles``, ascending, from the segment's first query on."""
    near_tiles: int | None = None
    """Where dropped tiles take part as means: up to about so many tiles before the query's own each
    has its own mean, farther ones share one, `geometry.COARSE` together; None: all have their own.
    """


class KeySpans(NamedTuple):
    """Which keys of each of B requests are attended to, where they are not all."""

    first: Tensor
    """[B] int64, where a KV block begins."""
    length: Tensor
    """[B] int64, consecutive keys from there on; 0: none."""
    block_len: int = 0
    """Tokens of a whole block, where a cache holds some P of each alone; both numbers above then
    count keys that it holds. 0: it holds all of them."""
    block_start: int = 0
    """The first token of each block that it holds."""


class Budget(NamedTuple):
    """How much each head may keep, and how the pattern is estimated."""

    vertical: tuple[int, ...]
    """Columns for each head."""
    slash: tuple[int, ...]
    """Diagonals for each head, tokens; in tile mode ceil(slash / tile_len) tile diagonals."""
    mode: str
    """``paper`` or ``tile``."""
    probe_last: int
    """Probe queries at the end of the segment; in tile mode spread over its last tile."""
    probe_strided: int
    """Probe queries spread over the segment (tile mode)."""
    sink: int
    """First columns, always kept."""
    local: int
    """Most recent diagonals, always kept, tokens."""
    num_scouts: int = 0
    """Queries scored against every key for what they miss (tile mode), where there are a million
    keys; see `geometry.num_scouts`."""
    scout_threshold: float = 0.0
    """A scout's query tile lists a key tile where a logit exceeds the LSE of the scout's kept keys
    by more than this."""
    scout_tiles: int = 0
    """Most key tiles that a query tile lists."""
    near_len: int | None = None
    """As `Selection.near_tiles`, tokens."""
    most_scouts: int = 0
    """The most of them where there are fewer keys; at least ``num_scouts``."""
    recall: float = 0.0
    """Share of attention mass that each head should keep, by multiples of its budgets (`online`,
    tile mode); 0: the budgets as they are."""
