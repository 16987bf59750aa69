"""Products with int8 weights, on CPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.model.cpu_linear import CpuLinear
from longspan.model.linear import Activations, Stored
from longspan.ops.quant import int8
from longspan.weight_form import WeightForm


class Int8Linear(CpuLinear):
    """int8 numbers with a scale for each output, laid out for the product when all have come."""

    keeps_rows = False
    packs = True

    def _allocate(self, out_features: int, dtype: torch.dtype, device: torch.device | str) -> None:
        assert torch.device(device).type == "cpu", device
        self._values: Tensor | None = None
        self._scales: Tensor | None = None
        self._packed: int8.PackedInt8 | None = None
        self._num_missing = out_features

    def _multiply(self, x: Tensor) -> Tensor:
        return int8.linear(x, self.packed, self.bias)

    def add_to(self, sums: Tensor, x: Activations) -> None:
        """See `Linear`."""
        assert isinstance(x, Tensor)
        int8.add_linear(sums, x, self.packed)
        if self.bias is not None:
            sums.add_(self.bias)

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
        for rows, piece in self._pieces(outputs, stored):
            self._values[rows], self._scales[rows] = int8.quantize_rows(piece)
            self._num_missing -= len(piece)
        if self._num_missing <= 0:
            self._finish()

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
