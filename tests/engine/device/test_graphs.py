"""Decode steps from CUDA graphs equal eager ones; what their buffers hold moves on by itself."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from longspan.attention.cache import allocate_cache
from longspan.attention.metadata import AttentionMetadata
from longspan.attention.ranks import RankGroup, RowSharing
from longspan.attention.rope import build_rotary
from longspan.config import DcaConfig, ModelConfig
from longspan.engine.device.batch import DeviceBatch, build_batch
from longspan.engine.device.graphs import (
    BATCH_SIZES,
    Compute,
    CudaRecorder,
    DecodeGraphs,
    DecodeState,
)
from longspan.engine.step import RowSampling, ScheduledBatch, ScheduledSlice
from longspan.model import CausalLM, build_model, random_weights
from longspan.ops.sampling.sample import sample
from longspan.ops.types import PagedKV
from tests.gpu.syncs import no_syncs

BLOCK, MAX_LEN, NUM_SLOTS = 16, 400, 64
TABLE_LEN = -(-MAX_LEN // BLOCK)
DCA = DcaConfig(chunk_size=128, local_size=32, original_max_position_embeddings=128)
MODEL = ModelConfig(
    architecture="Qwen2ForCausalLM", vocab_size=101, hidden_size=128, intermediate_size=96,
    num_layers=2, num_heads=8, num_kv_heads=2, head_dim=16, rms_norm_eps=1e-6, rope_theta=1e4,
    max_position_embeddings=MAX_LEN, tie_word_embeddings=True, attention_bias=True, qk_norm=False)
GREEDY = RowSampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
WARM = RowSampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=7)


@dataclass(kw_only=True)
class Decoding:
    """A request that decodes, in a slot with blocks of its own."""

    request_id: str
    slot: int
    length: int
    """Tokens before the next step."""
    sampling: RowSampling
    prompt_len: int
    blocks: list[int] = field(default_factory=list)

    def slice(self, token: int | None = None) -> ScheduledSlice:
        """Its part of the next step; None: run ahead."""
        return ScheduledSlice(
            request_id=self.request_id, token_ids=array("i", [] if token is None else [token]),
            cached_len=self.length, prompt_len=self.prompt_len, slot=self.slot, sparse=False,
            block_ids=self.blocks, sampling=self.sampling)


def decodings(lengths: list[int], rows: list[RowSampling]) -> list[Decoding]:
    """Requests with so many tokens."""
    return [Decoding(
        request_id=str(index), slot=index, length=length, prompt_len=max(1, min(length, 5)),
        sampling=row, blocks=list(range(index * TABLE_LEN, (index + 1) * TABLE_LEN)))
        for index, (length, row) in enumerate(zip(lengths, rows, strict=True))]


def make_state(device: str = "cpu") -> tuple[DecodeState, Tensor]:
    """Buffers, and the tokens sampled last."""
    last_tokens = torch.zeros(NUM_SLOTS + 1, dtype=torch.int64, device=device)
    return DecodeState(last_tokens, max_blocks=TABLE_LEN, block_size=BLOCK,
                       head_dim=MODEL.head_dim, dca=DCA), last_tokens


def on_the_host(items: list[ScheduledSlice], last_tokens: Tensor) -> DeviceBatch:
    """The same step as eager ones are built."""
    return build_batch(
        ScheduledBatch(step_id=0, slices=tuple(items)), block_size=BLOCK,
        head_dim=MODEL.head_dim, dca=DCA, device=last_tokens.device, last_tokens=last_tokens)


def check_inputs(state: DecodeState, items: list[ScheduledSlice], size: int, last: Tensor) -> None:
    """What the next step reads: exactly what the host would build, then padding."""
    wanted, count = on_the_host(items, last), len(items)
    metadata, rows = state.metadata(size), state.sampling(size)
    group, wanted_group = metadata.decode, wanted.metadata.decode
    assert group is not None and wanted_group is not None
    pairs = [
        (state.token_ids(size), wanted.token_ids), (state.slots(size), wanted.slots),
        (metadata.positions, wanted.metadata.positions),
        (metadata.slot_mapping, wanted.metadata.slot_mapping),
        (group.context_lens, wanted_group.context_lens), (group.scales, wanted_group.scales),
        *zip(rows, wanted.sampling, strict=True)]
    for found, expected in pairs:
        assert found.shape == (size,) and found.dtype == expected.dtype
        assert torch.equal(found[:count], expected)
    filled = metadata.filled_blocks
    assert filled[filled >= 0].tolist() == wanted.metadata.filled_blocks.tolist()
    width = wanted_group.block_tables.shape[1]
    for index, item in enumerate(items):
        used = -(-item.context_len // BLOCK)
        assert group.block_tables[index, :used].tolist() == \
            wanted_group.block_tables[index, :used].tolist() and used <= width
    assert not group.context_lens[count:].any()
    assert metadata.slot_mapping[count:].eq(-1).all() and filled[count:].eq(-1).all()
    assert state.slots(size)[count:].eq(NUM_SLOTS).all()
    assert torch.isfinite(group.scales).all()


def test_a_smaller_batch_is_padded_with_rows_that_touch_nothing() -> None:
    """Nothing of the larger step before is left."""
    state, last_tokens = make_state()
    last_tokens[:4] = torch.arange(4)
    state.load([d.slice() for d in decodings([9, 30, 15, 47], [WARM] * 4)], 4)
    items = [d.slice() for d in decodings([31, 7, 63], [WARM, GREEDY, WARM])]
    state.load(items, 8)
    check_inputs(state, items, 8, last_tokens)
    metadata, rows = state.metadata(8), state.sampling(8)
    assert state.token_ids(8).tolist() == [0, 1, 2, 0, 0, 0, 0, 0]
    assert metadata.positions.tolist() == [31, 7, 63, 0, 0, 0, 0, 0]
    assert metadata.filled_blocks.tolist() == [1, -1, 53, -1, -1, -1, -1, -1]
    assert rows.temperature.tolist() == pytest.approx([0.8, 0, 0.8, 0, 0, 0, 0, 0])
    assert rows.top_p.tolist() == pytest.approx([0.9, 1, 0.9, 1, 1, 1, 1, 1])


@pytest.mark.parametrize("seed", range(3))
def test_buffers_that_moved_on_equal_buffers_that_were_loaded(seed: int) -> None:
    """Blocks fill, lengths pass the trained one; tokens are what the last step sampled."""
    source, steps = random.Random(seed), 150
    count = source.randrange(1, 8)
    state, last_tokens = make_state()
    requests = decodings([source.randrange(1, MAX_LEN - steps) for _ in range(count)],
                         [source.choice([GREEDY, WARM]) for _ in range(count)])
    for request in requests:
        request.prompt_len = source.randrange(1, request.length + 1)
        source.shuffle(request.blocks)
    state.load([request.slice() for request in requests], 8)
    for _ in range(steps):
        check_inputs(state, [request.slice() for request in requests], 8, last_tokens)
        state.advance(8, torch.tensor([source.randrange(101) for _ in range(8)]))
        for request in requests:
            request.length += 1
    assert any(request.length > 128 for request in requests)


class CountingState(DecodeState):
    """Knows how often it was loaded."""

    num_loads = 0

    def load(self, items: list[ScheduledSlice], size: int) -> None:  # type: ignore[override]
        """Load, and count."""
        self.num_loads += 1
        super().load(items, size)


def recorded() -> tuple[DecodeGraphs, CountingState, Tensor, list[tuple[int, list[int]]]]:
    """Graphs that are no graphs, over a model whose logits name (input + position) mod V; and the
    rows and input tokens of each step that it computed."""
    last_tokens = torch.zeros(NUM_SLOTS + 1, dtype=torch.int64)
    state = CountingState(last_tokens, max_blocks=TABLE_LEN, block_size=BLOCK, head_dim=16, dca=DCA)
    seen = list[tuple[int, list[int]]]()

    def forward(token_ids: Tensor, metadata: AttentionMetadata) -> Tensor:
        seen.append((len(token_ids), token_ids.tolist()))
        return torch.eye(101)[(token_ids + metadata.positions) % 101]

    return DecodeGraphs(forward, state, lambda step: step), state, last_tokens, seen


def run(graphs: DecodeGraphs, *items: ScheduledSlice) -> list[int]:
    """A step's tokens."""
    graphs.prepare(items)
    return graphs.run().head(len(items)).token_ids.tolist()


