"""DualChunkAttention over whole requests: what is dense, what is sparse, and what it may not
depend on (block tables, other requests, prompt lengths)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from longspan.attention.cache import allocate_cache
from longspan.attention.layer import DualChunkAttention
from longspan.attention.metadata import SequenceSlice, build_metadata
from longspan.attention.rope import build_rotary
from longspan.attention.sparsity import SparsityPlan
from longspan.config import DcaConfig
from longspan.ops import prefill_attention, reference, select_vertical_slash
from longspan.ops.types import PagedKV, QueryRotary
from tests.conftest import SEED, assert_close
from tests.ops import oracle

P, D = 16, 16
DCA = DcaConfig(chunk_size=128, local_size=32, original_max_position_embeddings=128)  # stride 96
LONG_DCA = DcaConfig(chunk_size=1024, local_size=64)
RELEASED = [pytest.param(DcaConfig(chunk_size=chunk, local_size=local,
                                   original_max_position_embeddings=chunk), id=str(chunk - local))
            for chunk, local in ((262_144, 8_192), (131_072, 4_096))]
"""What million-token checkpoints have, by their stride."""
# They take what `Far.args` gives, and mypy does not see how much that is.
select: Any = select_vertical_slash
attend_sparse: Any = reference.sparse_prefill_attention


class Request(NamedTuple):
    """Projected vectors of one request, prompt and completion."""

    q: Tensor
    k: Tensor
    v: Tensor
    prompt_len: int


def make_request(length: int, prompt_len: int | None = None, heads: int = 7, kv_heads: int = 1
                 ) -> Request:
    q = 1.3 * torch.randn(length, heads, D)
    k, v = 1.3 * torch.randn(length, kv_heads, D), torch.randn(length, kv_heads, D)
    return Request(q, k, v, length if prompt_len is None else prompt_len)


def make_plan(heads: int = 7, **changes: Any) -> SparsityPlan:
    """Budgets differ from head to head; the smallest slash budget is 48."""
    slash = tuple(48 + 20 * (head % 3) for head in range(heads))
    plan = SparsityPlan(vertical=((24,) * heads,) * 2, slash=(slash, slash[::-1]))
    return replace(plan, local=P, num_scouts=12, **changes)


def make_layer(request: Request, plan: SparsityPlan | None, dca: DcaConfig | None = DCA
               ) -> DualChunkAttention:
    rotary = build_rotary(head_dim=D, rope_theta=1e4, max_model_len=1 << 20, dca=dca)
    return DualChunkAttention(
        layer_idx=1, num_heads=request.q.shape[1], num_kv_heads=request.k.shape[1], head_dim=D,
        rotary=rotary, plan=plan)


def make_cache(request: Request, num_blocks: int = 64) -> PagedKV:
    return allocate_cache(
        num_blocks=num_blocks, block_size=P, num_kv_heads=request.k.shape[1], head_dim=D,
        dtype=torch.float32, device="cpu", means=True)


def step(
    layer: DualChunkAttention, cache: PagedKV, dca: DcaConfig | None,
    parts: list[tuple[Request, int, int, list[int]]], sparse: bool = True,
) -> list[Tensor]:
    """One step over (request, start, stop, block ids) parts; their outputs."""
    slices = [SequenceSlice(query_len=stop - start, cached_len=start, prompt_len=item.prompt_len,
                            block_ids=blocks, sparse=sparse)
              for item, start, stop, blocks in parts]
    metadata = build_metadata(slices, block_size=P, head_dim=D, dca=dca, device="cpu")
    q, k, v = (torch.cat([getattr(item, name)[start:stop] for item, start, stop, _ in parts])
               for name in "qkv")
    out = layer(q, k, v, cache, metadata)
    return list(out.split([stop - start for _, start, stop, _ in parts]))


def run(
    layer: DualChunkAttention, request: Request, cuts: list[int], blocks: list[int] | None = None,
    dca: DcaConfig | None = DCA, cache: PagedKV | None = None, sparse: bool = True, begin: int = 0,
) -> tuple[Tensor, PagedKV]:
    """A request in steps that end at ``cuts``, the first of which begins at ``begin``."""
    cache = make_cache(request) if cache is None else cache
    blocks = list(range(3, 60)) if blocks is None else blocks
    outs = [step(layer, cache, dca, [(request, start, stop, blocks)], sparse)[0]
            for start, stop in itertools.pairwise([begin, *cuts])]
    return torch.cat(outs), cache


def sparse_ranges(
    plan: SparsityPlan, cuts: list[int], stride: int, begin: int = 0,
) -> list[tuple[int, int]]:
    """Query ranges computed sparsely, restated position by position: in whole tiles of the chunk,
    from the slash budget on, cut at DCA borders (tile mode)."""
    ranges = []
    for start, stop in itertools.pairwise([begin, *cuts]):
        inside = [
            position for position in range(start, stop)
            if position // P * P >= max(start, min(plan.slash[1]))
            and (position // P + 1) * P <= stop]
        for _, group in itertools.groupby(inside, key=lambda position: position // stride):
            members = list(group)
            ranges.append((members[0], members[-1] + 1))
    return ranges


CUTS = [
    pytest.param([333], id="one-piece"),
    pytest.param([128, 256, 333], id="aligned-to-blocks"),
    pytest.param([37, 130, 131, 290, 333], id="ragged"),
    pytest.param([96, 192, 288, 333], id="at-dca-borders"),
    pytest.param([300, 333], id="last-piece-all-tail"),
]


@pytest.mark.parametrize("correction", [True, False], ids=["corrected", "plain"])
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(7, 1), (10, 2), (3, 3)],
                         ids=["h7:1", "h10:2", "h3:3"])
def test_sparse_prefill_follows_the_rules(
    cuts: list[int], heads: int, kv_heads: int, correction: bool
) -> None:
    """Against the specification applied by hand: dense rows by `reference`, sparse rows by the
    selection of each chunk's DCA segment; ragged ends are dense."""
    request = make_request(333, heads=heads, kv_heads=kv_heads)
    plan = make_plan(heads, mean_correction=correction)
    layer = make_layer(request, plan)
    blocks = torch.randperm(60).tolist()
    out, cache = run(layer, request, cuts, blocks)
    table, scale = torch.tensor(blocks[:21]), _scale(333)
    expected, _ = reference.prefill_attention(request.q, cache, table, 0, layer.rotary, scale)
    kept = heads * 333 * 334 / 2
    ranges = sparse_ranges(plan, cuts, layer.rotary.stride)
    assert ranges, "the case computes nothing sparsely"
    for start, stop in ranges:
        rows = request.q[start:stop]
        selection = select_vertical_slash(
            rows, cache, table, start, layer.rotary, scale, plan.layer(1))
        expected[start:stop], _, pairs = reference.sparse_prefill_attention(
            rows, cache, table, start, layer.rotary, scale, selection, correction)
        kept += float(pairs) - heads * (stop * (stop + 1) - start * (start + 1)) / 2
    assert_close(out, expected)
    assert layer.causal_pairs == heads * 333 * 334 / 2
    assert float(layer.kept_pairs) == kept < layer.causal_pairs


