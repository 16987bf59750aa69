"""Packing a step's tensors into one copy."""

from __future__ import annotations

import pytest
import torch

from longspan.attention.metadata import SequenceSlice, build_metadata
from longspan.attention.upload import ALIGNMENT, pack, unpack, upload

TENSORS = [torch.arange(5), torch.randn(3, 7), torch.empty(0, 4), torch.tensor(2.5),
           torch.arange(6, dtype=torch.int32).view(2, 3), torch.arange(12).view(3, 4).T]


def test_pieces_come_back_aligned() -> None:
    packed = pack(TENSORS)
    for piece, tensor in zip(unpack(packed, TENSORS), TENSORS, strict=True):
        assert torch.equal(piece, tensor) and piece.dtype == tensor.dtype
        assert (piece.data_ptr() - packed.data_ptr()) % ALIGNMENT == 0 or not piece.numel()


def test_on_a_cpu_nothing_is_copied() -> None:
    value = (TENSORS[0], 3)
    assert upload(value, "cpu") is value


@pytest.mark.gpu
def test_metadata_arrives_whole() -> None:
    """Every tensor of a step, and those shared by both views once."""
    slices = [
        SequenceSlice(query_len=6, cached_len=2, prompt_len=8, block_ids=[4, 3], num_outputs=1),
        SequenceSlice(query_len=1, cached_len=8, prompt_len=8, block_ids=[1, 0, 5], num_outputs=1)]
    here, there = (build_metadata(slices, block_size=4, head_dim=16, dca=None, device=device)
                   for device in ("cpu", "cuda"))
    assert there.output is not None and here.output is not None
    assert there.output.positions is there.positions
    for view, expected in ((there, here), (there.output, here.output)):
        assert torch.equal(view.slot_mapping.cpu(), expected.slot_mapping)
        assert torch.equal(view.filled_blocks.cpu(), expected.filled_blocks)
        assert torch.equal(view.prefills[0].block_table.cpu(), expected.prefills[0].block_table)
        assert view.prefills[0].scale == expected.prefills[0].scale
        assert view.decode is not None and expected.decode is not None
        assert torch.equal(view.decode.block_tables.cpu(), expected.decode.block_tables)
        assert torch.equal(view.decode.scales.cpu(), expected.decode.scales)