def test_a_step_further_is_no_load() -> None:
    graphs, state, last, seen = recorded()
    first, second = decodings([9, 20], [GREEDY, GREEDY])
    assert run(graphs, first.slice(3), second.slice(4)) == [12, 24]
    first.length, second.length = 10, 21
    assert run(graphs, first.slice(), second.slice()) == [22, 45]
    first.length, second.length = 11, 22
    last[0] = 50  # a sampler had another opinion
    assert run(graphs, first.slice(), second.slice(60)) == [61, 82]
    assert (state.num_loads, len(seen), last[:2].tolist()) == (1, 3, [61, 82])


class Agreeing(RankGroup):
    """The first rank has sampled the same."""

    def of_first(self, x: Tensor) -> Tensor:
        """Return what is here."""
        return x


def test_a_step_that_sees_many_keys_has_a_graph_of_its_own() -> None:
    """Chosen where rows are loaded, by what all of them see; with one rank there is no choice."""
    shared = list[bool]()

    def forward(token_ids: Tensor, metadata: AttentionMetadata) -> Tensor:
        assert metadata.decode is not None
        shared.append(metadata.decode.share is not None)
        return torch.eye(101)[token_ids]

    last_tokens = torch.zeros(NUM_SLOTS + 1, dtype=torch.int64)
    state = DecodeState(last_tokens, max_blocks=TABLE_LEN, block_size=BLOCK, head_dim=16, dca=DCA)
    requests = decodings([48, 50], [GREEDY, WARM])
    for sharing in (None, RowSharing(Agreeing(1, 2), BLOCK, 100)):
        graphs = DecodeGraphs(forward, state, lambda step: step)
        graphs.sharing = sharing
        run(graphs, *(request.slice(1) for request in requests))  # 49 keys and 51
        run(graphs, requests[1].slice(1))
        graphs.record_all(2)
        assert graphs.num_graphs == (4 if sharing is None else 8)
    assert shared == [False, False, True, False]


