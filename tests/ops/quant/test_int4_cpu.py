"""Int4 products on CPUs against the numbers that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longspan.ops.quant import int4_cpu
from longspan.ops.quant.int4_cpu import LEVELS, MIDDLE


def plain(numbers: Tensor, scales: Tensor) -> Tensor:
    """The matrix [N, K] in fp64."""
    step, middle = scales.double().transpose(0, 1).unbind(-1)
    groups = numbers.double().unflatten(1, (scales.shape[0], -1))
    return ((groups - MIDDLE) * step[..., None] + middle[..., None]).flatten(1)


@pytest.mark.parametrize(("outputs", "width", "group"), [
    (16, 32, 32), (48, 160, 32), (80, 256, 64), (144, 384, 128), (1_040, 256, 256)])
@pytest.mark.parametrize("num_rows", [1, 3, 70])
def test_products_are_those_of_the_numbers(
    outputs: int, width: int, group: int, num_rows: int,
) -> None:
    """Outputs that fill no block of the CPU's order; each group has a scale of its own."""
    numbers, scales = int4_cpu.quantize(
        torch.randn(outputs, width) * torch.rand(outputs, 1).exp() + 0.3, group)
    packed, x = int4_cpu.pack(numbers, scales), torch.randn(num_rows, width)
    assert packed.group == group
    expected = x.bfloat16().double() @ plain(numbers, scales).T
    found = int4_cpu.linear(x, packed)
    assert found.dtype == torch.bfloat16
    # weights are rounded to bf16 on the way, and the result
    assert (found - expected).abs().max() < 0.01 * expected.std() * 3


def test_a_row_depends_on_itself_alone() -> None:
    packed = int4_cpu.pack(*int4_cpu.quantize(torch.randn(64, 96), 32))
    x = torch.randn(37, 96)
    whole = int4_cpu.linear(x, packed)
    for row in (0, 5, 36):
        assert torch.equal(int4_cpu.linear(x[row : row + 1], packed)[0], whole[row])


def test_quantisation_beats_plain_rounding_and_keeps_what_is_exact() -> None:
    matrix = torch.randn(64, 256)
    matrix[::2, 5] *= 4  # outliers
    groups = matrix.unflatten(1, (-1, 32))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    step = (high - low) / LEVELS
    naive = (((groups - low) / step).round() * step + low).flatten(1)
    found = plain(*int4_cpu.quantize(matrix, 32))
    assert (found - matrix).square().sum() < 0.97 * (naive - matrix).square().sum()
    steps = torch.randint(0, 16, (32, 64)).float() - 8
    steps[:, ::32], steps[:, 1::32] = -8, 7
    assert torch.equal(plain(*int4_cpu.quantize(steps, 32)), steps.double())
    for constant in (0.0, 3.0):
        same = torch.full((16, 32), constant)
        assert torch.equal(plain(*int4_cpu.quantize(same, 32)), same.double())
