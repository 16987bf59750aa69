"""Keys of decodes that ranks share out: who reads what, and what becomes of the parts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from longspan.attention import shared_decode
from longspan.attention.metadata import SequenceSlice, build_metadata, decode_metadata
from longspan.attention.ranks import RankGroup, RowSharing
from longspan.attention.shared_decode import least_keys, share_keys
from longspan.ops import reference
from longspan.ops.types import PagedKV
from tests.engine.device.rank_threads import ThreadRanks
from tests.ops import oracle

BLOCK = 16


@pytest.fixture(params=[2, 3])
def ranks(request: pytest.FixtureRequest) -> Iterator[ThreadRanks]:
    threads = ThreadRanks(request.param)
    yield threads
    threads.close()


def sharing(group: RankGroup) -> RowSharing:
    return RowSharing(group, BLOCK, 1)


def test_each_key_is_one_ranks_and_blocks_stay_whole() -> None:
    lens = torch.tensor([0, 1, 15, 16, 17, 400, 1037])
    for size in (1, 2, 3, 8):
        before = torch.zeros_like(lens)
        for rank in range(size):
            _, (first, length, *whole) = share_keys(sharing(RankGroup(rank, size)), lens, BLOCK)
            assert whole == [0, 0]
            assert torch.equal(first, before) and (first[length > 0] % BLOCK == 0).all()
            blocks = -(-lens // BLOCK)
            assert (-(-length // BLOCK) <= -(-blocks // size)).all()
            before = first + length
        assert torch.equal(before, lens)


def test_steps_that_see_few_keys_are_computed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PagedKV(*(torch.zeros(4, BLOCK, 2, 8) for _ in range(2)))
    monkeypatch.setitem(shared_decode.LEAST_BYTES, "cpu", 1000 * 2 * 2 * 8 * 4)
    assert least_keys(cache) == 1000
    some = RowSharing(RankGroup(1, 2), BLOCK, least_keys(cache))
    for lens, is_shared in (
            ([999], False), ([1000], True), ([600, 300], False), ([700, 300], True)):
        found = build_metadata(
            [SequenceSlice(query_len=1, cached_len=length - 1, prompt_len=3,
                           block_ids=range(100)) for length in lens],
            block_size=BLOCK, head_dim=8, dca=None, device="cpu", sharing=some).decode
        assert found is not None and (found.share is not None) is is_shared
        on_device = decode_metadata(
            found.block_tables, found.context_lens, found.context_lens, block_size=BLOCK,
            head_dim=8, dca=None, sharing=some).decode
        assert on_device is not None and on_device.share is not None
        if found.share is not None:
            for one, other in zip(found.share.spans[:2], on_device.share.spans[:2], strict=True):
                assert torch.equal(one, other)


def test_what_ranks_find_is_merged_to_the_whole(ranks: ThreadRanks) -> None:
    """The same to the bit on every rank; a row of padding, which has no key, gives 0."""
    positions = oracle.Positions(100, 37)
    case = oracle.make_case(300, positions, num_heads=4, num_kv_heads=2, block_size=BLOCK)
    lens = torch.tensor([300, 40])
    args = (case.q[-2:], case.cache, case.block_table.expand(2, -1), lens, case.rotary,
            torch.tensor([0.2, 0.3]))

    def attend(rank: int) -> torch.Tensor:
        share = share_keys(sharing(ranks.groups[rank]), lens, BLOCK)
        out, lse = reference.decode_attention(*args, share.spans)
        padded = torch.cat((out, torch.zeros(1, 4, 16))), torch.cat(
            (lse, torch.full((1, 4), -torch.inf)))
        return share.merge(*padded, torch.float32)

    found = ranks.run(attend)
    expected, _ = reference.decode_attention(*args)
    torch.testing.assert_close(found[0][:2], expected, rtol=1e-5, atol=1e-6)
    assert found[0][2].eq(0).all()
    assert all(torch.equal(one, found[0]) for one in found)
