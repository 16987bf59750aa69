"""KV blocks packed into one piece of memory each, and unpacked again (Triton).

A block's rows lie in as many tensors as there are parts and layers: 112 where a model has 28 layers
and tile means. One launch moves all rows of some blocks; a launch for each tensor takes a host
longer than a link takes for the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2_048
"""Words that a program moves at a time."""


class RowTable(NamedTuple):
    """The tensors that hold blocks, and the place of each one's row in a packed block."""

    addresses: Tensor
    """[E] int64: where each tensor's block 0 begins."""
    lengths: Tensor
    """[E] int64: words of one block."""
    starts: Tensor
    """[E] int64: first word in a packed block."""
    block_words: int
    """Words of a packed block."""
    word: torch.dtype
    align: int
    """All of these are multiples of so many bytes."""


def row_table(rows: Sequence[Tensor], starts: Sequence[int], block_bytes: int) -> RowTable:
    """Describe tensors on one device. They must outlive the table.

    Args:
        rows: each [N, words], contiguous.
        starts: the first byte of each one's row in a packed block.
    """
    lengths = [row.shape[1] * row.element_size() for row in rows]
    addresses = [row.data_ptr() for row in rows]
    assert all(row.is_contiguous() for row in rows)
    numbers = [*addresses, *lengths, *starts, block_bytes]
    align = next(size for size in (16, 8, 1) if not any(number % size for number in numbers))
    word_bytes = min(8, align)
    device = rows[0].device

    def column(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return RowTable(
        column(addresses), column([length // word_bytes for length in lengths]),
        column([start // word_bytes for start in starts]), block_bytes // word_bytes,
        torch.int64 if word_bytes == 8 else torch.uint8, align)


def pack_blocks(table: RowTable, blocks: Tensor, packed: Tensor) -> None:
    """Copy blocks out of their tensors.

    Args:
        blocks: [n] int64.
        packed: [n, block_bytes] uint8, on the device of the tensors.
    """
    _launch(table, blocks, packed, to_tensors=False)


def unpack_blocks(table: RowTable, blocks: Tensor, packed: Tensor) -> None:
    """Copy packed blocks into their tensors; see `pack_blocks`."""
    _launch(table, blocks, packed, to_tensors=True)


def _launch(table: RowTable, blocks: Tensor, packed: Tensor, *, to_tensors: bool) -> None:
    assert packed.is_contiguous() and len(packed) == len(blocks)
    words = packed.view(table.word)
    if len(blocks):
        _move_rows[(len(blocks), len(table.addresses))](
            table.addresses, table.lengths, table.starts, blocks, words, table.block_words,
            TO_TENSORS=to_tensors, ALIGN=table.align, ALIGN_WORDS=table.align // words.itemsize,
            TILE=TILE, num_warps=8)


@triton.jit(do_not_specialize_on_alignment=["blocks"])
def _move_rows(
    addresses, lengths, starts, blocks, packed, block_words, TO_TENSORS: tl.constexpr,
    ALIGN: tl.constexpr, ALIGN_WORDS: tl.constexpr, TILE: tl.constexpr,
):
    """One program for each block and tensor."""
    index, entry = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.multiple_of(tl.load(lengths + entry), ALIGN_WORDS)
    block = tl.load(blocks + index).to(tl.int64)
    row = tl.multiple_of(tl.load(addresses + entry).to(packed.dtype), ALIGN) + block * length
    there = packed + index * block_words + tl.multiple_of(tl.load(starts + entry), ALIGN_WORDS)
    for first in range(0, length, TILE):
        places = first + tl.arange(0, TILE)
        mask = places < length
        if TO_TENSORS:
            tl.store(row + places, tl.load(there + places, mask=mask), mask=mask)
        else:
            tl.store(there + places, tl.load(row + places, mask=mask), mask=mask)
