"""Dense prefill and decode of both implementations against the fp64 oracle of all pairs."""

from __future__ import annotations

import random
from types import ModuleType

import pytest
import torch
from torch import Tensor

from longspan import ops
from longspan.ops import reference
from longspan.ops.dense import eager as eager_dense
from longspan.ops.tiles.attend import ordered_kv
from longspan.ops.types import PagedKV
from tests.conftest import SEED, assert_close
from tests.ops import oracle
from tests.ops.oracle import Positions

IMPLEMENTATIONS = [pytest.param(reference, id="reference"), pytest.param(eager_dense, id="eager")]

# chunk_size, local_size, length, query heads, KV heads, head dim, block size
SHAPES = [
    (8, 3, 63, 7, 1, 16, 16), (8, 7, 15, 5, 1, 8, 4), (64, 16, 111, 10, 2, 16, 16),
    (64, 48, 111, 4, 1, 16, 16), (100, 37, 257, 7, 1, 32, 64), (111, 63, 200, 3, 3, 16, 7),
    (512, 100, 63, 8, 2, 16, 16), (1000, 1, 1, 2, 2, 8, 16),
]
CASES = [pytest.param(Positions(c, w), *rest, id=f"c{c}-w{w}-L{rest[0]}-h{rest[1]}:{rest[2]}")
         for c, w, *rest in SHAPES]
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]


def run_plan(impl: ModuleType, case: oracle.Case, plan: list[int]) -> tuple[Tensor, Tensor]:
    """Prefill in pieces that end at the plan's positions; the cache holds no key of the future."""
    outs, lses, start = [], [], 0
    for stop in plan:
        out, lse = impl.prefill_attention(
            case.q[start:stop], oracle.only_first(case, stop), case.block_table, start,
            case.rotary, case.scale)
        outs.append(out)
        lses.append(lse)
        start = stop
    return torch.cat(outs), torch.cat(lses)


@pytest.mark.parametrize("shuffled", [True, False], ids=["shuffled", "contiguous"])
@pytest.mark.parametrize(
    ("positions", "length", "heads", "kv_heads", "head_dim", "block_size"), CASES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_prefill_equals_oracle(
    impl: ModuleType, positions: Positions, length: int, heads: int, kv_heads: int, head_dim: int,
    block_size: int, shuffled: bool, device: str,
) -> None:
    case = oracle.make_case(
        length, positions, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
        block_size=block_size, shuffled=shuffled, device=device)
    out, lse = impl.prefill_attention(
        case.q, case.cache, case.block_table, 0, case.rotary, case.scale)
    expected_out, expected_lse = oracle.dense(case, positions)
    assert_close(out, expected_out, "out")
    assert_close(lse, expected_lse, "lse")
    assert lse.dtype == torch.float32


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_any_prefill_plan_equals_one_piece(impl: ModuleType, seed: int, device: str) -> None:
    """Random geometry, length and cuts, pieces of one token among them."""
    rng = random.Random(SEED + seed)
    chunk_size = rng.randrange(6, 120)
    positions = Positions(chunk_size, rng.randrange(1, chunk_size - 2))
    length = rng.choice([63, 111, 190])
    cuts = sorted(rng.sample(range(1, length), rng.randrange(1, 12)))
    cuts = sorted({*cuts, cuts[0] + 1, length})
    print(f"{positions}, length {length}, cuts {cuts}")
    case = oracle.make_case(length, positions, num_heads=5, head_dim=16, device=device)
    expected_out, expected_lse = oracle.dense(case, positions)
    out, lse = run_plan(impl, case, cuts)
    assert_close(out, expected_out, "out")
    assert_close(lse, expected_lse, "lse")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_decode_token_by_token(impl: ModuleType, device: str) -> None:
    """Every position of a request decoded alone, over four DCA chunks."""
    positions, length = Positions(20, 7), 63
    case = oracle.make_case(length, positions, device=device)
    parts = [
        impl.decode_attention(
            case.q[i : i + 1], oracle.only_first(case, i + 1), case.block_table[None],
            torch.tensor([i + 1], device=device), case.rotary,
            torch.tensor([case.scale], device=device))
        for i in range(length)
    ]
    expected_out, expected_lse = oracle.dense(case, positions)
    assert_close(torch.cat([out for out, _ in parts]), expected_out, "out")
    assert_close(torch.cat([lse for _, lse in parts]), expected_lse, "lse")


@pytest.mark.parametrize("lengths", [
    pytest.param([1, 16, 48, 49, 64, 65, 111, 160], id="all-zones"),
    pytest.param([30, 50, 1, 48, 49], id="rotations-end-after-one-chunk")])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_decode_batch_of_unequal_requests(
    impl: ModuleType, lengths: list[int], device: str
) -> None:
    """Requests of different lengths, zones and temperatures; tables padded with block 0."""
    positions, length = Positions(64, 16), max(lengths)
    case = oracle.make_case(length, positions, device=device)
    tables = torch.zeros(len(lengths), len(case.block_table), dtype=torch.int64, device=device)
    scales = torch.linspace(0.5, 1.5, len(lengths), device=device) * case.scale
    for row, context_len in enumerate(lengths):
        used = -(-context_len // 16)
        tables[row, :used] = case.block_table[:used]
    rows = torch.tensor(lengths, device=device) - 1
    out, lse = impl.decode_attention(
        case.q[rows], case.cache, tables, rows + 1, case.rotary, scales)
    for row, context_len in enumerate(lengths):
        part = case._replace(q=case.q[:context_len], k=case.k[:context_len],
                             v=case.v[:context_len], scale=float(scales[row]))
        expected_out, expected_lse = oracle.dense(part, positions, start=context_len - 1)
        assert_close(out[row : row + 1], expected_out, f"out at length {context_len}")
        assert_close(lse[row : row + 1], expected_lse, f"lse at length {context_len}")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_long_request_at_its_end(impl: ModuleType, device: str) -> None:
    """The last 63 of 4,097 tokens, four DCA chunks in."""
    positions, length = Positions(1100, 76), 4097
    case = oracle.make_case(length, positions, num_heads=4, head_dim=16, device=device)
    out, lse = impl.prefill_attention(
        case.q[-63:], case.cache, case.block_table, length - 63, case.rotary, case.scale)
    expected_out, expected_lse = oracle.dense(case, positions, start=length - 63)
    assert_close(out, expected_out, "out")
    assert_close(lse, expected_lse, "lse")


def rope_attention(case: oracle.Case, theta: float = 1e4) -> Tensor:
    """Causal attention with RoPE at absolute positions, as transformers writes it."""
    length, heads, head_dim = case.q.shape
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2).double() / head_dim)
    angles = torch.outer(torch.arange(length).double(), inv_freq)
    cos, sin = (torch.cat((x, x), -1)[:, None] for x in (angles.cos(), angles.sin()))

    def rotate_half(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), -1)

    q, k = ((x.double() * cos) + (rotate_half(x.double()) * sin) for x in (case.q.cpu(), case.k))
    group = heads // case.k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1).transpose(0, 1) for x in (k, case.v))
    return torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k, v, is_causal=True, scale=case.scale).transpose(0, 1)


