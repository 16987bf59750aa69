"""Selection kernels against `ops.select`, their specification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan.ops import reference
from longspan.ops.select import eager as select
from longspan.ops.select import top_k as threshold
from longspan.ops.select import triton as sparse_index
from longspan.ops.select import triton_scouts as scouts_triton
from longspan.ops.select.probes import Probe, place_probes
from longspan.ops.types import Budget, Selection
from tests.ops import oracle
from tests.ops.oracle import Case, Positions

interpreted = pytest.mark.parametrize("kernel_device", ["cpu"], indirect=True, ids=["interpreted"])
"""Exact in fp32, which kernels compiled for GPUs do not take; `tests/gpu` tests those."""
PLAIN = Positions(4096, 96)
ZONED = Positions(128, 32)  # stride 96: six tiles of 16, three of 32


def budget(mode: str, vertical: list[int], slash: list[int], **changes: float) -> Budget:
    policy = {"probe_last": 64, "probe_strided": 0, "sink": 4 if mode == "tile" else 30,
              "local": 20 if mode == "tile" else 100}
    return Budget(vertical=tuple(vertical), slash=tuple(slash), mode=mode,
                  **(policy | changes))  # type: ignore[arg-type]


def run(case: Case, start: int, limits: Budget, module: Any) -> Selection:
    cache = oracle.only_first(case, len(case.q))
    q = case.q[start:]
    assert sparse_index.supports(q, cache, case.rotary, start, limits)
    return module.select_vertical_slash(
        q, cache, case.block_table, start, case.rotary, case.scale, limits)


def entries(rows: Tensor, padding: int) -> list[list[int]]:
    """Rows without the padding, which may only stand at their end."""
    kept = [[value for value in row if value != padding] for row in rows.tolist()]
    assert [row[: len(short)] for row, short in zip(rows.tolist(), kept, strict=True)] == kept
    return kept


def massless(selection: Selection, start: int, length: int, limits: Budget) -> Tensor:
    """[H, S] keys that each probe row sees through a window or not at all."""
    probes = place_probes(start, length - start, selection.tile_len, limits)
    rows = torch.cat([probe.positions(torch.device("cpu")) for probe in probes])
    queries = torch.arange(start, length)
    windows = selection._replace(columns=selection.columns[:, :0].cpu(),
                                 offsets=selection.offsets.cpu())
    seen = reference.kept_pairs(windows, queries, length)[:, rows - start]
    return (seen | (torch.arange(length) > rows[:, None])).all(1)


def check(case: Case, start: int, limits: Budget) -> Selection:
    """The same entries for every head, except that columns without any mass are all alike. The
    kernels may pad further."""
    actual, expected = (run(case, start, limits, module) for module in (sparse_index, select))
    assert (actual.tile_len, actual.aligned) == (expected.tile_len, expected.aligned)
    assert actual.columns.shape == expected.columns.shape
    offsets = [entries(s.offsets, s.tile_len) for s in (actual, expected)]
    assert offsets[0] == offsets[1]
    columns = [entries(s.columns, -1) for s in (actual, expected)]
    assert actual.max_columns is not None  # the bound that scratch memory is taken for
    assert all(len(row) <= most for row, most in zip(columns[0], actual.max_columns, strict=True))
    alike = massless(actual, start, len(case.q), limits)
    for head, (ours, theirs) in enumerate(zip(*columns, strict=True)):
        assert ours == sorted(set(ours)) and len(ours) == len(theirs), f"head {head}"
        differing = sorted(set(ours) ^ set(theirs))
        assert limits.mode == "tile" and alike[head, differing].all() or not differing, (
            f"columns {differing} of head {head}")
    check_lists(actual, expected, differing=bool(set(map(tuple, columns[0])) ^ set(
        map(tuple, columns[1]))))
    return actual


def check_lists(actual: Selection, expected: Selection, *, differing: bool) -> None:
    """The same key tiles for every query tile, if the columns are the same."""
    assert (actual.tiles is None) is (expected.tiles is None)
    if actual.tiles is None or expected.tiles is None or differing:
        return
    assert actual.first_tile == expected.first_tile
    assert actual.tiles.shape == expected.tiles.shape and actual.tiles.dtype == torch.int32
    for ours, theirs in zip(actual.tiles, expected.tiles, strict=True):
        assert entries(ours, -1) == entries(theirs, -1)


# positions, start, length, tile length, strided probes
TILE_CASES = [
    pytest.param(PLAIN, 0, 63, 16, 64, id="63-all-rows-are-probes"),
    pytest.param(PLAIN, 0, 111, 32, 7, id="111"),
    pytest.param(PLAIN, 192, 193, 32, 64, id="one-token"),
    pytest.param(PLAIN, 160, 299, 16, 0, id="299"),
    pytest.param(PLAIN, 130, 290, 64, 20, id="wide-tiles"),
    pytest.param(ZONED, 96, 192, 32, 0, id="succ"),
    pytest.param(ZONED, 200, 288, 16, 24, id="inter"),
    pytest.param(ZONED, 304, 347, 16, 64, id="mid-chunk"),
]


@interpreted
@pytest.mark.parametrize(("positions", "start", "length", "tile", "strided"), TILE_CASES)
def test_tile_mode(
    positions: Positions, start: int, length: int, tile: int, strided: int, kernel_device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four heads of one KV head, budgets four times apart; NaN in all slots beyond the context."""
    monkeypatch.setattr(sparse_index, "COLUMN_TILES", 2)
    case = oracle.make_case(length, positions, num_heads=4, head_dim=32, block_size=tile, gain=1.2,
                            device=kernel_device)
    check(case, start, budget("tile", [5, 10, 20, 0], [16, 32, 64, 48], probe_strided=strided))


