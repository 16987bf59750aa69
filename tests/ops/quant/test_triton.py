"""Kernels of quantised weights and activations against what the formats mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longspan.ops import reference
from longspan.ops.quant import eager, triton_dense, triton_few, triton_rows
from longspan.ops.types import Fp8Rows, Int4Weights, Quantized
from tests.conftest import assert_close

SIZES = (41, 640)
"""Outputs and inputs: both end in a part of a tile."""


def matrix(device: str, rows: int = SIZES[0], columns: int = SIZES[1]) -> Tensor:
    return torch.randn(rows, columns, device=device) * torch.rand(rows, 1, device=device)


def int4(device: str, group: int, *, ordered: bool) -> Int4Weights:
    found = eager.quantize_int4(matrix(device), group)
    order = torch.randperm(SIZES[1], device=device).to(torch.int32)
    return found._replace(order=order) if ordered else found


def weights_of(name: str, device: str) -> Quantized:
    if name.startswith("int4"):
        _, group, *rest = name.split("-")
        return int4(device, int(group), ordered=bool(rest))
    quantize = eager.quantize_rows if name == "fp8-rows" else eager.quantize_blocks
    return quantize(matrix(device))


NAMES = ["fp8-rows", "fp8-blocks", "int4-32", "int4-128", "int4-640", "int4-64-order"]


@pytest.mark.parametrize("name", NAMES)
def test_weights_made_plain(name: str, kernel_device: str) -> None:
    weights = weights_of(name, kernel_device)
    exact = eager.dequantize(weights, torch.float32)
    assert_close(triton_dense.dequantize(weights, torch.float32), exact)
    assert torch.equal(triton_dense.dequantize(weights, torch.bfloat16), exact.bfloat16())


@pytest.mark.parametrize("name", ["fp8-rows", "fp8-blocks", "int4-64"])
def test_a_stack_made_plain(name: str, kernel_device: str) -> None:
    one, other = weights_of(name, kernel_device), weights_of(name, kernel_device)
    stack = type(one)(*(torch.stack((part, another)) for part, another in zip(
        one, other, strict=True) if part is not None and another is not None))
    expected = torch.stack([one.dense(), other.dense()])
    assert_close(triton_dense.dequantize(stack, torch.float32), expected)


@pytest.mark.parametrize("num_rows", [1, 16])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_few_rows(
    name: str, parts: int, num_rows: int, kernel_device: str, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of a wider tensor, with a bias; inputs whole, or parted and added up."""
    for name_of_launch in ("FP8", "INT4"):
        launch = getattr(triton_few, name_of_launch)
        monkeypatch.setattr(
            triton_few, name_of_launch, launch._replace(min_part=SIZES[1] // parts))
    weights = weights_of(name, kernel_device)
    wide = torch.randn(num_rows, SIZES[1] + 8, device=kernel_device).bfloat16()
    x, bias = wide[:, 8:], torch.randn(SIZES[0], device=kernel_device).bfloat16()
    expected = x.float() @ weights.dense().T
    if isinstance(weights, Int4Weights):
        found = triton_few.int4_linear(x, weights, bias)
    else:
        found = triton_few.fp8_linear(x, weights, bias)
    # fp8 numbers are bf16 numbers, and so are nibbles: only the result is rounded
    assert_close(found, (expected + bias.float()).bfloat16())


def plain(rows: Fp8Rows, group: int) -> Tensor:
    values = rows.values.float()[:rows.num_rows]
    scales = rows.scales[:rows.num_rows]
    return values * (scales.repeat_interleave(group, 1)[:, :values.shape[1]] if group else scales)


def check_rounded(found: Fp8Rows, exact: Tensor, group: int) -> None:
    """Compare with PyTorch's rounding: equal, but where a number lies between two of e4m3."""
    expected = eager.quantize_activations(exact, group)
    assert found.num_rows == len(exact) and found.values.shape[0] % 16 == 0
    torch.testing.assert_close(found.scales[:len(exact)], expected.scales)
    difference = (plain(found, group) - plain(expected, group)).abs()
    limit = expected.scales.repeat_interleave(group or exact.shape[1], 1)[:, :exact.shape[1]]
    assert (difference <= 32 * limit).all() and (difference > 0).float().mean() < 0.005
    assert (plain(found, group) - exact.float()).abs().max() <= exact.float().abs().max() / 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("group", "width"), [
    (0, 63), (0, 2_100), (0, 4_200), (128, 384), (128, 2_304)])
def test_rows_are_rounded(
    group: int, width: int, dtype: torch.dtype, kernel_device: str,
) -> None:
    x = (matrix(kernel_device, 5, width + 3)[:, 3:] * 100).to(dtype)
    x[1] = 0
    x[2, 0] = 1e5
    check_rounded(triton_rows.quantize(x, group), x, group)


@pytest.mark.parametrize(("group", "width"), [(0, 24), (0, 4_100), (128, 256), (128, 4_224)])
@pytest.mark.parametrize("has_residual", [True, False], ids=["added", "alone"])
def test_norms_are_rounded(
    has_residual: bool, group: int, width: int, kernel_device: str,
) -> None:
    x, residual = (matrix(kernel_device, 3, width).bfloat16() for _ in range(2))
    weight = torch.randn(width, device=kernel_device).bfloat16()
    if has_residual:
        expected, summed = reference.add_rms_norm(x, residual.clone(), weight, 1e-6)
        found = triton_rows.rms_norm(x, residual, weight, 1e-6, group)
        assert torch.equal(residual, summed)
    else:
        expected = reference.rms_norm(x, weight, 1e-6)
        found = triton_rows.rms_norm(x, None, weight, 1e-6, group)
    # a bf16 number that is rounded the other way is another e4m3 number now and then
    difference = (plain(found, group) - expected.float()).abs().mean()
    assert difference <= 0.03 * expected.float().abs().mean()


def test_more_rows_of_int4(kernel_device: str) -> None:
    weights = int4(kernel_device, 64, ordered=True)
    x = torch.randn(37, SIZES[1], device=kernel_device).bfloat16()
    assert_close(triton_few.int4_linear(x, weights, None), x.float() @ weights.dense().T)


@pytest.mark.parametrize(("group", "width"), [(0, 24), (0, 2_100), (128, 256)])
def test_swiglu_is_rounded(group: int, width: int, kernel_device: str) -> None:
    gate_up = 3 * torch.randn(3, 2 * width, device=kernel_device).bfloat16()
    expected = reference.silu_mul(gate_up).float()
    found = plain(triton_rows.silu_mul(gate_up, group), group)
    assert (found - expected).abs().mean() <= 0.03 * expected.abs().mean()
    assert (found - expected).abs().max() <= expected.abs().max() / 14


def test_no_rows(kernel_device: str) -> None:
    x = torch.empty(0, 256, dtype=torch.bfloat16, device=kernel_device)
    assert triton_rows.quantize(x, 0).values.shape == (0, 256)
    assert triton_rows.rms_norm(x, None, x[0:0].new_ones(256), 1e-6, 128).num_rows == 0
