"""The selection kernels on a CUDA GPU at real shapes against `ops.select`, their specification."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longspan.attention.rope import build_rotary
from longspan.bench.ops.checks import check_sound
from longspan.config import DcaConfig
from longspan.ops import reference
from longspan.ops.select import eager as select
from longspan.ops.select.probes import PAPER_TILE_LEN, place_probes
from longspan.ops.types import Budget, PagedKV, QueryRotary, Selection
from tests.gpu.syncs import no_syncs

pytestmark = pytest.mark.gpu

BLOCK, HEADS, KV_HEADS, DIM, DEVICE = 128, 28, 4, 128, "cuda"
SCALE = DIM**-0.5
LENGTH, NEW = 40_000, 8_000
WORKSPACE, SCOUTS_WORKSPACE = 80 << 20, 176 << 20


def make_inputs(length: int, new: int, gain: float) -> tuple[Tensor, PagedKV, Tensor]:
    """Queries of the last ``new`` tokens, a cache with shuffled blocks (NaN beyond the context),
    and the block table. Keys share directions and repeat, so that columns and diagonals exist."""
    generator = torch.Generator(DEVICE).manual_seed(7)
    num_blocks = -(-length // BLOCK)
    shape = (num_blocks + 3, BLOCK, KV_HEADS, DIM)
    k = torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16) * gain
    table = torch.randperm(num_blocks + 3, generator=generator, device=DEVICE)[:num_blocks]
    k[table[-1], (length - 1) % BLOCK + 1 :] = float("nan")
    q = torch.randn(new, HEADS, DIM, generator=generator, device=DEVICE, dtype=torch.bfloat16)
    q += torch.randn(1, HEADS, DIM, generator=generator, device=DEVICE, dtype=torch.bfloat16)
    return q, PagedKV(k, torch.zeros_like(k)), table


def make_rotary(chunk_size: int, local_size: int, max_len: int = 65_536) -> QueryRotary:
    return build_rotary(head_dim=DIM, rope_theta=1e6, max_model_len=max_len, device=DEVICE,
                        dca=DcaConfig(chunk_size=chunk_size, local_size=local_size))


def make_budget(mode: str, strided: int = 0, scouts: int = 0) -> Budget:
    """Heads four times apart."""
    slash = 500 if mode == "tile" else 200
    return Budget(
        vertical=tuple(250 * (1 + head % 4) for head in range(HEADS)),
        slash=tuple(slash * (1 + head % 5) for head in range(HEADS)), mode=mode, probe_last=64,
        probe_strided=strided, sink=4 if mode == "tile" else 30,
        local=256 if mode == "tile" else 100, num_scouts=scouts, scout_threshold=-2.0,
        scout_tiles=64)


def select_on_device(*args: object) -> Selection:
    from longspan.ops.select import triton as sparse_index

    q, cache, _, start, rotary, _, limits = args
    assert sparse_index.supports(q, cache, rotary, start, limits)  # type: ignore[arg-type]
    return sparse_index.select_vertical_slash(*args)  # type: ignore[arg-type]


def covered_mass(mass: Tensor, rows: Tensor, selection: Selection, head: int) -> float:
    """Weight of the probe rows on what the selection keeps. mass: [rows, S]; rows: positions."""
    tile_len = selection.tile_len
    starts = rows // tile_len * tile_len if selection.aligned else rows
    keys = torch.arange(mass.shape[1], device=mass.device)
    kept = torch.zeros_like(mass, dtype=torch.bool)
    columns = selection.columns[head]
    kept[:, columns[columns >= 0]] = True
    for offset in selection.offsets[head].tolist():
        if offset < tile_len:
            first = starts[:, None] + offset
            kept |= (keys >= first) & (keys < first + tile_len)
    return float((mass * kept).sum())


@pytest.mark.parametrize("gain", [1.0, 3.0])
@pytest.mark.parametrize(("chunk_size", "local_size"), [(262_144, 8_192), (20_480, 4_096)])
@pytest.mark.parametrize(("mode", "strided"), [("tile", 0), ("tile", 64), ("paper", 0)])
def test_keeps_as_much_mass_as_the_specification(
    mode: str, strided: int, chunk_size: int, local_size: int, gain: float
) -> None:
    """bf16 rounds the two paths' queries differently, so near ties may fall either way: the kept
    probe mass is what must agree."""
    rotary, limits = make_rotary(chunk_size, local_size), make_budget(mode, strided)
    new = min(NEW, LENGTH % rotary.stride or rotary.stride) // BLOCK * BLOCK
    q, cache, table = make_inputs(LENGTH, new, gain)
    start = LENGTH - new
    args = q, cache, table, start, rotary, SCALE, limits
    ours, theirs = select_on_device(*args), select.select_vertical_slash(*args)
    assert ours.columns.shape == theirs.columns.shape and ours.tile_len == theirs.tile_len
    probes = place_probes(start, new, BLOCK, limits)
    for head in (0, 6, 7, 27):
        columns = ours.columns[head]
        columns = columns[columns >= 0]
        assert len(columns) == limits.vertical[head] and bool((columns.diff() > 0).all())
        if mode == "tile":
            assert len(ours.offsets[head].unique()) == len(theirs.offsets[head].unique())
        keys = cache.k[table].flatten(0, 1)[:LENGTH, head // (HEADS // KV_HEADS)]
        for probe in probes:
            mass = select.probe_mass(q[:, head], keys, probe, start, rotary, SCALE)
            rows = probe.positions(q.device)
            kept, expected = (covered_mass(mass, rows, s, head) for s in (ours, theirs))
            assert kept > 0.995 * expected, f"head {head}: {kept} of {expected}"


@pytest.mark.parametrize(("chunk_size", "local_size"), [
    (262_144, 8_192), (20_480, 4_096), (4_096, 128)])
@pytest.mark.parametrize("scouts", [100, 256])
def test_lists_the_key_tiles_of_the_specification(
    scouts: int, chunk_size: int, local_size: int
) -> None:
    """Near ties may fall either way, of excesses as of scouts; the same twice."""
    rotary, limits = make_rotary(chunk_size, local_size), make_budget("tile", 0, scouts)
    new = min(NEW, LENGTH % rotary.stride or rotary.stride) // BLOCK * BLOCK
    q, cache, table = make_inputs(LENGTH, new, 2.0)
    args = q, cache, table, LENGTH - new, rotary, SCALE, limits
    ours, again, theirs = select_on_device(*args), select_on_device(*args), (
        select.select_vertical_slash(*args))
    assert ours.tiles is not None and again.tiles is not None and theirs.tiles is not None
    assert torch.equal(ours.tiles, again.tiles) and ours.first_tile == theirs.first_tile
    assert ours.tiles.shape == theirs.tiles.shape
    queries = torch.arange(LENGTH - new, LENGTH, BLOCK, device=DEVICE)
    listed = [reference.listed_tiles(s, queries, -(-LENGTH // BLOCK)) for s in (ours, theirs)]
    both, either = (listed[0] & listed[1]).sum(), (listed[0] | listed[1]).sum()
    assert either > 500 and both / either > 0.9, f"{both} of {either}"
    check_sound(ours, LENGTH, HEADS)


@pytest.mark.parametrize("mode", ["tile", "paper"])
def test_never_waits_for_the_device(mode: str) -> None:
    """Not even with budgets it sees for the first time."""
    rotary, limits = make_rotary(262_144, 8_192), make_budget(mode, 0, 256)
    q, cache, table = make_inputs(LENGTH, NEW, 1.0)
    select_on_device(q, cache, table, LENGTH - NEW, rotary, SCALE, limits)  # compiles
    fresh = limits._replace(vertical=tuple(v + 3 for v in limits.vertical),
                            slash=tuple(s + 200 for s in limits.slash))
    with no_syncs():
        selection = select_on_device(q, cache, table, LENGTH - NEW, rotary, SCALE, fresh)
    assert selection.tile_len == (BLOCK if mode == "tile" else PAPER_TILE_LEN)


@pytest.mark.parametrize(("mode", "strided", "scouts"), [
    ("tile", 0, 0), ("tile", 64, 0), ("tile", 64, 256), ("paper", 0, 0)])
def test_workspace_of_a_million_keys(mode: str, strided: int, scouts: int) -> None:
    length, new = 1_048_576 - 4_096, 28_672
    rotary = make_rotary(262_144, 8_192, 1_048_576)
    q, cache, table = make_inputs(length, new, 1.0)
    args = q, cache, table, length - new, rotary, SCALE, make_budget(mode, strided, scouts)
    selection = select_on_device(*args)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    again = select_on_device(*args)
    allowed = SCOUTS_WORKSPACE if scouts else WORKSPACE
    assert torch.cuda.max_memory_allocated() - before <= allowed + 2 * again.offsets.nbytes
    assert torch.equal(selection.columns, again.columns)
    assert bool((selection.columns[:, 1:] > selection.columns[:, :-1])[:, :200].all())
