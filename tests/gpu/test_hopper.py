"""The Hopper kernels against the fp32 specification: awkward lengths, zones, splits, poison."""

from __future__ import annotations

import random

import pytest
import torch

from longspan.attention.rope import build_rotary
from longspan.config import DcaConfig
from longspan.ops import reference
from longspan.ops.types import PagedKV, QueryRotary, Selection
from tests.ops import oracle

pytestmark = [pytest.mark.gpu, pytest.mark.hopper]

P, D = 128, 128
TOLERANCE = 1e-2  # bf16, docs/numerics.md
NAN = float("nan")


@pytest.fixture(scope="module", autouse=True)
def hopper() -> None:
    """Other GPUs fail here, where the reason is plain, not in a kernel."""
    assert torch.cuda.get_device_capability() == (9, 0), (
        f"{torch.cuda.get_device_name()} is no Hopper GPU; choose -m 'gpu and not hopper'")


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS error over RMS reference."""
    return float((out.double() - expected.double()).norm() / expected.double().norm())


def make_rotary(stride: int) -> QueryRotary:
    """DCA chunks of ``stride`` tokens."""
    return build_rotary(
        head_dim=D, rope_theta=1e6, max_model_len=16_384, device="cuda",
        dca=DcaConfig(chunk_size=stride + 128, local_size=128))


def make_case(
    query_len: int, cached_len: int, num_heads: int, num_kv_heads: int
) -> tuple[torch.Tensor, PagedKV, torch.Tensor]:
    """Queries, a cache with NaN wherever no key of the request lies, and a shuffled table."""
    generator = torch.Generator("cuda").manual_seed(query_len + cached_len)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator, dtype=torch.bfloat16)

    context_len = cached_len + query_len
    num_blocks = -(-context_len // P)
    table = torch.randperm(num_blocks + 3, device="cuda", generator=generator)[:num_blocks]
    k, v = (torch.full((num_blocks + 3, P, num_kv_heads, D), NAN, dtype=torch.bfloat16,
                       device="cuda") for _ in range(2))
    means = [torch.full((num_blocks + 3, num_kv_heads, D), NAN, dtype=torch.bfloat16,
                        device="cuda") for _ in range(2)]
    whole = context_len // P
    for pool, mean in zip((k, v), means, strict=True):
        rows = randn(num_blocks * P, num_kv_heads, D)
        rows[context_len:] = NAN
        pool[table] = rows.view(num_blocks, P, num_kv_heads, D)
        mean[table[:whole]] = pool[table[:whole]].float().mean(1).bfloat16()
    return randn(query_len, num_heads, D), PagedKV(k, v, *means), table


def random_selection(num_heads: int, context_len: int, seed: int) -> Selection:
    """Budgets that differ fourfold, windows and columns anywhere."""
    generator = torch.Generator("cuda").manual_seed(seed)
    num_tiles = context_len // P
    columns, offsets = [], []
    for head in range(num_heads):
        num_columns, num_windows = ((100, 2), (37, 7), (400, 3))[head % 3]
        found = torch.randperm(context_len, device="cuda", generator=generator)
        columns.append(found[:num_columns].sort().values)
        gaps = 1 + torch.randperm(max(num_tiles - 1, 0), device="cuda", generator=generator)
        offsets.append(-P * torch.cat((gaps.new_zeros(1), gaps[: num_windows - 1].sort().values)))
    pad = torch.nn.utils.rnn.pad_sequence
    return Selection(pad(columns, batch_first=True, padding_value=-1),
                     pad(offsets, batch_first=True, padding_value=P), P, aligned=True)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (4, 1), (7, 1), (10, 2)])
@pytest.mark.parametrize("stride", [256, 1024, 8192])
@pytest.mark.parametrize(
    ("query_len", "cached_len"),
    [(63, 0), (111, 0), (128, 0), (300, 0), (1, 777), (129, 1000), (640, 1280), (5, 4096)])
def test_dense_equals_reference(
    query_len: int, cached_len: int, stride: int, num_heads: int, num_kv_heads: int
) -> None:
    from longspan.ops.dense import hopper

    q, cache, table = make_case(query_len, cached_len, num_heads, num_kv_heads)
    args = (q, cache, table, cached_len, make_rotary(stride), 0.088)
    out, lse = hopper.prefill_attention(*args)
    expected, expected_lse = reference.prefill_attention(*args)
    assert relative_error(out, expected) < TOLERANCE
    assert relative_error(lse, expected_lse) < TOLERANCE


@pytest.mark.parametrize("query_len", [4097, 8191])
def test_dense_equals_reference_from_the_start(query_len: int) -> None:
    from longspan.ops.dense import hopper

    q, cache, table = make_case(query_len, 0, 2, 1)
    args = (q, cache, table, 0, make_rotary(2048), 0.088)
    out, lse = hopper.prefill_attention(*args)
    expected, expected_lse = reference.prefill_attention(*args)
    assert relative_error(out, expected) < TOLERANCE
    assert relative_error(lse, expected_lse) < TOLERANCE


@pytest.mark.parametrize("most", [0, 3, 40], ids=lambda most: f"list{most}")
@pytest.mark.parametrize("correction", [False, True], ids=["plain", "corrected"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (7, 1), (14, 2)])
@pytest.mark.parametrize(("query_len", "cached_len", "stride"), [
    (128, 0, 2048), (256, 1024, 2048), (384, 1536, 512), (512, 2048, 512), (256, 3840, 1024)])
def test_sparse_equals_reference(
    query_len: int, cached_len: int, stride: int, num_heads: int, num_kv_heads: int,
    correction: bool, most: int,
) -> None:
    """Up to ``most`` key tiles on each list; the piece begins inside the lists."""
    from longspan.ops.sparse import hopper as hopper_sparse

    q, cache, table = make_case(query_len, cached_len, num_heads, num_kv_heads)
    selection = random_selection(num_heads, cached_len + query_len, seed=stride)
    if most:
        selection = oracle.with_lists(random.Random(stride), selection, cached_len,
                                      cached_len + query_len, most, min(1, cached_len // P))
    if stride % (8 * P) == 0:  # most lists go with means of eight tiles from somewhere on
        selection = selection._replace(near_tiles={0: None, 3: 2, 40: 0}[most])
    args = (q, cache, table, cached_len, make_rotary(stride), 0.088, selection, correction)
    out, lse, kept = hopper_sparse.sparse_prefill_attention(*args)
    expected, expected_lse, expected_kept = reference.sparse_prefill_attention(*args)
    assert relative_error(out, expected) < TOLERANCE
    assert relative_error(lse, expected_lse) < TOLERANCE
    assert float(kept) == float(expected_kept)


def test_same_numbers_every_time() -> None:
    """No race between producer and consumers: a long call gives the same bits ten times."""
    from longspan.ops.dense import hopper

    q, cache, table = make_case(2048, 6144, 28, 4)
    args = (q, cache, table, 6144, make_rotary(1024), 0.088)
    first = hopper.prefill_attention(*args)
    for _ in range(10):
        again = hopper.prefill_attention(*args)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_same_sparse_numbers_every_time() -> None:
    from longspan.ops.sparse import hopper as hopper_sparse

    q, cache, table = make_case(2048, 6144, 28, 4)
    selection = oracle.with_lists(
        random.Random(1), random_selection(28, 8192, seed=1), 6144, 8192, 20)
    args = (q, cache, table, 6144, make_rotary(1024), 0.088, selection, True)
    first = hopper_sparse.sparse_prefill_attention(*args)
    for _ in range(10):
        again = hopper_sparse.sparse_prefill_attention(*args)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
