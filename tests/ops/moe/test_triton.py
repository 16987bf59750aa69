"""Kernels of routed experts against the specification: experts without a token and with many."""

from __future__ import annotations

import pytest
import torch

from longspan.ops import reference
from longspan.ops.moe import grouped
from longspan.ops.moe import triton as kernels
from longspan.ops.moe import triton_routing as routing
from tests.conftest import assert_close
from tests.ops.moe.test_eager import SHAPES, make_case, without_some

TILES = {
    "few": (kernels.Tiles(16, 16, 16, 2, 4), kernels.Tiles(16, 32, 16, 2, 4)),
    "many": (kernels.Tiles(32, 16, 32, 2, 4), kernels.Tiles(16, 16, 64, 2, 4))}


@pytest.mark.parametrize("is_normed", [False, True])
@pytest.mark.parametrize(("num_tokens", "num_experts", "num_chosen"), [
    (1, 128, 8), (7, 60, 4), (33, 9, 9), (5, 1, 1), (0, 8, 2)])
def test_route(
    num_tokens: int, num_experts: int, num_chosen: int, is_normed: bool, kernel_device: str,
) -> None:
    logits = 3 * torch.randn(num_tokens, num_experts, device=kernel_device)
    weights, experts = routing.route(logits, num_chosen, is_normed)
    wanted, chosen = reference.route(logits, num_chosen, is_normed)
    assert torch.equal(experts.long(), chosen)
    if num_tokens:
        assert_close(weights, wanted)


def test_routing_logits_that_are_not_finite_stays_inside(kernel_device: str) -> None:
    logits = torch.full((3, 12), torch.nan, device=kernel_device)
    logits[1] = -torch.inf
    logits[2] = 1.0  # equal ones: the first
    weights, experts = routing.route(logits, 2, True)
    assert ((experts >= 0) & (experts < 12)).all() and experts[2].tolist() == [0, 1]
    assert weights[0].isnan().all() and weights[2].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("way", ["counted", "tallied", "integers"])
@pytest.mark.parametrize(("num_tokens", "num_experts", "num_chosen"), [
    (1, 128, 8), (40, 7, 3), (129, 60, 4)])
def test_group(
    num_tokens: int, num_experts: int, num_chosen: int, way: str,
    monkeypatch: pytest.MonkeyPatch, kernel_device: str,
) -> None:
    monkeypatch.setattr(routing, "COUNTED_ROUTES", 10_000 if way == "counted" else 0)
    monkeypatch.setattr(routing, "TALLIED_EXPERTS", 255 if way == "tallied" else 0)
    monkeypatch.setattr(routing, "TALLIED_ROUTES", 16)
    experts = torch.rand(num_tokens, num_experts, device=kernel_device).topk(num_chosen).indices
    here = max(1, num_experts - 3)  # the last ones are elsewhere
    experts = experts.clamp(max=here)
    order, ends = routing.group(experts, here)
    flat = experts.flatten()
    assert order.dtype == ends.dtype == torch.int32
    assert torch.equal(order.long(), flat.argsort(stable=True))
    assert torch.equal(ends.long(), flat.bincount(minlength=here).cumsum(0)[:here])


@pytest.mark.parametrize(("shape", "dtype", "tiles"), [
    (SHAPES[0], torch.bfloat16, "few"), (SHAPES[1], torch.bfloat16, "few"),
    (SHAPES[2], torch.float32, "few"), (SHAPES[2], torch.bfloat16, "many")], ids=str)
def test_experts_are_added(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, tiles: str,
    monkeypatch: pytest.MonkeyPatch, kernel_device: str,
) -> None:
    monkeypatch.setattr(kernels, "choose_tiles", lambda *_: TILES[tiles])
    monkeypatch.setattr(kernels, "SUPER", 3)
    case = make_case(shape, dtype, kernel_device)
    expected, sums = case[0].clone(), case[0].clone()
    reference.add_routed_mlp(expected, *case[1:])
    kernels.add_routed_mlp(sums, *case[1:])
    assert_close(sums, expected)


