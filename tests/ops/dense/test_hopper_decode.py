"""Hopper's decode: its source, simulated, against the specification; what it takes; how bytes
become bf16. Compiled it is tested on GPUs."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan.ops import int8_kv, reference
from longspan.ops.dense import hopper_decode, hopper_decode_kernel
from longspan.ops.dense.hopper_decode import Launch
from longspan.ops.tiles import hopper as hopper_tile
from longspan.ops.types import KeySpans, PagedKV
from tests.conftest import assert_close
from tests.ops import gluon_simulator, oracle
from tests.ops.oracle import Positions
from tests.ops.quant.test_int8_kv import as_int8

SHAPE: Any = {"head_dim": 128, "block_size": 128, "dtype": torch.bfloat16}


def simulate(patch: pytest.MonkeyPatch, seed: int = 0) -> None:
    """From here on the kernel is simulated."""
    simulator = gluon_simulator.simulate(patch, hopper_decode_kernel, "decode_kernel", seed)
    patch.setattr(hopper_decode, "decode_kernel", simulator)


def simulated(
    patch: pytest.MonkeyPatch, cases: list[oracle.Case], num_rows: int, programs: int,
    stages: int = 2, seed: int = 0,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The last rows of each case, all in one cache and one batch: what the kernel gives, and the
    specification."""
    parts = [case.cache for case in cases]
    def joined(name: str) -> Tensor:
        return torch.cat([part.by_block()[name] for part in parts])
    names = ("k", "v") if parts[0].k_scale is None else ("k", "v", "k_scale", "v_scale")
    cache = PagedKV(**{name: joined(name) for name in names}, k_gain=parts[0].k_gain)
    tables, base = [], 0
    for case in cases:
        table = torch.full((max(len(each.block_table) for each in cases),), 1 << 30)
        table[: len(case.block_table)] = case.block_table + base
        tables.append(table)
        base += len(case.cache.k)
    q = torch.cat([case.q[len(case.q) - num_rows :] for case in cases])
    rotary = max((case.rotary for case in cases), key=lambda rotary: len(rotary.cos))
    scales = torch.tensor([case.scale * (1 + 0.1 * i) for i, case in enumerate(cases)])
    lens = torch.tensor([len(case.q) for case in cases])
    simulate(patch, seed)
    found = hopper_decode.attend(q, cache, torch.stack(tables), lens, rotary, scales, num_rows,
                                 Launch(1, stages, 168), programs)
    rows = [reference.prefill_attention(
        case.q[len(case.q) - num_rows :], cache, table[: len(case.block_table)],
        len(case.q) - num_rows, rotary, float(scale))
        for case, table, scale in zip(cases, tables, scales, strict=True)]
    return found, (torch.cat([out for out, _ in rows]), torch.cat([lse for _, lse in rows]))


@pytest.mark.parametrize("is_int8", [True, False], ids=["int8", "bf16"])
@pytest.mark.parametrize(("lengths", "num_rows", "programs", "positions"), [
    ((1,), 1, 3, Positions(8192, 1024)), ((130,), 1, 1, Positions(8192, 1024)),
    ((900,), 1, 1, Positions(320, 64)),  # one program, all zones
    ((1_000,), 1, 3, Positions(320, 64)), ((1_025,), 1, 9, Positions(320, 64)),
    ((200, 1, 700, 64), 1, 3, Positions(320, 64)),  # shares that end within requests
    ((5, 3, 129), 1, 7, Positions(320, 64)),  # fewer tiles than programs
    ((515,), 5, 2, Positions(320, 64)),  # rows on both sides of a border
    ((771,), 8, 3, Positions(320, 64))], ids=str)
