"""Int8 products on CPUs against fp64."""

from __future__ import annotations

import pytest
import torch

from longspan.ops.quant import int8

OUT, WIDTH = 72, 160


def packed(*, size: float = 1.0) -> int8.PackedInt8:
    values, scales = int8.quantize_rows(size * torch.randn(OUT, WIDTH))
    return int8.pack(values, scales)


def exact(x: torch.Tensor, matrix: int8.PackedInt8) -> torch.Tensor:
    values, scales = int8.unpack(matrix)
    return x.double() @ (values.double() * scales[:, None].double()).T


@pytest.mark.parametrize("num_rows", [1, 2, int8.ROWS, int8.ROWS + 3])
def test_activations_with_outliers_lose_less_than_in_bf16(num_rows: int) -> None:
    """One number in a hundred is fifty times as large as the others: eight bits would not do."""
    matrix, x = packed(), torch.randn(num_rows, WIDTH)
    x[:, 7] *= 50
    expected = exact(x, matrix)
    found = (int8.linear(x, matrix) - expected).norm()
    assert found < 1.2 * (exact(x.bfloat16(), matrix) - expected).norm()
    assert found < 2e-3 * expected.norm()


def test_a_row_depends_on_itself_alone() -> None:
    matrix, x = packed(), torch.randn(2 * int8.ROWS + 5, WIDTH)
    whole = int8.linear(x, matrix)
    x[0] *= 1e6
    for row in (1, 5, int8.ROWS, 2 * int8.ROWS + 4):
        assert torch.equal(int8.linear(x[row : row + 1], matrix)[0], whole[row])
    assert torch.equal(int8.linear(x, matrix)[1:], whole[1:])


@pytest.mark.parametrize("num_rows", [0, 1, int8.ROWS + 9])
def test_a_product_is_added_in_place_and_takes_a_bias(num_rows: int) -> None:
    matrix, x, bias = packed(), torch.randn(num_rows, WIDTH), torch.randn(OUT)
    sums = torch.randn(len(x), OUT)
    expected = sums + int8.linear(x, matrix)
    torch.testing.assert_close(int8.linear(x, matrix, bias), int8.linear(x, matrix) + bias)
    int8.add_linear(sums, x, matrix)
    torch.testing.assert_close(sums, expected)


def test_products_of_the_largest_digits_do_not_overflow() -> None:
    """Pairs of products are added in sixteen bits by CPUs without VNNI: 2 x 127 x 127 fits."""
    matrix = int8.pack(torch.full((OUT, WIDTH), 127, dtype=torch.int8), torch.ones(OUT))
    found = int8.linear(torch.full((2, WIDTH), -3.0), matrix)
    torch.testing.assert_close(found, torch.full((2, OUT), -3.0 * 127 * WIDTH))


def test_zeros_tiny_and_huge_rows_and_what_is_not_finite() -> None:
    matrix, x = packed(), torch.randn(6, WIDTH)
    x[1], x[2], x[3] = 0, x[2] * 1e-25, x[3] * 1e25
    x[4, 3], x[5, 3] = torch.nan, torch.inf
    found = int8.linear(x, matrix)
    expected = exact(x[:4], matrix)
    assert ((found[:4] - expected).norm(dim=1) <= 2e-3 * expected.norm(dim=1)).all()
    assert not found[4:].isfinite().any(), "whoever watches logits is to see it"


def test_a_matrix_comes_back_as_it_went_in_and_the_engine_stays() -> None:
    before = torch.backends.quantized.engine
    values, scales = int8.quantize_rows(torch.randn(OUT, WIDTH))
    found, found_scales = int8.unpack(int8.pack(values, scales))
    assert torch.equal(found, values) and torch.backends.quantized.engine == before
    torch.testing.assert_close(found_scales, scales)