def test_whatever_else_changes_is_a_load() -> None:
    """Order, membership, a step that was computed elsewhere, the same step again, another request
    in the slot."""
    graphs, state, _, _ = recorded()
    first, second = decodings([9, 20], [GREEDY, GREEDY])

    def loads(*requests: Decoding) -> bool:
        before = state.num_loads
        found = run(graphs, *(request.slice(1) for request in requests))
        assert found == [(1 + request.length) % 101 for request in requests]
        for request in requests:
            request.length += 1
        return state.num_loads > before

    assert loads(first, second) and not loads(first, second)
    assert loads(second, first) and not loads(second, first)
    assert loads(first) and not loads(first)
    second.length = first.length
    assert loads(first, second) and not loads(first, second)
    first.length += 1
    assert loads(first, second)
    first.length, second.length = first.length - 1, second.length - 1
    assert loads(first, second) and not loads(first, second)
    second.request_id = "another"
    assert loads(first, second) and not loads(first, second)


def test_all_graphs_are_recorded_before_the_first_step() -> None:
    """Those up to the largest batch, and not one that is larger; steps go on as before."""
    graphs, _, _, _ = recorded()
    made = list[Compute]()
    graphs._record = lambda step: made.append(step) or step  # type: ignore[func-returns-value]
    graphs.record_all(5)
    assert len(made) == 2 * 4  # 1, 2, 4, 8; greedy and mixed
    requests = decodings([9, 20, 7, 8, 9], [GREEDY, WARM, GREEDY, GREEDY, GREEDY])
    for count in (5, 3, 1, 2, 2):
        run(graphs, *(request.slice(1) for request in requests[:count]))
    assert len(made) == 8
    run(graphs, requests[1].slice(1))
    assert len(made) == 8
    graphs.record_all(1000)
    assert len(made) == 2 * len(BATCH_SIZES)


