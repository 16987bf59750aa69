"""Lengths and block ids to tensors; the softmax scale with the YaRN factor on the query side."""

from __future__ import annotations

import math

import pytest
import torch

from longspan.attention.metadata import (
    AttentionMetadata,
    SequenceSlice,
    build_metadata,
    softmax_scale,
    softmax_scales,
)
from longspan.config import DcaConfig
from longspan.ops import prefill_attention
from tests.conftest import assert_close
from tests.ops import oracle
from tests.ops.oracle import Positions

DCA = DcaConfig(chunk_size=64, local_size=16, original_max_position_embeddings=64)


def build(*slices: SequenceSlice, dca: DcaConfig | None = None) -> AttentionMetadata:
    return build_metadata(slices, block_size=4, head_dim=16, dca=dca, device="cpu")


def test_slots_and_positions_of_a_mixed_step() -> None:
    """A prompt's second piece, a whole prompt, two decodes: by eye."""
    metadata = build(
        SequenceSlice(query_len=5, cached_len=3, prompt_len=20, block_ids=[7, 2, 9]),
        SequenceSlice(query_len=2, cached_len=0, prompt_len=2, block_ids=[4], sparse=True),
        SequenceSlice(query_len=1, cached_len=8, prompt_len=8, block_ids=[1, 0, 5, 6]),
        SequenceSlice(query_len=1, cached_len=3, prompt_len=2, block_ids=[3]))
    assert metadata.positions.tolist() == [3, 4, 5, 6, 7, 0, 1, 8, 3]
    assert metadata.slot_mapping.tolist() == [31, 8, 9, 10, 11, 16, 17, 20, 15]
    first, second = metadata.prefills
    assert (first.start, first.cached_len, first.context_len) == (0, 3, 8)
    assert (second.start, second.query_len, second.sparse, first.sparse) == (5, 2, True, False)
    assert first.block_table.tolist() == [7, 2] and second.block_table.tolist() == [4]
    assert metadata.decode is not None and metadata.decode.start == 7
    assert metadata.decode.block_tables.tolist() == [[1, 0, 5], [3, 0, 0]]
    assert metadata.decode.context_lens.tolist() == [9, 4]
    assert metadata.filled_blocks.tolist() == [7, 2, 3]
    assert metadata.output_rows is None and metadata.output is None


def test_a_last_prompt_token_alone_is_prefill_not_decode() -> None:
    metadata = build(SequenceSlice(query_len=1, cached_len=5, prompt_len=6, block_ids=[0, 1]))
    assert metadata.decode is None and metadata.prefills[0].query_len == 1


def test_decodes_before_prefills_are_refused() -> None:
    decode = SequenceSlice(query_len=1, cached_len=4, prompt_len=4, block_ids=[0, 1])
    prefill = SequenceSlice(query_len=2, cached_len=0, prompt_len=2, block_ids=[2])
    with pytest.raises(AssertionError, match="prefill slices come before"):
        build(decode, prefill)


def test_output_view_keeps_the_wanted_rows() -> None:
    """All tokens are written, only wanted rows are queries, at their true positions."""
    metadata = build(
        SequenceSlice(query_len=5, cached_len=3, prompt_len=20, block_ids=[7, 2], num_outputs=0),
        SequenceSlice(query_len=6, cached_len=0, prompt_len=6, block_ids=[4, 3], num_outputs=2),
        SequenceSlice(query_len=1, cached_len=8, prompt_len=8, block_ids=[1, 0, 5], num_outputs=1))
    assert metadata.output_rows is not None and metadata.output is not None
    assert metadata.output_rows.tolist() == [9, 10, 11]
    view = metadata.output
    assert torch.equal(view.positions, metadata.positions)
    assert torch.equal(view.slot_mapping, metadata.slot_mapping)
    (prefill,) = view.prefills
    assert (prefill.start, prefill.query_len, prefill.cached_len) == (0, 2, 4)
    assert prefill.prompt_len == 6
    assert view.decode is not None and view.decode.start == 2
    assert view.decode.context_lens.tolist() == [9]


@pytest.mark.parametrize("trained", [0, 64, 262_144])
def test_scales_made_on_the_device_are_the_hosts(trained: int) -> None:
    """To the last bit of fp32."""
    dca = DcaConfig(chunk_size=64, local_size=16, original_max_position_embeddings=trained)
    lengths = torch.cat((torch.arange(200), torch.randint(200, 10**7, (5000,)),
                         torch.tensor([trained, trained + 1])))
    wanted = [softmax_scale(80, length, dca) for length in lengths.tolist()]
    assert torch.equal(softmax_scales(lengths, 80, dca), torch.tensor(wanted))
    assert torch.equal(softmax_scales(lengths, 80, None),
                       torch.full((len(lengths),), softmax_scale(80, 1, None)))


def test_scale_of_a_request_follows_its_longest_length() -> None:
    """All chunks of a prompt share the whole prompt's temperature; decoding grows it."""
    plain = 1 / math.sqrt(16)

    def yarn(length: int) -> float:
        return (0.1 * math.log(length / 64) + 1) ** 2 * plain

    chunks = [SequenceSlice(query_len=50, cached_len=start, prompt_len=200, block_ids=range(50))
              for start in (0, 50, 150)]
    assert [item.scale for item in build(*chunks, dca=DCA).prefills] == [yarn(200)] * 3
    assert build(chunks[0], dca=None).prefills[0].scale == plain
    short = SequenceSlice(query_len=64, cached_len=0, prompt_len=64, block_ids=range(16))
    assert build(short, dca=DCA).prefills[0].scale == plain
    decodes = [SequenceSlice(query_len=1, cached_len=cached, prompt_len=200, block_ids=range(80))
               for cached in (200, 299)]
    decode = build(*decodes, dca=DCA).decode
    assert decode is not None
    assert decode.scales.tolist() == pytest.approx([yarn(201), yarn(300)], rel=1e-6)


@pytest.mark.parametrize(("length", "temperature"), [
    (262_144, 1.0), (524_288, 1.0693), (1_000_000, 1.1339), (1_010_000, 1.1349)])
def test_released_scale(length: int, temperature: float) -> None:
    released = DcaConfig(chunk_size=262_144, local_size=8_192,
                         original_max_position_embeddings=262_144)
    assert softmax_scale(128, length, released) == pytest.approx(
        temperature**2 / math.sqrt(128), rel=2e-4)


def test_query_side_factor_equals_the_released_rule() -> None:
    """Released code multiplies cached keys by m and the softmax scale by m; ours multiplies the
    scale by m^2 and leaves the keys alone."""
    positions, length = Positions(64, 16), 200
    case = oracle.make_case(length, positions)
    m = 0.1 * math.log(length / 64) + 1
    scaled = case.cache._replace(k=case.cache.k * m)
    released = prefill_attention(
        case.q, scaled, case.block_table, 0, case.rotary, m / math.sqrt(16))
    ours = prefill_attention(
        case.q, case.cache, case.block_table, 0, case.rotary, softmax_scale(16, length, DCA))
    for actual, expected in zip(ours, released, strict=True):
        assert_close(actual, expected)
