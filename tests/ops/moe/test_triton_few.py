"""Experts of a few tokens in two launches, against the specification."""

from __future__ import annotations

import pytest
import torch

from longspan.ops import reference
from longspan.ops.moe import triton as kernels
from longspan.ops.moe import triton_few as few
from longspan.ops.quant import eager
from longspan.ops.quant.triton_few import arrivals
from longspan.ops.types import Fp8Weights
from tests.conftest import assert_close
from tests.ops.moe.test_eager import make_case, without_some

SHAPES = [(1, 8, 1, 16, 8), (1, 128, 8, 40, 24), (5, 4, 4, 24, 16), (8, 7, 3, 72, 40),
          (8, 60, 4, 32, 24)]
"""Tokens, experts, chosen ones, model dim, width: no whole number of tiles among them."""
TILES = (kernels.Tiles(16, 16, 16, 2, 4), kernels.Tiles(16, 32, 16, 2, 4))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few, "TILES", TILES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_experts_are_added(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, kernel_device: str,
) -> None:
    case = make_case(shape, dtype, kernel_device)
    expected, sums = case[0].clone(), case[0].clone()
    reference.add_routed_mlp(expected, *case[1:])
    few.add_routed_mlp(sums, *case[1:])
    assert_close(sums, expected)
    assert not arrivals(sums.device).any()  # the next launch counts from 0
    again = case[0].clone()
    few.add_routed_mlp(again, *case[1:])
    assert torch.equal(again, sums)


def test_experts_that_are_elsewhere_add_nothing(
    monkeypatch: pytest.MonkeyPatch, kernel_device: str,
) -> None:
    """Whatever stands where their rows would; also where all of a step's are elsewhere."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    case = without_some(make_case((7, 7, 3, 16, 24), torch.bfloat16, kernel_device))
    expected, sums, untouched = (case[0].clone() for _ in range(3))
    reference.add_routed_mlp(expected, *case[1:])
    weights, experts = torch.zeros_like(case[2]), torch.full_like(case[3], len(case[4]))
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        few.add_routed_mlp(sums, *case[1:])
        few.add_routed_mlp(untouched, case[1], weights, experts, *case[4:])
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(sums, expected)
    assert torch.equal(untouched, case[0])


def test_a_token_is_the_same_in_any_company(kernel_device: str) -> None:
    case = make_case((8, 7, 3, 16, 24), torch.bfloat16, kernel_device)
    whole, alone = case[0].clone(), case[0][6:7].clone()
    few.add_routed_mlp(whole, *case[1:])
    few.add_routed_mlp(alone, *(part[6:7] for part in case[1:4]), *case[4:])
    assert torch.equal(alone[0], whole[6])


def test_rows_of_a_wider_tensor(kernel_device: str) -> None:
    """A part of the residual stream, and normed rows with a stride."""
    sums, x, *rest = make_case((8, 4, 2, 16, 24), torch.float32, kernel_device)
    wide = torch.full((8, 40), torch.nan, device=kernel_device)
    wide[:, 8:24] = x
    expected = sums.clone()
    reference.add_routed_mlp(expected, x, *rest)
    whole = torch.full((16, 20), 7.0, device=kernel_device)
    whole[8:, :16] = sums
    few.add_routed_mlp(whole[8:, :16], wide[:, 8:24], *rest)
    assert_close(whole[8:, :16], expected)
    assert (whole[:8] == 7.0).all() and (whole[:, 16:] == 7.0).all()


@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("quantize", [eager.quantize_rows, eager.quantize_blocks],
                         ids=["rows", "blocks"])
def test_experts_of_fp8(
    quantize, num_tokens: int, kernel_device: str, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Widths of 128 and 256, where gate and up begin in blocks of their own, in no whole step."""
    monkeypatch.setattr(kernels, "supports", lambda *_: True)
    matrices = []
    for shape in ((3, 256, 256), (3, 256, 128)):
        found = [quantize(torch.randn(shape[1:], device=kernel_device) * 0.1 * (1 + number))
                 for number in range(shape[0])]
        matrices.append(Fp8Weights(*(torch.stack(part) for part in zip(*found, strict=True))))
    x, sums = (torch.randn(num_tokens, 256, device=kernel_device).bfloat16() for _ in range(2))
    weights, experts = reference.route(torch.randn(num_tokens, 3, device=kernel_device), 2, True)
    expected = sums.float()
    reference.add_routed_mlp(
        expected, x, weights, experts, *(part.dense() for part in matrices))
    few.add_routed_mlp(sums, x, weights, experts, *matrices)
    assert_close(sums, expected)


def test_no_rows(kernel_device: str) -> None:
    case = make_case((0, 4, 2, 16, 24), torch.bfloat16, kernel_device)
    few.add_routed_mlp(*case)


def test_what_they_do_not_take() -> None:
    _, x, _, _, gate_up, _ = make_case((9, 4, 2, 16, 24), torch.bfloat16)
    assert few.supports(x[:8], gate_up)
    assert not few.supports(x, gate_up) and not few.supports(x[:4].float(), gate_up)


def test_a_step_lies_in_one_block_of_scales() -> None:
    blocked, by_rows = (Fp8Weights(torch.zeros(1, 256, 256), torch.zeros(1, *shape))
                        for shape in ((2, 2), (256, 1)))
    assert blocked.is_blocked and not by_rows.is_blocked
    for num_tokens in (1, 8):
        assert all(tiles.depth <= 128 for tiles in few.choose_tiles(blocked, num_tokens))
    assert few.choose_tiles(by_rows, 1) == few.FP8_TILES_OF_ONE
    assert few.choose_tiles(by_rows, 2) == few.FP8_TILES
