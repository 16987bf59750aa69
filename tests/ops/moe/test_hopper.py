"""What Hopper's products of experts read from a table, and what they take. The products themselves:
`tests/gpu/test_experts_cuda.py`."""

from __future__ import annotations

import pytest
import torch

from longspan.ops.moe import hopper
from longspan.ops.moe.hopper_product import TILE_ROWS
from longspan.ops.moe.triton_routing import Groups
from longspan.ops.quant import eager as eager_quant
from longspan.ops.types import Fp8Weights


@pytest.mark.parametrize("counts", [
    [1], [0, 0, 0], [128, 0, 129, 1, 0], [0, 700, 0, 3, 256, 127], [5] * 60], ids=str)
@pytest.mark.parametrize("is_rounded", [False, True])
def test_tiles_are_listed(counts: list[int], is_rounded: bool, kernel_device: str) -> None:
    """Each expert's routes in their order, and tiles filled up with tokens of the same expert."""
    chosen = 3
    num_routes = -(-sum(counts) // chosen) * chosen + chosen  # some are elsewhere
    ends = torch.tensor(counts, device=kernel_device).cumsum(0).int()
    order = torch.randperm(num_routes).int().to(kernel_device)
    x = torch.randn(num_routes // chosen, 8, device=kernel_device)
    rows = eager_quant.quantize_activations(x, 0)
    tiles = hopper.list_tiles(Groups(order, ends), chosen, rows if is_rounded else x)
    experts = [expert for expert, count in enumerate(counts) for _ in range(-(-count // TILE_ROWS))]
    assert tiles.experts[-1] == len(experts) < len(tiles.experts)
    assert tiles.experts[: len(experts)].tolist() == experts
    place = start = 0
    for count in counts:
        routes = order[start : start + count].long()
        places = torch.arange(place, place + count, device=kernel_device)
        assert torch.equal(tiles.places[routes], places.int())
        assert torch.equal(tiles.tokens[places], routes.int() // chosen)
        start, place = start + count, place - (-count // TILE_ROWS) * TILE_ROWS
        filled = tiles.tokens[int(places[-1]) + 1 if count else place : place]
        assert set(filled.tolist()) <= set((routes // chosen).tolist())
    assert (tiles.scales is not None) is is_rounded
    if tiles.scales is not None:
        assert torch.equal(tiles.scales[:place], rows.scales[tiles.tokens[:place].long(), 0])


SIZES = (torch.bfloat16, 512, 512)


@pytest.mark.parametrize(("dtype", "dim", "width", "is_taken"), [
    (*SIZES, True), (torch.bfloat16, 512, 768, True), (torch.bfloat16, 520, 512, False),
    (torch.bfloat16, 512, 192, False), (torch.float32, 512, 512, False)])
def test_what_is_taken(
    dtype: torch.dtype, dim: int, width: int, is_taken: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hopper, "is_hopper", lambda _: True)
    x, up, down = (torch.zeros(size, dtype=dtype)
                   for size in ((3, dim), (2, 2 * width, dim), (2, dim, width)))
    assert hopper.supports(x, up, down) is is_taken
    assert not hopper.supports(x.t().contiguous().t(), up, down)


@pytest.mark.parametrize(("dim", "width", "by_rows", "is_taken"), [
    (512, 512, True, True), (512, 512, False, False), (512, 640, True, True),
    (256, 512, True, False)])
def test_what_is_taken_of_fp8(
    dim: int, width: int, by_rows: bool, is_taken: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hopper, "is_hopper", lambda _: True)
    matrices = []
    for rows, columns in ((2 * width, dim), (dim, width)):
        scales = (rows, 1) if by_rows else (rows // 128, columns // 128)
        matrices.append(Fp8Weights(torch.zeros(2, rows, columns, dtype=torch.float8_e4m3fn),
                                   torch.ones(2, *scales)))
    x = torch.zeros(3, dim, dtype=torch.bfloat16)
    assert hopper.supports(x, *matrices) is is_taken
    assert not hopper.supports(x, matrices[0], torch.zeros(2, dim, width, dtype=torch.bfloat16))
    monkeypatch.undo()
    assert not hopper.supports(x, *matrices)  # no Hopper GPU
