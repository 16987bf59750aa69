"""Parts of the keys merged by the kernel and in PyTorch: together they are the whole."""

from __future__ import annotations

import math

import pytest
import torch

from longspan import ops
from longspan.ops.tiles.splits import merge_splits
from tests.conftest import assert_close


@pytest.mark.parametrize(("num_parts", "num_rows", "num_heads"), [(2, 1, 28), (3, 7, 5), (1, 3, 2)])
@pytest.mark.parametrize("gap", [0, 13], ids=["side by side", "apart"])
def test_parts_merge_to_the_whole(
    num_parts: int, num_rows: int, num_heads: int, gap: int, kernel_device: str,
) -> None:
    """Apart as ranks' parts are, each with its LSEs behind it, at any alignment; with parts that
    have no key of a row, and rows that no part has a key of."""
    scores = torch.randn(num_parts, num_rows, num_heads, 9) * 30
    values = torch.randn(num_parts, num_rows, num_heads, 9, 16)
    scores[0, -1], scores[:, 0, 1] = -math.inf, -math.inf
    lses = scores.logsumexp(-1)
    parts = (scores.softmax(-1).nan_to_num(0.0)[..., None] * values).sum(-2)
    every, all_values = scores.movedim(0, -2).flatten(-2), values.movedim(0, -3).flatten(-3, -2)
    expected = (every.double().softmax(-1).nan_to_num(0.0)[..., None] * all_values).sum(-2)
    expected_lse = every.double().logsumexp(-1)
    packed = torch.full((num_parts, parts[0].numel() + lses[0].numel() + gap), math.nan)
    packed[:, : parts[0].numel()] = parts.flatten(1)
    packed[:, parts[0].numel() :][:, : lses[0].numel()] = lses.flatten(1)
    packed = packed.to(kernel_device)
    own = (packed[:, : parts[0].numel()].unflatten(1, parts.shape[1:]) if gap
           else parts.to(kernel_device),
           packed[:, parts[0].numel() :][:, : lses[0].numel()].unflatten(1, lses.shape[1:]) if gap
           else lses.to(kernel_device))
    for merge in (merge_splits, ops.merge_parts):
        out, lse = merge(*own, torch.float32)
        assert_close(out.cpu(), expected.float(), "out")
        assert_close(lse.cpu(), expected_lse.float(), "lse")
        assert (out.cpu()[0, 1] == 0).all() and (lse.cpu()[0, 1] == -math.inf).all()