@pytest.mark.parametrize("length", [1, 63, 96, 97, 128], ids=lambda n: f"L{n}")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_plain_rope_up_to_chunk_size(impl: ModuleType, length: int, device: str) -> None:
    """Stride 96, chunk size 128: one zone up to 96 tokens, and equal distances up to 128."""
    case = oracle.make_case(length, Positions(128, 32), num_heads=10, num_kv_heads=2, device=device)
    out, _ = impl.prefill_attention(
        case.q, case.cache, case.block_table, 0, case.rotary, case.scale)
    assert_close(out, rope_attention(case), "out")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_dca_differs_from_rope_beyond_chunk_size(impl: ModuleType, device: str) -> None:
    """The identity is not vacuous: the same comparison fails past the clamp."""
    case = oracle.make_case(200, Positions(128, 32), device=device)
    out, _ = impl.prefill_attention(
        case.q, case.cache, case.block_table, 0, case.rotary, case.scale)
    assert_close(out[:128], rope_attention(case)[:128], "out")
    with pytest.raises(AssertionError, match="error ratio"):
        assert_close(out, rope_attention(case), "out")


@pytest.mark.parametrize("shuffled", [True, False], ids=["shuffled", "contiguous"])
def test_keys_and_values_in_bf16_are_widened_as_they_are_read(
    shuffled: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fewer keys at a time than there are; all zones. Queries stay fp32."""
    monkeypatch.setattr(eager_dense, "KEYS", 50)
    case = oracle.make_case(257, Positions(100, 37), num_heads=7, shuffled=shuffled)
    half = PagedKV(*(part.bfloat16() for part in (case.cache.k, case.cache.v)))
    wide = PagedKV(half.k.float(), half.v.float())
    for start in (256, 200):
        q = case.q[start:]
        plain, table = ops.readable_kv(q, half, case.block_table, 257, case.rotary)
        assert plain.k.dtype == torch.float32
        out, lse = ops.prefill_attention(q, plain, table, start, case.rotary, case.scale)
        expected_out, expected_lse = reference.prefill_attention(
            q, wide, case.block_table, start, case.rotary, case.scale)
        assert_close(out, expected_out, "out")
        assert_close(lse, expected_lse, "lse")
    args = case.block_table[None], torch.tensor([257]), case.rotary, torch.tensor([case.scale])
    found, expected = (impl.decode_attention(case.q[-1:], cache, *args)
                       for impl, cache in ((eager_dense, half), (reference, wide)))
    assert found[0].dtype == torch.float32
    for one, other, name in zip(found, expected, ("out", "lse"), strict=True):
        assert_close(one, other, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", [[257], [31, 32, 200, 257]], ids=["one-piece", "pieces"])
def test_eager_equals_reference(plan: list[int], dtype: torch.dtype, device: str) -> None:
    case = oracle.make_case(257, Positions(100, 37), num_heads=7, dtype=dtype, device=device)
    out, lse = run_plan(eager_dense, case, plan)
    expected_out, expected_lse = run_plan(reference, case, plan)
    assert out.dtype == dtype and out.is_contiguous() and lse.is_contiguous()
    assert_close(out, expected_out, "out")
    assert_close(lse, expected_lse, "lse", dtype)


def test_ordered_kv_views_consecutive_blocks_and_copies_others() -> None:
    """No copy of the cache where a request's blocks follow one another."""
    for shuffled in (True, False):
        case = oracle.make_case(63, Positions(100, 37), shuffled=shuffled)
        k, v = ordered_kv(case.cache, case.block_table, 50)
        expected = reference.gather_kv(case.cache, case.block_table, 50)
        assert torch.equal(k, expected[0]) and torch.equal(v, expected[1])
        shares = k.untyped_storage().data_ptr() == case.cache.k.untyped_storage().data_ptr()
        assert shares is not shuffled