def test_only_steps_of_decodes_are_taken() -> None:
    def takes(*lengths: int, prompt_len: int = 5) -> bool:
        requests = decodings(list(lengths), [GREEDY] * len(lengths))
        for request in requests:
            request.prompt_len = prompt_len
        return DecodeGraphs.takes(ScheduledBatch(
            step_id=0, slices=tuple(request.slice(1) for request in requests)))

    assert takes(*[9] * BATCH_SIZES[-1]) and not takes(*[9] * 65)
    assert not takes(0, prompt_len=1)  # a prompt of one token
    assert not takes()
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
                       dtype=torch.bfloat16, device="cuda", means=True)
        for _ in range(MODEL.num_layers)]
    for cache in caches:
        for tensor in cache:
            if tensor is not None:
                tensor.normal_()
    return model, caches


def make_graphs(model: CausalLM, caches: list[PagedKV]) -> tuple[DecodeGraphs, Tensor]:
    def forward(token_ids: Tensor, metadata: AttentionMetadata) -> Tensor:
        return model.logits(model(token_ids, metadata, caches))

    assert DecodeGraphs.is_possible(caches[0], MODEL.num_heads)
    state, last_tokens = make_state("cuda")
    return DecodeGraphs(forward, state, CudaRecorder()), last_tokens


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [[GREEDY], [GREEDY, WARM]], ids=["greedy", "mixed"])
def test_replay_equals_eager(kind: list[RowSampling]) -> None:
    """Sizes up and down, lengths from 1 over several DCA chunks, a few steps of each by the graph's
    own arithmetic; caches equal afterwards."""
    source = random.Random(0)
    with torch.inference_mode():
        model, caches = make_model(64)
        eager_caches = [PagedKV(cache.k.clone(), cache.v.clone()) for cache in caches]
        graphs, last_tokens = make_graphs(model, caches)
        graphs.record_all(64)
        for count in (3, 1, 17, 64, 4, 2, 5, 33, 6):
            requests = decodings([source.randrange(1, MAX_LEN - 20) for _ in range(count)],
                                 [source.choice(kind) for _ in range(count)])
            for request in requests:
                request.request_id += f" of {count}"
            for step in range(20):
                items = [request.slice(request.slot % 101 if step == 0 else None)
                         for request in requests]
                inputs = on_the_host(items, last_tokens)
                expected = model.logits(model(inputs.token_ids, inputs.metadata, eager_caches))
                graphs.prepare(items)
                output = graphs.run().head(count)
                torch.testing.assert_close(output.logits, expected, atol=0.05, rtol=0.05)
                chosen = sample(output.logits, inputs.sampling, all_greedy=inputs.all_greedy)
                assert torch.equal(output.token_ids, chosen)
                assert torch.equal(last_tokens[inputs.slots], chosen)
                assert all(torch.equal(found, wanted) for found, wanted in
                           zip(output.rows, inputs.sampling, strict=True))
                for request in requests:
                    request.length += 1
        for cache, eager in zip(caches, eager_caches, strict=True):
            for part, expected_part in zip(cache, eager, strict=True):
                if part is None:
                    assert expected_part is None
                    continue
                torch.testing.assert_close(part, expected_part, atol=0.05, rtol=0.05)


@pytest.mark.gpu
def test_steps_run_ahead_of_their_tokens() -> None:
    """The host never waits, whether a step is loaded or goes on; and what the graph makes of its
    buffers is what the host would have put there."""
    with torch.inference_mode():
        model, caches = make_model(2)
        graphs, last_tokens = make_graphs(model, caches)
        graphs.record_all(2)

        def steps(changes: bool) -> list[Tensor]:
            last_tokens[:2] = torch.tensor([3, 5], device="cuda")
            found = list[Tensor]()
            with no_syncs():
                for step in range(20):
                    requests = decodings([40 + step, 140 + step], [GREEDY, GREEDY])
                    if changes:  # a new name: loaded from the host
                        requests[0].request_id += f" of step {step}"
                    graphs.prepare([r.slice() for r in requests])
                    found.append(graphs.run().token_ids.clone())
            check_inputs(graphs._state, [Decoding(
                request_id=r.request_id, slot=r.slot, length=r.length + 1, sampling=GREEDY,
                prompt_len=r.prompt_len, blocks=r.blocks).slice() for r in requests], 2,
                last_tokens)
            return found

        assert torch.equal(torch.stack(steps(True)), torch.stack(steps(False)))
