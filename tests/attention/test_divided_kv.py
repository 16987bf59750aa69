"""A cache whose blocks ranks divide: who holds which slots, and what is collected."""

from __future__ import annotations

import torch

from longspan.attention.divided_kv import collect, held_keys, held_slots
from longspan.attention.metadata import SequenceSlice, build_metadata, decode_metadata
from longspan.attention.ranks import RankGroup, RowSharing
from longspan.ops.types import PagedKV
from tests.engine.device.rank_threads import ThreadRanks

BLOCK = 16


def test_every_slot_is_one_ranks() -> None:
    slots = torch.cat((torch.arange(5 * BLOCK), torch.tensor([-1])))
    for size in (2, 4, 8):
        found = [held_slots(slots, BLOCK, RankGroup(rank, size)) for rank in range(size)]
        assert torch.equal((torch.stack(found) >= 0).sum(0), (slots >= 0).long())
        for places in found:
            assert torch.equal(places[places >= 0], torch.arange(5 * BLOCK // size))


def test_keys_are_counted_where_they_are() -> None:
    lens = torch.tensor([0, 1, 3, 4, 5, 16, 17, 29, 1037])
    for size in (2, 4):
        spans = [held_keys(lens, BLOCK, RankGroup(rank, size)) for rank in range(size)]
        assert torch.equal(torch.stack([span.length for span in spans]).sum(0), lens)
        for rank, span in enumerate(spans):
            here = [int((held_slots(torch.arange(length), BLOCK, RankGroup(rank, size)) >= 0).sum())
                    for length in lens.tolist()]
            assert span.length.tolist() == here and not span.first.any()
            assert span[2:] == (BLOCK, rank * BLOCK // size)


def test_what_is_collected_is_the_whole() -> None:
    """In the table's order, with the means of whole blocks, in the cache's type."""
    ranks = ThreadRanks(4)
    k, v = (torch.randn(6, BLOCK, 2, 8).bfloat16() for _ in range(2))
    table = torch.tensor([4, 0, 5])

    def whole(rank: int) -> tuple[PagedKV, torch.Tensor]:
        part = slice(4 * rank, 4 * rank + 4)
        return collect(ranks.groups[rank], PagedKV(k[:, part], v[:, part]), table, means=True)

    for cache, places in ranks.run(whole):
        assert torch.equal(cache.k[places], k[table]) and torch.equal(cache.v[places], v[table])
        for mean, x in ((cache.k_mean, k), (cache.v_mean, v)):
            assert mean is not None and torch.equal(mean, x[table].float().mean(1).bfloat16())
    ranks.close()


def test_slots_of_a_step_are_those_that_a_rank_holds() -> None:
    """Prompts and decodes, from the host and on the device."""
    sharing = RowSharing(RankGroup(1, 2), BLOCK, 10**9, divides_kv=True)
    parts = [SequenceSlice(query_len=20, cached_len=6, prompt_len=26, block_ids=(3, 1)),
             SequenceSlice(query_len=1, cached_len=29, prompt_len=4, block_ids=(2, 5)),
             SequenceSlice(query_len=1, cached_len=16, prompt_len=4, block_ids=(2, 5))]
    found = build_metadata(
        parts, block_size=BLOCK, head_dim=8, dca=None, device="cpu", sharing=sharing)
    expected = [3 * 8 + position - 8 if 8 <= position < 16 else
                8 + position - 24 if position >= 24 else -1 for position in range(6, 26)]
    assert found.slot_mapping.tolist() == [*expected, 5 * 8 + 29 - 24, -1]
    assert found.decode is not None and found.decode.share is not None  # however few keys
    spans = found.decode.share.spans
    assert spans.length.tolist() == [14, 8] and found.prefills[0].share is not None
    on_device = decode_metadata(
        found.decode.block_tables, found.decode.context_lens, found.decode.context_lens,
        block_size=BLOCK, head_dim=8, dca=None, sharing=sharing)
    assert on_device.slot_mapping.tolist() == found.slot_mapping[20:].tolist()