@pytest.mark.parametrize("way", ["kernels", "grouped"])
def test_experts_that_are_elsewhere_add_nothing(
    way: str, monkeypatch: pytest.MonkeyPatch, kernel_device: str,
) -> None:
    """Whatever stands where their rows would."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    case = without_some(make_case((37, 7, 3, 16, 24), torch.bfloat16, kernel_device))
    expected, sums = case[0].clone(), case[0].clone()
    reference.add_routed_mlp(expected, *case[1:])
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        (kernels if way == "kernels" else grouped).add_routed_mlp(sums, *case[1:])
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(sums, expected)


def test_rows_of_a_wider_tensor(kernel_device: str) -> None:
    """A part of the residual stream, and normed rows with a stride."""
    sums, x, *rest = make_case((9, 4, 2, 16, 24), torch.float32, kernel_device)
    wide = torch.full((9, 40), torch.nan, device=kernel_device)
    wide[:, 8:24] = x
    expected, whole = sums.clone(), torch.cat((sums, sums))
    reference.add_routed_mlp(expected, x, *rest)
    kernels.add_routed_mlp(whole[9:], wide[:, 8:24], *rest)
    assert_close(whole[9:], expected)
    assert torch.equal(whole[:9], sums) and wide[:, :8].isnan().all()


def test_rows_come_in_any_order_and_unweighted(kernel_device: str) -> None:
    sums, routed = (torch.randn(n, 24, device=kernel_device) for n in (5, 15))
    weights = torch.rand(5, 3, device=kernel_device)
    places = torch.randperm(15, device=kernel_device)
    expected = sums + (routed[places] * weights.reshape(-1, 1)).unflatten(0, (5, 3)).sum(1)
    kernels.combine(sums, routed, weights, places.int())
    assert_close(sums, expected)


def test_rows_of_weight_0_are_not_read(kernel_device: str) -> None:
    sums, routed = torch.zeros(2, 24, device=kernel_device), torch.ones(4, 24, device=kernel_device)
    weights = torch.tensor([[0.5, 0.0], [0.0, torch.nan]], device=kernel_device)
    routed[1:3] = torch.nan
    kernels.combine(sums, routed, weights)
    assert torch.equal(sums, torch.ones_like(sums))
    kernels.combine(sums, routed, weights, torch.arange(4, device=kernel_device).int())
    assert torch.equal(sums[0], torch.full_like(sums[0], 1.5)) and sums[1].isnan().all()


@pytest.mark.parametrize(("num_routes", "kind"), [
    (8, kernels.FEW), (512, kernels.FEW), (4_096, kernels.SOME), (262_144, kernels.MANY)])
def test_tiles_follow_the_rows_of_an_expert(
    num_routes: int, kind: tuple[kernels.Tiles, kernels.Tiles],
) -> None:
    assert kernels.choose_tiles(num_routes, 128) == kind


@pytest.mark.parametrize(("num_routes", "num_experts", "rows", "most"), [
    (8, 128, 16, 8), (512, 128, 16, 159), (3, 1, 16, 1), (262_144, 128, 128, 2_175)])
def test_grids_hold_every_tile(num_routes: int, num_experts: int, rows: int, most: int) -> None:
    assert kernels.row_tiles(num_routes, num_experts, rows) == most


def test_grouped_products_of_pytorch(kernel_device: str) -> None:
    case = make_case((37, 7, 3, 16, 24), torch.bfloat16, kernel_device)
    expected, sums = case[0].clone(), case[0].clone()
    reference.add_routed_mlp(expected, *case[1:])
    assert grouped.supports(case[1], *case[4:])
    grouped.add_routed_mlp(sums, *case[1:])
    assert_close(sums, expected)


def test_what_pytorch_does_not_multiply() -> None:
    x, gate_up, down = (torch.zeros(shape, dtype=torch.bfloat16)
                        for shape in ((3, 16), (2, 40, 16), (2, 16, 20)))
    assert not grouped.supports(x, gate_up, down)  # rows of 40 bytes
    assert not grouped.supports(x.float(), gate_up.float(), down[..., :16].float())
