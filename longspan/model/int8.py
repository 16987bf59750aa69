"""Products with int8 weights, on CPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.model.linear import Activations, Linear, Stored, dense
from longspan.ops.quant import int8
from longspan.weight_form import WeightForm

ROWS = 4_096
"""Rows made at random at a time: there may be no room for plain numbers."""
NUMBERS = 2**18
"""Numbers quantised at a time: what is computed with them stays in the cache."""


def quantised_rows(width: int) -> int:
    """Return how many rows are quantised at a time."""
    return max(1, NUMBERS // width)


class Int8Linear(Linear):
    """int8 numbers with a scale for each output, laid out for the product when all have come."""

    keeps_rows = False
    packs = True

    def _allocate(self, out_features: int, dtype: torch.dtype, device: torch.device | str) -> None:
        assert torch.device(device).type == "cpu", device
        self._values: Tensor | None = None
        self._scales: Tensor | None = None
        self._packed: int8.PackedInt8 | None = None
        self._num_missing = out_features

    def forward(self, x: Activations) -> Tensor:
        """See `Linear`."""
        assert isinstance(x, Tensor), "activations are rounded for fp8 alone"
        out = int8.linear(x if x.dim() == 2 else x.flatten(0, -2), self.packed, self.bias)
        return (out if x.dim() == 2 else out.view(*x.shape[:-1], -1)).to(x.dtype)

    def add_to(self, sums: Tensor, x: Activations) -> None:
        """See `Linear`."""
        assert isinstance(x, Tensor)
        int8.add_linear(sums, x, self.packed)
        if self.bias is not None:
            sums.add_(self.bias)

    def part(self, x: Tensor, outputs: slice) -> Tensor:
        """See `Linear`: all are computed, which only the last layer of a prefill asks for."""
        return self(x)[..., outputs]

    @property
    def packed(self) -> int8.PackedInt8:
        """The matrix, once it is filled."""
        assert self._packed is not None, "filled before it is used"
        return self._packed

    def dense(self) -> Tensor:
        """Return plain numbers, [out, in] fp32."""
        values, scales = self._rows()
        return values.float() * scales[:, None]

    def stack(self, count: int) -> Tensor:
        """See `Linear`: plain numbers, every time."""
        return self.dense().unflatten(0, (count, -1))

    def fill(self, outputs: slice, stored: Stored) -> None:
        """See `Linear`: plain numbers are quantised."""
        self._values, self._scales = self._rows()
        matrix = dense(stored)
        start = outputs.start
        for piece in matrix.split(quantised_rows(self.in_features)):
            rows = slice(start, start + len(piece))
            self._values[rows], self._scales[rows] = int8.quantize_rows(piece)
            start = rows.stop
        self._num_missing -= len(matrix)
        if self._num_missing <= 0:
            self._finish()

    def fill_randomly(self, std: float, generator: torch.Generator) -> None:
        """See `Linear`."""
        for start in range(0, sum(self.sizes), ROWS):
            rows = slice(start, min(start + ROWS, sum(self.sizes)))
            plain = torch.empty(rows.stop - start, self.in_features)
            self.fill(rows, plain.normal_(0.0, std, generator=generator))

    def _rows(self) -> tuple[Tensor, Tensor]:
        """Return values [out, in] and scales [out], as far as they have come."""
        if self._values is not None and self._scales is not None:
            return self._values, self._scales
        if self._packed is not None:
            return int8.unpack(self._packed)
        shape = sum(self.sizes), self.in_features
        return torch.empty(shape, dtype=torch.int8), torch.empty(shape[0])

    def _finish(self) -> None:
        assert self._values is not None and self._scales is not None
        if self.packs:
            self._packed = int8.pack(self._values, self._scales)
        if not self.keeps_rows:
            self._values = self._scales = None


class Int8Table(Int8Linear):
    """Embedding of tokens: the rows stay, beside the product where the head is tied to it."""

    keeps_rows = True

    def __init__(
        self, form: WeightForm, in_features: int, num_tokens: int, *, dtype: torch.dtype,
        device: torch.device | str, packs: bool,
    ) -> None:
        super().__init__(
            form, in_features, (num_tokens,), bias=False, dtype=dtype, device=device)
        self.packs, self._dtype = packs, dtype

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows of some tokens. [T] int64 to [T, in]."""
        assert self._values is not None and self._scales is not None
        return (self._values[ids] * self._scales[ids, None]).to(self._dtype)


def has_int8_product() -> bool:
    """Return whether this machine has the product."""
    return int8.is_supported()
