"""Blocks packed and unpacked by one kernel: every byte of every row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longspan.ops.block_rows import RowTable, pack_blocks, row_table, unpack_blocks

BLOCKS = 9


def tensors(device: str, widths: list[int]) -> tuple[list[Tensor], RowTable, int]:
    """Rows of different numbers, as bytes, with the table of them."""
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(0, 256, (BLOCKS, width), generator=generator, dtype=torch.uint8)
            .to(device) for width in widths]
    starts = [sum(widths[:index]) for index in range(len(widths))]
    return rows, row_table(rows, starts, sum(widths)), sum(widths)


@pytest.mark.parametrize(("widths", "word", "align"), [
    ([48, 16, 32_784], torch.int64, 16), ([24, 8, 16_392], torch.int64, 8),
    ([7, 12, 2_049], torch.uint8, 1)])
def test_blocks_are_packed_row_by_row_and_unpacked_again(
    kernel_device: str, widths: list[int], word: torch.dtype, align: int,
) -> None:
    rows, table, num_bytes = tensors(kernel_device, widths)
    assert (table.word, table.align) == (word, align)
    blocks, back = ([4, 0, 8], [2, 8, 5])
    packed = torch.zeros(3, num_bytes, dtype=torch.uint8, device=kernel_device)
    pack_blocks(table, torch.tensor(blocks, device=kernel_device), packed)
    wanted = torch.cat([row[blocks] for row in rows], 1)
    assert torch.equal(packed, wanted)
    before = [row.clone() for row in rows]
    unpack_blocks(table, torch.tensor(back, device=kernel_device), packed)
    for row, old in zip(rows, before, strict=True):
        old[back] = old[blocks]
        assert torch.equal(row, old), "the others stay as they were"
    unpack_blocks(table, torch.tensor([], dtype=torch.int64, device=kernel_device), packed[:0])
