"""Decode steps from CUDA graphs equal eager ones; what their fixed buffers hold."""

from __future__ import annotations

import random
from array import array

import pytest
import torch
from torch import Tensor

from longspan.attention.layer import allocate_cache
from longspan.attention.metadata import AttentionMetadata
from longspan.attention.rope import build_rotary
from longspan.config import DcaConfig, ModelConfig
from longspan.engine.batch import DeviceBatch, build_batch
from longspan.engine.graphs import BATCH_SIZES, DecodeBuffers, DecodeGraphs
from longspan.engine.step import RowSampling, ScheduledBatch, ScheduledSlice
from longspan.model import CausalLM, build_model, random_weights
from longspan.ops.sample import sample
from longspan.ops.types import PagedKV

BLOCK, MAX_LEN = 16, 400
DCA = DcaConfig(chunk_size=128, local_size=32, original_max_position_embeddings=128)
MODEL = ModelConfig(
    architecture="Qwen2ForCausalLM", vocab_size=101, hidden_size=128, intermediate_size=96,
    num_layers=2, num_heads=8, num_kv_heads=2, head_dim=16, rms_norm_eps=1e-6, rope_theta=1e4,
    max_position_embeddings=MAX_LEN, tie_word_embeddings=True, attention_bias=True, qk_norm=False)
GREEDY = RowSampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
WARM = RowSampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=7)