@interpreted
@pytest.mark.parametrize("workspace", [1, 1 << 20])
def test_several_budgets_at_once(
    workspace: int, kernel_device: str, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One pass of the probe rows for all of them, and each what it is alone, none for no column."""
    monkeypatch.setattr(sparse_index, "WORKSPACE_BYTES", workspace)
    case = oracle.make_case(347, ZONED, num_heads=4, num_kv_heads=2, head_dim=32, block_size=16,
                            gain=1.2, device=kernel_device)
    args = (case.q[304:], oracle.only_first(case, 347), case.block_table, 304, case.rotary,
            case.scale)
    budgets = [budget("tile", [count] * 4, [slash, 16, 64, 48])
               for count, slash in ((0, 16), (5, 32), (60, 200))]
    passes, pass_one = list[Any](), sparse_index._pass_one

    def counted(*given: Any) -> Tensor:
        passes.append(given)
        return pass_one(*given)

    monkeypatch.setattr(sparse_index, "_pass_one", counted)
    found = sparse_index.select_several(*args, budgets)
    assert len(passes) == (2 if workspace == 1 else 1)  # by KV head, or once
    for one, limits, specified in zip(
            found, budgets, select.select_several(*args, budgets), strict=True):
        alone = sparse_index.select_vertical_slash(*args, limits)
        assert torch.equal(one.columns, alone.columns) and torch.equal(one.offsets, alone.offsets)
        assert entries(one.offsets, 16) == entries(specified.offsets, 16)
        assert one.columns.shape == specified.columns.shape


RELEASED_CASES = [  # 262,144 / 8,192 and 131,072 / 4,096, smaller
    pytest.param(Positions(chunk, local), 2 * (chunk - local) + 16, 2 * (chunk - local) + 111, 16,
                 0, id=f"released-{chunk}") for chunk, local in ((1024, 32), (512, 16))]


@interpreted
@pytest.mark.parametrize(("positions", "start", "length", "tile", "strided"), [
    *TILE_CASES, *RELEASED_CASES])
@pytest.mark.parametrize("most", [2, 99])
def test_scouts(
    positions: Positions, start: int, length: int, tile: int, strided: int, most: int,
    kernel_device: str, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More of them than a product takes, and than there are rows; fewer tiles than are missed, and
    more than there are; heads one after another."""
    monkeypatch.setattr(scouts_triton, "ROW_BLOCK", 16)
    monkeypatch.setattr(scouts_triton, "WORKSPACE_BYTES", 1 if most == 2 else 1 << 20)
    case = oracle.make_case(length, positions, num_heads=4, num_kv_heads=2, head_dim=32,
                            block_size=tile, gain=1.2, device=kernel_device)
    limits = budget("tile", [5] * 4, [16, 32, 64, 48], probe_strided=strided, num_scouts=20,
                    scout_threshold=-1.5, scout_tiles=most)
    selection = check(case, start, limits)
    assert selection.tiles is not None
    if length > start + 1 > 1 and most == 99:
        found = (selection.tiles >= 0).sum(2)
        assert found.max() > 1, "nothing was tested"


PAPER_CASES = [
    pytest.param(PLAIN, 0, 63, id="63"), pytest.param(PLAIN, 190, 299, id="299"),
    pytest.param(PLAIN, 200, 201, id="one-token"), pytest.param(ZONED, 310, 370, id="inter"),
]


@interpreted
@pytest.mark.parametrize(("positions", "start", "length"), PAPER_CASES)
def test_paper_mode(positions: Positions, start: int, length: int, kernel_device: str) -> None:
    """Budgets below the forced entries, above them, and above everything there is."""
    case = oracle.make_case(length, positions, num_heads=3, head_dim=32, gain=1.2,
                            device=kernel_device)
    check(case, start, budget("paper", [7, 60, 999], [50, 160, 999]))


@interpreted
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "mode"), [
    (2, 2, "tile"), (14, 2, "tile"), (2, 2, "paper"), (10, 2, "paper")])
