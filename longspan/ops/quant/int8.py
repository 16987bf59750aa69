"""Int8 weights on CPUs, by PyTorch's own int8 product (FBGEMM's).

That product takes activations of eight bits. Rounded so, they cost several times what rounding the
weights does, since a row's outliers set its scale. So a row goes in as two rows, its digits to the
base 126, and its product is the sum of theirs: fourteen bits, closer than bfloat16. One token is as
fast with two rows as with one, for time goes into reading weights; of many tokens the product still
takes two thirds of what fp32 does. Digits have seven bits: CPUs without VNNI add pairs of products
in sixteen bits, which never overflow then.

A row's result depends on that row alone, whatever is computed beside it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longspan.ops.tiles.few_calls import as_pytorch, takes_numpy

ENGINE = "fbgemm"
LEVELS = 63.0
"""Digits are integers from -63 to 63."""
BASE = 2 * LEVELS
"""What one unit of the first digit is in units of the second."""
ROWS = 128
"""Tokens computed at a time: digits and sums stay in the cache."""
TINY = 1e-30
"""Rows of zeros have this size."""
_product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32


class PackedInt8(NamedTuple):
    """A matrix [N, K] as the product reads it."""

    matrix: Any
    """TorchScript object; its scales are for digits of the first kind."""
    out_features: int


def is_supported() -> bool:
    """Return whether this machine's PyTorch has the product: x86 CPUs with AVX2."""
    return ENGINE in torch.backends.quantized.supported_engines


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows to int8, each with the scale that takes its largest number to 127.

    x: [N, K]. Returns values [N, K] int8 and scales [N] fp32.
    """
    numbers = x.float()
    scales = (numbers.abs().amax(-1) / 127).clamp_min(TINY)
    return (numbers / scales[:, None]).round_().to(torch.int8), scales


def pack(values: Tensor, scales: Tensor) -> PackedInt8:
    """Lay a matrix out for `linear`. values: [N, K] int8; scales: [N] fp32."""
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = ENGINE
    try:
        with warnings.catch_warnings():
            # PyTorch means to remove such tensors some day; the product knows no other way in
            warnings.filterwarnings("ignore", message=".*quantized tensor creation.*")
            tensor = torch._make_per_channel_quantized_tensor(
                values, (scales / LEVELS).double(), torch.zeros(len(scales), dtype=torch.int64), 0)
        return PackedInt8(torch.ops.quantized.linear_prepack(tensor, None), len(scales))
    finally:
        torch.backends.quantized.engine = engine


def unpack(packed: PackedInt8) -> tuple[Tensor, Tensor]:
    """Return values and scales, as `pack` took them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*quantized tensor creation.*")
        tensor, _ = torch.ops.quantized.linear_unpack(packed.matrix)
    return tensor.int_repr(), tensor.q_per_channel_scales().float() * LEVELS


def linear(x: Tensor, packed: PackedInt8, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b. x: [T, K]; bias: [N]; returns [T, N] fp32."""
    if x.shape[0] == 1:
        sums, sizes = _sums(x, packed)
        return sums.mul_(sizes) if bias is None else torch.addcmul(bias, sums, sizes)
    out = torch.empty(x.shape[0], packed.out_features)
    for rows, found in _parts(x, out):
        if bias is None:
            torch.mul(*_sums(rows, packed), out=found)
        else:
            torch.addcmul(bias, *_sums(rows, packed), out=found)
    return out


def add_linear(sums: Tensor, x: Tensor, packed: PackedInt8) -> None:
    """Add x W^T to ``sums`` [T, N], in place. x: [T, K]."""
    if x.shape[0] == 1:
        sums.addcmul_(*_sums(x, packed))
        return
    for rows, found in _parts(x, sums):
        found.addcmul_(*_sums(rows, packed))


def _parts(x: Tensor, out: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Part rows and results; there may be none: a prefill chunk's last layer has no rows to compute
    if another chunk follows."""
    return zip(x.split(ROWS), out.split(ROWS), strict=True) if x.shape[0] else ()


def _sums(x: Tensor, packed: PackedInt8) -> tuple[Tensor, Tensor]:
    """Return products [T, N] of rows whose largest number is taken for one, and that, [T, 1]: NaN
    and infinity stay there."""
    if x.dtype != torch.float32:
        x = x.float()
    num_rows = x.shape[0]
    digits, sizes = (_few_digits if takes_numpy(x) else _digits)(x)
    high, low = _product(digits, 1.0, 64, packed.matrix).split(num_rows)
    return high.add_(low, alpha=1 / BASE), sizes


def _digits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return first and second digits of rows, [2 T, K], to be rounded by the product, and the
    rows' largest numbers, [T, 1]."""
    sizes = torch.linalg.vector_norm(x, torch.inf, -1, True).clamp_min_(TINY)
    digits = torch.empty(2 * x.shape[0], x.shape[1])
    first, second = digits.split(x.shape[0])
    torch.div(x, sizes * (1 / LEVELS), out=second)
    torch.round(second, out=first)
    second.sub_(first).mul_(BASE)
    return digits, sizes


@as_pytorch
def _few_digits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Do as `_digits`, to the bit, in less time for a few rows."""
    rows, count = x.detach().numpy(), x.shape[0]
    digits = np.empty((2 * count, x.shape[1]), np.float32)
    first, second = digits[:count], digits[count:]
    sizes = np.maximum(np.abs(rows, out=first).max(-1, keepdims=True), np.float32(TINY))
    np.divide(rows, sizes * np.float32(1 / LEVELS), out=second)
    np.rint(second, out=first)
    second -= first
    second *= np.float32(BASE)
    return torch.from_numpy(digits), torch.from_numpy(sizes)