@pytest.mark.parametrize("rows", [P, 3 * P])
@pytest.mark.parametrize("cuts", CUTS)
def test_a_chunk_in_pieces_equals_the_whole(cuts: list[int], rows: int) -> None:
    """Selections, lists of key tiles among them, are of whole prefill chunks; a paused chunk
    attends some rows at a time."""
    request, plan = make_request(333), make_plan()
    whole, cache = run(make_layer(request, plan), request, cuts)
    layer, num_listed = make_layer(request, plan), 0
    for start, stop in itertools.pairwise([0, *cuts]):
        metadata = build_metadata(
            [SequenceSlice(query_len=stop - start, cached_len=start, prompt_len=333,
                           block_ids=list(range(3, 60)), sparse=True)],
            block_size=P, head_dim=D, dca=DCA, device="cpu")
        (item,) = metadata.prefills
        parts = layer.prepare(request.q[start:stop], cache, item)
        for part in parts:
            if part.selection is not None:
                assert part.selection.tiles is not None
                num_listed += int((part.selection.tiles >= 0).sum())
        borders = [start, *range(start // P * P + rows, stop, rows), stop]
        outs = [layer.attend(request.q[first:last], cache, item, parts, first)
                for first, last in itertools.pairwise(borders)]
        assert_close(torch.cat(outs), whole[start:stop])
    assert num_listed > 0, "no query tile listed anything"


def _scale(prompt_len: int) -> float:
    metadata = build_metadata(
        [SequenceSlice(query_len=1, cached_len=0, prompt_len=prompt_len, block_ids=[0])],
        block_size=P, head_dim=D, dca=DCA, device="cpu")
    return metadata.prefills[0].scale


def test_a_ragged_end_equals_dense_exactly() -> None:
    """The rows of the prompt's last, incomplete tile are bit for bit what dense attention gives for
    them; the rows before them are not dense."""
    request = make_request(333)
    layer = make_layer(request, make_plan(), LONG_DCA)
    out, cache = run(layer, request, [128, 333], dca=LONG_DCA)
    first_dense = 333 // P * P
    table = torch.arange(3, 24)
    exact, _ = prefill_attention(
        request.q[first_dense:], cache, table, first_dense, layer.rotary, D**-0.5)
    assert torch.equal(out[first_dense:], exact)
    dense, _ = reference.prefill_attention(request.q, cache, table, 0, layer.rotary, D**-0.5)
    assert_close(out[first_dense:], dense[first_dense:], "end")
    different = (out - dense).abs().amax((1, 2))[128:first_dense] > 1e-4
    assert different.float().mean() > 0.9, "rows before the end are dense too"


def test_short_prompts_and_dense_requests_never_select() -> None:
    """No row qualifies when the slash budget covers the prompt, or sparse is off."""
    for length, sparse in ((31, True), (63, True), (333, False)):
        request = make_request(length)
        layer = make_layer(request, make_plan())
        out, cache = run(layer, request, [length], sparse=sparse)
        expected, _ = reference.prefill_attention(
            request.q, cache, torch.arange(3, 60), 0, layer.rotary, _scale(length))
        assert_close(out, expected)
        assert layer.kept_pairs == layer.causal_pairs


def test_full_budget_equals_a_layer_without_plan() -> None:
    request = make_request(333)
    full = replace(make_plan(), vertical=((400,) * 7,) * 2, slash=((400, *(48,) * 6),) * 2)
    layer, dense = make_layer(request, full), make_layer(request, None)
    out, _ = run(layer, request, [160, 333])
    expected, _ = run(dense, request, [160, 333])
    assert_close(out, expected)
    assert float(layer.kept_pairs) == layer.causal_pairs == dense.causal_pairs
    layer.reset_stats()
    assert layer.kept_pairs == layer.causal_pairs == 0


@pytest.mark.parametrize("mode", ["tile", "paper"])
def test_results_do_not_depend_on_the_block_table(mode: str) -> None:
    """Consecutive, reversed and shuffled blocks: bit for bit the same."""
    request = make_request(333, heads=4, kv_heads=2)
    plan = make_plan(4) if mode == "tile" else make_plan(4).paper()
    layer = make_layer(request, plan)
    shuffled = torch.randperm(60).tolist()
    outs = [run(layer, request, [130, 333], blocks)[0]
            for blocks in (list(range(5, 40)), list(range(40, 5, -1)), shuffled)]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_paper_mode_has_no_tail_and_no_alignment() -> None:
    """Every row of a ragged piece is sparse, each DCA segment with its own selection."""
    request, cuts = make_request(333), [61, 250, 333]
    plan = make_plan().paper()
    layer = make_layer(request, plan)
    out, cache = run(layer, request, cuts)
    table, scale, expected = torch.arange(3, 24), _scale(333), torch.empty(333, 7, D)
    for start, stop in itertools.pairwise([0, *cuts]):
        borders = [start, *(b for b in (96, 192, 288) if start < b < stop), stop]
        for first, last in itertools.pairwise(borders):
            rows = request.q[first:last]
            selection = select_vertical_slash(
                rows, cache, table, first, layer.rotary, scale, plan.layer(1))
            expected[first:last], _, _ = reference.sparse_prefill_attention(
                rows, cache, table, first, layer.rotary, scale, selection, False)
    assert_close(out, expected)


def test_packed_requests_do_not_touch_each_other() -> None:
    """Two prompts and a decoding request in the same steps, alternating blocks: each gets bit for
    bit what it gets alone."""
    first, second, third = make_request(200), make_request(333), make_request(111, prompt_len=105)
    plan, blocks = make_plan(), [list(range(i, 64, 3)) for i in range(3)]
    alone = [run(make_layer(first, plan), item, cuts)[0] for item, cuts in (
        (first, [100, 200]), (second, [96, 333]), (third, [105, *range(106, 112)]))]
    layer, cache = make_layer(first, plan), make_cache(first)
    (head,) = step(layer, cache, DCA, [(third, 0, 105, blocks[2])])
    packed = [
        step(layer, cache, DCA, [(first, 0, 100, blocks[0]), (second, 0, 96, blocks[1]),
                                 (third, 105, 106, blocks[2])]),
        step(layer, cache, DCA, [(first, 100, 200, blocks[0]), (second, 96, 333, blocks[1]),
                                 (third, 106, 107, blocks[2])])]
    assert torch.equal(torch.cat([part[0] for part in packed]), alone[0])
    assert torch.equal(torch.cat([part[1] for part in packed]), alone[1])
    assert torch.equal(torch.cat([head, *(part[2] for part in packed)]), alone[2][:107])


def test_decode_follows_a_sparse_prefill_densely() -> None:
    """Six tokens after the prompt, each against all keys, at a temperature that grows with it."""
    request = make_request(206, prompt_len=200)
    layer = make_layer(request, make_plan())
    out, cache = run(layer, request, [200, *range(201, 207)])
    for position in range(200, 206):
        expected, _ = reference.prefill_attention(
            request.q[position : position + 1], cache, torch.arange(3, 60), position,
            layer.rotary, _scale(position + 1))
        assert_close(out[position : position + 1], expected, f"token {position}")


def test_cached_keys_do_not_depend_on_the_prompt_length() -> None:
    """A prefix computed for a short prompt serves a longer one with another temperature: dense
    results equal a fresh run, although the softmax scales differ."""
    long = make_request(333)
    short = Request(long.q[:160], long.k[:160], long.v[:160], prompt_len=160)
    layer, cache = make_layer(long, None), make_cache(long)
    blocks = torch.randperm(60).tolist()
    run(layer, short, [160], blocks, cache=cache)
    (reused,) = step(layer, cache, DCA, [(long, 160, 333, blocks)])
    fresh, _ = run(layer, long, [333])
    assert _scale(160) != _scale(333)
    assert_close(reused, fresh[160:])


@pytest.mark.parametrize("num_outputs", [0, 1, 40])
def test_output_view_computes_only_the_wanted_rows(num_outputs: int) -> None:
    """The last layer's view: the same cache, and the last rows of the full result."""
    request = make_request(200)
    layer = make_layer(request, None)
    expected, full = run(layer, request, [200])
    metadata = build_metadata(
        [SequenceSlice(query_len=200, cached_len=0, prompt_len=200, block_ids=range(3, 60),
                       num_outputs=num_outputs)],
        block_size=P, head_dim=D, dca=DCA, device="cpu")
    assert metadata.output is not None and metadata.output_rows is not None
    cache = make_cache(request)
    out = layer(request.q[metadata.output_rows], request.k, request.v, cache, metadata.output)
    assert out.shape[0] == num_outputs
    if num_outputs:
        assert_close(out, expected[-num_outputs:])
    assert torch.equal(cache.k[3:15], full.k[3:15])


@pytest.mark.parametrize("cuts", CUTS)
def test_dense_layer_equals_oracle(cuts: list[int]) -> None:
    """From unrotated vectors to the result, through the layer's own cache, over four DCA chunks."""
    request = make_request(333, heads=10, kv_heads=2)
    layer = make_layer(request, None)
    out, _ = run(layer, request, cuts, torch.randperm(60).tolist())
    expected, _ = oracle.attention(
        request.q, request.k, request.v, oracle.distance_matrix(333, oracle.Positions(128, 32)),
        layer.rotary.inv_freq, _scale(333), oracle.causal(333))
    assert_close(out, expected)


def test_plain_rope_without_dca() -> None:
    """No DCA config: one zone over the whole context, equal to attention at true distances."""
    request = make_request(257, heads=4)
    layer = make_layer(request, None, dca=None)
    out, _ = run(layer, request, [100, 257], dca=None)
    distances = (torch.arange(257)[:, None] - torch.arange(257)[None]).clamp(min=0)
    expected, _ = oracle.attention(
        request.q, request.k, request.v, distances, layer.rotary.inv_freq, D**-0.5,
        oracle.causal(257))
    assert_close(out, expected)


class Far(NamedTuple):
    """A request that reaches into its third DCA chunk; its history stands in a cache."""

    request: Request
    dca: DcaConfig
    border: int
    """First position of the third DCA chunk."""
    cache: PagedKV
    table: Tensor
    rotary: QueryRotary
    """The layer's tables, but stride and clamp as the test states them."""
    scale: float

    def run(
        self, plan: SparsityPlan | None, begin: int, cuts: list[int],
    ) -> tuple[DualChunkAttention, Tensor]:
        """Rows from ``begin`` on, from where all slots are NaN before."""
        for part in (self.cache.k, self.cache.v):
            for at in range(begin, len(self.request.k)):
                part[self.table[at // P], at % P] = math.nan
        layer = make_layer(self.request, plan, self.dca)
        out, _ = run(layer, self.request, cuts, self.table.tolist(), self.dca, self.cache,
                     begin=begin)
        return layer, out

    def args(self, start: int, stop: int) -> Any:
        """What ops take first, for some rows."""
        return (self.request.q[start:stop], self.cache, self.table, start, self.rotary, self.scale)

    def specified(self, plan: SparsityPlan, ranges: list[tuple[int, int]]) -> tuple[Tensor, float]:
        """Sparse rows, and the pairs that they keep."""
        outs, kept = list[Tensor](), 0.0
        for start, stop in ranges:
            args = self.args(start, stop)
            out, _, pairs = attend_sparse(
                *args, select(*args, plan.layer(1)), plan.mean_correction)
            outs.append(out)
            kept += float(pairs)
        return torch.cat(outs), kept


@pytest.fixture(scope="module", params=RELEASED)
def far(request: pytest.FixtureRequest) -> Iterator[Far]:
    """Two whole DCA chunks of a true size and 19 rows: keys of all zones. Keys of the history are
    as random rotated as not."""
    dca: DcaConfig = request.param
    torch.manual_seed(SEED)
    stride = dca.chunk_size - dca.local_size
    item = make_request(2 * stride + P + 3, heads=1)
    item = item._replace(q=3 * item.q)  # else a row's output is the mean of all values, nearly 0
    table = torch.randperm(-(-len(item.k) // P))
    keys, values = (torch.randn(len(table), P, 1, D) for _ in range(2))
    rotary = make_layer(item, None, dca).rotary._replace(stride=stride, clamp=dca.chunk_size)
    yield Far(item, dca, 2 * stride, PagedKV(keys, values, keys.mean(1), values.mean(1)), table,
              rotary, warm_scale(len(item.k), dca))


def warm_scale(length: int, dca: DcaConfig) -> float:
    """With YaRN's temperature for a context of that length."""
    trained = dca.original_max_position_embeddings
    return float((0.1 * max(0.0, math.log(length / trained)) + 1) ** 2 * D**-0.5)


@pytest.mark.parametrize("cuts", [[4], [-1, 0, 4]], ids=["one-piece", "at-the-border"])
def test_dense_rows_behind_released_strides(far: Far, cuts: list[int]) -> None:
    """On both sides of the border, and keys as they are stored."""
    begin, stop = far.border - 5, far.border + 4
    _, out = far.run(None, begin, [far.border + cut for cut in cuts])
    positions = torch.arange(begin, stop)
    turns = positions % far.rotary.stride
    assert_close(far.cache.k[far.table[positions // P], positions % P], reference.rotate(
        far.request.k[begin:stop], far.rotary.cos[turns], far.rotary.sin[turns]), "keys")
    assert_close(out, reference.prefill_attention(*far.args(begin, stop))[0])


@pytest.mark.parametrize("correction", [True, False], ids=["corrected", "plain"])
def test_sparse_rows_behind_released_strides(far: Far, correction: bool) -> None:
    """The last tile of a DCA chunk and the first of the next in one prefill chunk; a ragged end."""
    plan = replace(make_plan(1), mean_correction=correction)
    begin, tail, stop = far.border - P, far.border + P, far.border + P + 3
    layer, out = far.run(plan, begin, [stop])
    ranges = sparse_ranges(plan, [stop], far.rotary.stride, begin)
    assert ranges == [(begin, far.border), (far.border, tail)]
    expected, kept = far.specified(plan, ranges)
    assert_close(out[:-3], expected)
    assert_close(out[-3:], reference.prefill_attention(*far.args(tail, stop))[0], "end")
    assert float(layer.kept_pairs) == kept + sum(range(tail + 1, stop + 1))


def test_paper_mode_behind_released_strides(far: Far) -> None:
    """Every row is sparse, each DCA segment with its own selection."""
    plan, begin, stop = make_plan(1).paper(), far.border - 9, far.border + 11
    layer, out = far.run(plan, begin, [stop])
    expected, kept = far.specified(plan, [(begin, far.border), (far.border, stop)])
    assert_close(out, expected)
    assert float(layer.kept_pairs) == kept


def test_decode_behind_released_strides(far: Far) -> None:
    """Tokens on both sides of the border, each at the temperature of its context."""
    begin = far.border - 2
    item = far._replace(request=far.request._replace(prompt_len=begin))
    _, out = item.run(None, begin - 1, [begin, *range(begin + 1, far.border + 2)])
    for row, position in enumerate(range(begin, far.border + 1), 1):
        case = far._replace(scale=warm_scale(position + 1, far.dca))
        expected, _ = reference.prefill_attention(*case.args(position, position + 1))
        assert_close(out[row : row + 1], expected, f"token {position}")


@pytest.mark.parametrize("sparse", [True, False])
def test_allocated_cache(sparse: bool) -> None:
    cache = allocate_cache(num_blocks=5, block_size=P, num_kv_heads=2, head_dim=D,
                           dtype=torch.bfloat16, device="cpu", means=sparse)
    assert cache.k.shape == cache.v.shape == (5, P, 2, D)
    assert cache.k.dtype == torch.bfloat16
    assert (cache.k_mean is None) is (cache.v_mean is None) is not sparse
    if cache.k_mean is not None:
        assert cache.k_mean.shape == (5, 2, D)
