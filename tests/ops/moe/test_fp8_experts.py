"""Routed experts with e4m3 weights, by the kernels that read them as they are."""

from __future__ import annotations

import pytest
import torch

from longspan.ops import reference
from longspan.ops.moe import triton as kernels
from longspan.ops.quant import eager
from longspan.ops.types import Fp8Weights
from tests.conftest import assert_close


@pytest.mark.parametrize("tiles", ["FEW", "MANY"])
@pytest.mark.parametrize("quantize", [eager.quantize_rows, eager.quantize_blocks],
                         ids=["rows", "blocks"])
def test_experts_of_fp8(
    quantize, tiles: str, kernel_device: str, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Widths of 128 and 256, where gate and up begin in blocks of their own."""
    monkeypatch.setattr(kernels, "choose_tiles", lambda *_: getattr(kernels, tiles))
    monkeypatch.setattr(kernels, "supports", lambda *_: True)
    matrices = []
    for shape in ((3, 256, 256), (3, 256, 128)):
        found = [quantize(torch.randn(shape[1:], device=kernel_device) * 0.1 * (1 + number))
                 for number in range(shape[0])]
        matrices.append(Fp8Weights(*(torch.stack(part) for part in zip(*found, strict=True))))
    x, sums = (torch.randn(5, 256, device=kernel_device).bfloat16() for _ in range(2))
    weights, experts = reference.route(torch.randn(5, 3, device=kernel_device), 2, True)
    expected = sums.float()
    reference.add_routed_mlp(
        expected, x, weights, experts, *(part.dense() for part in matrices))
    kernels.add_routed_mlp(sums, x, weights, experts, *matrices)
    assert_close(sums, expected)
