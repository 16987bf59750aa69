"""Work items: their number on the host and on the device, and their merge."""

from __future__ import annotations

import math

import pytest
import torch

from longspan.ops.tiles.items import merge_items, merge_shares, num_items
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


@pytest.mark.parametrize("programs", [1, 2, 7, 33, 66])
@pytest.mark.parametrize("lengths", [(1,), (150,), (16, 0, 900, 17), (0, 0, 5), (40,) * 9], ids=str)
def test_shares_of_all_requests_merge_to_the_whole(
    lengths: tuple[int, ...], programs: int, kernel_device: str
) -> None:
    """Shares as they are defined, two parts of each for each request that it meets: NaN in every
    other part, requests without a key among others."""
    tiles = [-(-length // 16) for length in lengths]
    total = sum(tiles)
    used = -(-total // max(-(-total // programs), 2))
    parts = torch.full((2 * (programs + len(lengths)), 3, 16), math.nan)
    logs = torch.full(parts.shape[:2], math.nan)
    expected, expected_lse = torch.zeros(len(lengths), 3, 16), torch.full((len(lengths), 3), -1e9)
    begin = 0
    for request, count in enumerate(tiles):
        scores, values = torch.randn(3, 2 * count) * 9, torch.randn(3, 2 * count, 16)
        if count:
            expected[request] = (scores.softmax(-1)[..., None] * values).sum(1)
            expected_lse[request] = scores.logsumexp(-1)
        for share in range(used):
            start = max(total * share // used - begin, 0)
            stop = min(total * (share + 1) // used - begin, count)
            assert total * share // used < total * (share + 1) // used
            for half in range(2 if start < stop else 0):
                own = scores[:, 2 * start + half : 2 * stop : 2]
                part = (own.softmax(-1)[..., None]
                        * values[:, 2 * start + half : 2 * stop : 2]).sum(1)
                place = 2 * (share + request) + half
                assert parts[place].isnan().all()
                parts[place], logs[place] = part, own.logsumexp(-1) / math.log(2)
        begin += count
    out, lse = (torch.empty(size, device=kernel_device)
                for size in ((len(lengths), 3, 16), (len(lengths), 3)))
    merge_shares[(3, len(lengths))](
        parts.to(kernel_device), logs.to(kernel_device),
        torch.tensor(lengths, device=kernel_device), out, lse, 3, len(lengths), programs, TILE=16,
        HEAD_DIM=16, REQUESTS=16, MIN_TILES=2, PARTS=2, ITEMS=4)
    assert_close(out.cpu(), expected, "out")
    assert_close(lse.cpu().clamp(min=-1e9), expected_lse, "lse")