def test_as_the_specification(
    lengths: tuple[int, ...], num_rows: int, programs: int, positions: Positions, is_int8: bool,
    kernel_device: str, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NaN in every slot that no token has, and scales of NaN."""
    if kernel_device != "cpu":
        pytest.skip("simulated on CPUs")
    gain = int8_kv.key_gains(torch.ones(2, 128).index_fill_(1, torch.tensor([3]), 80.0))
    cases = [oracle.make_case(length, positions, num_heads=6, num_kv_heads=2, **SHAPE)
             for length in lengths]
    cases = [as_int8(case, gain) for case in cases] if is_int8 else cases
    (out, lse), (expected, expected_lse) = simulated(monkeypatch, cases, num_rows, programs)
    assert_close(out, expected, "out")
    assert_close(lse, expected_lse, "lse", torch.bfloat16)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_any_order_of_copies(
    stages: int, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ring of any depth, copies that end in any order, two consumers of their own pace."""
    if kernel_device != "cpu":
        pytest.skip("simulated on CPUs")
    case = as_int8(oracle.make_case(1_500, Positions(640, 128), num_heads=14, num_kv_heads=2,
                                    **SHAPE))
    for seed in range(3):
        with monkeypatch.context() as patch:
            (out, _), (expected, _) = simulated(patch, [case], 1, 1, stages, seed)
            assert_close(out, expected, f"seed {seed}")


def test_a_request_without_a_token(
    kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding of a graph, among others and alone."""
    if kernel_device != "cpu":
        pytest.skip("simulated on CPUs")
    case = as_int8(oracle.make_case(300, Positions(320, 64), num_heads=2, num_kv_heads=1, **SHAPE))
    simulate(monkeypatch)
    tables = case.block_table.repeat(3, 1)
    for lens in ([0, 300, 0], [0, 0, 0]):
        out, lse = hopper_decode.attend(
            case.q[-1:].repeat(3, 1, 1), case.cache, tables, torch.tensor(lens), case.rotary,
            torch.full((3,), case.scale), 1, Launch(1, 2, 168), 4)
        empty = torch.tensor(lens) == 0
        assert out[empty].eq(0).all() and lse[empty].eq(float("-inf")).all()
        assert out.isfinite().all() and lse[~empty].isfinite().all()


def test_bytes_become_bf16() -> None:
    """The first and the second of all pairs of bytes, by the instructions that are compiled."""
    source = inspect.getsource(hopper_decode_kernel._numbers.fn)
    bytes_ = torch.arange(-128, 128, dtype=torch.int8)
    pairs = torch.cartesian_prod(bytes_, bytes_)
    first, second = gluon_simulator._assembly(
        source, "", [pairs.reshape(-1, 128).view(torch.int16)],
        dtype=(torch.bfloat16, torch.bfloat16), is_pure=True, pack=2)
    assert torch.equal(first.flatten().float(), pairs[:, 0].float())
    assert torch.equal(second.flatten().float(), pairs[:, 1].float())


def test_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper alone: bf16 or int8 beside it, blocks of 128, whole tiles in a DCA chunk, up to 64
    lanes, rows for two launches."""
    case = oracle.make_case(300, Positions(256, 128), num_heads=14, num_kv_heads=2, **SHAPE)
    small = as_int8(case)
    assert not hopper_decode.supports(case.q, small.cache, case.rotary)
    monkeypatch.setattr(hopper_tile, "is_hopper", lambda device: True)
    for cache in (case.cache, small.cache):
        is_int8 = cache is small.cache
        assert hopper_decode.takes_decode(case.q, cache, case.rotary, None) is is_int8
        none = torch.zeros(300, dtype=torch.int64)
        assert not hopper_decode.takes_decode(case.q, cache, case.rotary, KeySpans(none, none))
        assert hopper_decode.supports(case.q, cache, case.rotary)
        for count, taken in ((0, False), (1, True), (18, True), (19, False)):
            assert hopper_decode.takes_rows(case.q[:count], cache, case.rotary) is taken, count
    short = case.rotary._replace(stride=250)
    assert not hopper_decode.supports(case.q, small.cache, short)
    plain = case.rotary._replace(stride=300, clamp=300)  # as long as its tables: one chunk
    assert hopper_decode.supports(case.q, small.cache, plain)
    single = case.cache._replace(k=case.cache.k[:, :64], v=case.cache.v[:, :64])
    assert not hopper_decode.supports(case.q, single, case.rotary)
    assert not hopper_decode.supports(case.q.half(), small.cache, case.rotary)
    wide = case.q[:, :1].expand(-1, 130, -1)
    assert not hopper_decode.supports(wide, small.cache, case.rotary)
