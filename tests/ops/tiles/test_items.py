"""Work items: their number on the host and on the device, and their merge."""

from __future__ import annotations

import math

import pytest
import torch

from longspan.ops.tiles.items import merge_items, num_items
from tests.conftest import assert_close


@pytest.mark.parametrize(("length", "capacity"), [
    (1, 1), (16, 7), (17, 7), (150, 4), (300, 1), (1_000, 7), (1_024, 33), (1_025, 64)])
def test_items_of_a_request_merge_to_the_whole(
    length: int, capacity: int, kernel_device: str
) -> None:
    """Exactly as many as the host says: NaN behind them, and each has its part of the softmax. The
    last one may hold nothing that a row sees."""
    count = num_items(-(-length // 16), capacity, 2)
    assert 1 <= count <= capacity
    scores, values = torch.randn(count, 3, 9) * 9, torch.randn(count, 3, 9, 16)
    if count > 1:
        scores[-1, 1] = -math.inf
    parts = torch.full((count + 2, 3, 16), math.nan, device=kernel_device)
    logs = torch.full((count + 2, 3), math.nan, device=kernel_device)
    parts[:count] = (scores.softmax(-1).nan_to_num(0.0)[..., None] * values).sum(-2)
    logs[:count] = scores.logsumexp(-1) / math.log(2)
    out = torch.empty(1, 3, 16, device=kernel_device)
    lse = torch.empty(1, 3, device=kernel_device)
    lens = torch.tensor([length], device=kernel_device)
    merge_items[(3, 1)](parts, logs, lens, out, lse, 3, 1, capacity, TILE=16, HEAD_DIM=16,
                        REQUESTS=1, MIN_TILES=2, ITEMS=4)
    every, every_value = scores.movedim(0, 1).flatten(1), values.movedim(0, 1).flatten(1, 2)
    expected = (every.softmax(-1)[..., None] * every_value).sum(-2)
    assert_close(out[0].cpu(), expected, "out")
    assert_close(lse[0].cpu(), every.logsumexp(-1), "lse")