def test_head_groups(
    num_heads: int, num_kv_heads: int, mode: str, kernel_device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A workspace too small for two KV heads gives the same as one that holds all."""
    case = oracle.make_case(180, PLAIN, num_heads=num_heads, num_kv_heads=num_kv_heads,
                            device=kernel_device)
    vertical, slash = ([10 + 9 * i % 40 for i in range(num_heads)] for _ in range(2))
    limits = budget(mode, vertical, [100 + s for s in slash] if mode == "paper" else slash,
                    probe_last=32)
    whole = check(case, 100, limits)
    if num_heads == 2:
        monkeypatch.setattr(sparse_index, "WORKSPACE_BYTES", 1)
        split = run(case, 100, limits, sparse_index)
        assert all(torch.equal(a, b) for a, b in zip(whole[:2], split[:2], strict=True))


@interpreted
def test_budgets_above_the_history(kernel_device: str) -> None:
    case = oracle.make_case(80, PLAIN, num_heads=2, device=kernel_device)
    selection = check(case, 48, budget("tile", [9999, 3], [9999, 9999], probe_last=16))
    assert entries(selection.columns, -1) == [list(range(80)), [0, 1, 2]]
    assert selection.offsets.tolist() == [[0, -16, -32, -48, -64]] * 2


def test_bf16_keeps_the_mass(kernel_device: str) -> None:
    """bf16 rounds the paths' queries differently: near ties may fall either way."""
    case = oracle.make_case(299, ZONED, num_heads=4, head_dim=32, gain=1.2, dtype=torch.bfloat16,
                            device=kernel_device)
    limits = budget("tile", [20, 40, 60, 80], [32, 48, 64, 80], probe_strided=20)
    start = 288
    keys = case.cache.k[case.block_table].flatten(0, 1)[:299, 0]
    kept = []
    for module in (sparse_index, select):
        selection = run(case, start, limits, module)
        pairs = reference.kept_pairs(selection, torch.arange(start, 299), 299)
        kept.append([])
        for head in range(4):
            probe = Probe(start, 1, 11)
            mass = select.probe_mass(
                case.q[start:, head], keys, probe, start, case.rotary, case.scale)
            kept[-1].append(float((mass.cpu() * pairs[head].cpu()).sum()))
    assert torch.tensor(kept[0]) == pytest.approx(torch.tensor(kept[1]), rel=5e-3)


# -- the k largest ----------------------------------------------------------------------------


def largest(values: Tensor, budgets: list[int], forced: int = 0, backwards: bool = False) -> Tensor:
    out = torch.full((len(values), max(budgets)), -1, dtype=torch.int64, device=values.device)
    limits = torch.tensor(budgets, dtype=torch.int32, device=values.device)
    threshold.select_largest(values.clone(), limits, out, forced, floor=0, backwards=backwards)
    return out


def sorted_top(row: Tensor, count: int) -> list[int]:
    """Ties go to the lower index."""
    return sorted(torch.sort(row, descending=True, stable=True).indices[:count].tolist())


def check_largest(values: Tensor, budgets: list[int], device: str) -> None:
    found = entries(largest(values.to(device), budgets), -1)
    for head, count in enumerate(budgets):
        assert found[head] == sorted_top(values[head], min(count, values.shape[1])), f"head {head}"


@pytest.mark.parametrize("size", [1, 100, 9000, 20_000])
def test_largest_of_every_magnitude(size: int, kernel_device: str) -> None:
    """As many as one program takes: up to all of them."""
    values = torch.rand(4, size).pow(40)  # down to denormals and zeros
    values[1] = (values[1] * 20).round() / 20  # ties everywhere
    values[2] = torch.where(torch.rand(size) < 0.9, 0.0, values[2])
    check_largest(values, [size // 3 + 1, 77, size // 2, size + 5], kernel_device)


def few_large(size: int) -> Tensor:
    """Nearly all of them tiny, in part denormal; the large ones in clusters."""
    values = torch.rand(size) * 1e-37
    for start in range(500, size, 4096):
        values[start : start + 90] = torch.rand(len(values[start : start + 90]))
    return values


CONTENTS: dict[str, Callable[[int], Tensor]] = {
    "uniform": torch.rand,
    "exponential": lambda size: torch.empty(size).exponential_(),
    "magnitudes": lambda size: torch.rand(size).pow(40),
    "few-large": few_large,
    "descending": lambda size: torch.linspace(1, 0, size),
    "steps": lambda size: (torch.rand(size) * 20).floor() / 20,
    "equal": lambda size: torch.full((size,), 3e-7),
    "zeros": torch.zeros,
    "few-above-zero": lambda size: torch.where(torch.rand(size) < 0.01, torch.rand(size), 0.0),
}


@pytest.mark.parametrize("content", CONTENTS)
def test_largest_by_way_of_a_list(content: str, kernel_device: str) -> None:
    size = 24_001  # not whole blocks, nor whole rows of groups
    values = torch.stack([CONTENTS[content](size) for _ in range(4)])
    check_largest(values, [650, 77, 1, 0], kernel_device)


def test_largest_where_the_list_overflows(kernel_device: str) -> None:
    """600 groups are far heavier than the rest, and 650 numbers are wanted: the bound is low."""
    groups, size = threshold.LEAST_GROUPS, 20_480
    row, column = torch.arange(size) // groups, torch.arange(size) % groups
    group = (column - row * threshold.SHIFT.value) % groups
    values = torch.rand(2, size) * 1e-3
    values[:, group < 600] += 1
    assert (group < 600).sum() > 1.5 * groups
    check_largest(values, [650, 500], kernel_device)


@pytest.mark.parametrize("size", [300, 20_000])
def test_forced_entries_rank_first_from_either_end(size: int, kernel_device: str) -> None:
    values = torch.rand(2, size, device=kernel_device)
    assert largest(values, [5, 3], forced=5).tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, -1, -1]]
    backwards = largest(values, [5, 3], forced=5, backwards=True)
    assert backwards.tolist() == [[4, 3, 2, 1, 0], [2, 1, 0, -1, -1]]


def test_many_entries(kernel_device: str) -> None:
    check_largest(torch.rand(1, 1 << 17), [4000], kernel_device)