def decode_batch(lengths: list[int], rows: list[RowSampling], device: str) -> DeviceBatch:
    """One new token for each of some requests with this many tokens already; each has blocks of
    its own."""
    per_request = -(-MAX_LEN // BLOCK)
    slices = tuple(
        ScheduledSlice(
            request_id=str(index), token_ids=array("i", [index % 101]), cached_len=length,
            prompt_len=max(1, min(length, 5)), slot=index, sparse=False, sampling=row,
            block_ids=range(index * per_request, (index + 1) * per_request))
        for index, (length, row) in enumerate(zip(lengths, rows, strict=True)))
    return build_batch(ScheduledBatch(step_id=0, slices=slices), block_size=BLOCK,
                       head_dim=MODEL.head_dim, dca=DCA, device=device)


def test_a_smaller_batch_is_padded_with_rows_that_touch_nothing() -> None:
    """Nothing of the larger step before is left."""
    buffers = DecodeBuffers(8, 30, "cpu")
    buffers.load(decode_batch([9, 30, 15, 47], [WARM] * 4, "cpu"), 4)
    inputs = decode_batch([31, 7, 63], [WARM, GREEDY, WARM], "cpu")
    buffers.load(inputs, 8)
    metadata, rows = buffers.metadata(8), buffers.sampling(8)
    assert buffers.token_ids(8).tolist() == [0, 1, 2, 0, 0, 0, 0, 0]
    assert metadata.positions.tolist() == [31, 7, 63, 0, 0, 0, 0, 0]
    assert metadata.slot_mapping[:3].tolist() == inputs.metadata.slot_mapping.tolist()
    assert metadata.slot_mapping[3:].eq(-1).all()
    assert metadata.filled_blocks.tolist() == [1, 53, -1, -1, -1, -1, -1, -1]
    assert metadata.decode is not None and inputs.metadata.decode is not None
    assert metadata.decode.context_lens.tolist() == [32, 8, 64, 0, 0, 0, 0, 0]
    assert torch.equal(metadata.decode.scales[:3], inputs.metadata.decode.scales)
    tables = inputs.metadata.decode.block_tables
    assert torch.equal(metadata.decode.block_tables[:3, : tables.shape[1]], tables)
    assert rows.temperature.tolist() == pytest.approx([0.8, 0, 0.8, 0, 0, 0, 0, 0])
    assert rows.top_p.tolist() == pytest.approx([0.9, 1, 0.9, 1, 1, 1, 1, 1])
    for name in ("top_k", "seed", "position", "min_p"):
        assert torch.equal(getattr(rows, name)[:3], getattr(inputs.sampling, name)), name


def test_only_steps_of_decodes_are_taken() -> None:
    assert DecodeGraphs.takes(decode_batch([9] * BATCH_SIZES[-1], [GREEDY] * 64, "cpu"))
    assert not DecodeGraphs.takes(decode_batch([9] * 65, [GREEDY] * 65, "cpu"))
    assert not DecodeGraphs.takes(decode_batch([0], [GREEDY], "cpu"))  # a prompt of one token
    assert not DecodeGraphs.is_possible(
        PagedKV(torch.zeros(2, 16, 1, 16), torch.zeros(2, 16, 1, 16)), 1)


def make_model(num_requests: int) -> tuple[CausalLM, list[PagedKV]]:
    rotary = build_rotary(head_dim=MODEL.head_dim, rope_theta=MODEL.rope_theta,
                          max_model_len=MAX_LEN, dca=DCA, device="cuda")
    model = build_model(MODEL, layers=range(MODEL.num_layers), rotary=rotary, plan=None,
                        dtype=torch.bfloat16, device="cuda")
    random_weights(model, 0)
    for parameter in model.parameters():
        parameter.data.mul_(5)  # logits that differ
    caches = [
        allocate_cache(num_blocks=num_requests * -(-MAX_LEN // BLOCK), block_size=BLOCK,
                       num_kv_heads=MODEL.num_kv_heads, head_dim=MODEL.head_dim,
                       dtype=torch.bfloat16, device="cuda", sparse=True)
        for _ in range(MODEL.num_layers)]
    for cache in caches:
        for tensor in cache:
            assert tensor is not None
            tensor.normal_()
    return model, caches


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [[GREEDY], [GREEDY, WARM]], ids=["greedy", "mixed"])
def test_replay_equals_eager(kind: list[RowSampling]) -> None:
    """Sizes up and down, lengths from 1 over several DCA chunks; caches equal afterwards."""
    source = random.Random(0)
    with torch.inference_mode():
        model, caches = make_model(64)
        eager_caches = [PagedKV(*(None if x is None else x.clone() for x in cache))
                        for cache in caches]

        def forward(token_ids: Tensor, metadata: AttentionMetadata) -> Tensor:
            return model.logits(model(token_ids, metadata, caches))

        graphs = DecodeGraphs(forward, max_blocks=-(-MAX_LEN // BLOCK), device="cuda")
        assert DecodeGraphs.is_possible(caches[0], MODEL.num_heads)
        for count in (3, 1, 17, 64, 4, 2, 3, 33, 3):
            lengths = [source.randrange(1, MAX_LEN) for _ in range(count)]
            inputs = decode_batch(lengths, [source.choice(kind) for _ in lengths], "cuda")
            expected = model.logits(model(inputs.token_ids, inputs.metadata, eager_caches))
            output = graphs.run(inputs)
            torch.testing.assert_close(output.logits, expected, atol=0.05, rtol=0.05)
            chosen = sample(output.logits, inputs.sampling, all_greedy=inputs.all_greedy)
            assert torch.equal(output.token_ids, chosen)
        for cache, eager in zip(caches, eager_caches, strict=True):
            for part, expected_part in zip(cache, eager, strict=True):
                torch.testing.assert_close(part, expected_part, atol=0.05, rtol=0.05)


@pytest.mark.gpu
def test_steps_run_ahead_of_their_tokens() -> None:
    """A step's input tokens may be the output of one still queued, and the host never waits."""
    with torch.inference_mode():
        model, caches = make_model(2)

        def forward(token_ids: Tensor, metadata: AttentionMetadata) -> Tensor:
            return model.logits(model(token_ids, metadata, caches))

        first = torch.tensor([3, 5], device="cuda")

        def steps(graphs: DecodeGraphs | None) -> list[Tensor]:
            tokens, found = first, list[Tensor]()
            for length in range(40, 60):
                inputs = decode_batch([length, length + 100], [GREEDY, GREEDY], "cuda")
                inputs.token_ids.copy_(tokens)
                if graphs is None:
                    tokens = forward(inputs.token_ids, inputs.metadata).argmax(-1)
                else:
                    tokens = graphs.run(inputs).token_ids
                found.append(tokens)
            return found

        graphs = DecodeGraphs(forward, max_blocks=-(-MAX_LEN // BLOCK), device="cuda")
        expected = steps(None)
        steps(graphs)  # captured
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = steps(graphs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        # both wrote the same keys; random weights may bring near ties, so most must agree
        same = torch.stack(found) == torch.stack(expected)
        assert same.float().mean() > 0.9
