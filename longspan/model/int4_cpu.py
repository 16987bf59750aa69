"""Products with int4 weights, on CPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.model.cpu_linear import CpuLinear
from longspan.model.linear import Activations, Stored
from longspan.ops.quant import int4_cpu


class Int4CpuLinear(CpuLinear):
    """Four bits a number; groups of a row share a scale. Laid out when all rows have come."""

    def _allocate(self, out_features: int, dtype: torch.dtype, device: torch.device | str) -> None:
        assert torch.device(device).type == "cpu", device
        self._rows: tuple[Tensor, Tensor] | None = None
        self._packed: int4_cpu.PackedInt4 | None = None
        self._num_missing = out_features

    def _multiply(self, x: Tensor) -> Tensor:
        out = int4_cpu.linear(x, self.packed)
        return out if self.bias is None else out + self.bias

    def add_to(self, sums: Tensor, x: Activations) -> None:
        """See `Linear`."""
        assert isinstance(x, Tensor)
        sums.add_(int4_cpu.linear(x, self.packed))
        if self.bias is not None:
            sums.add_(self.bias)

    @property
    def packed(self) -> int4_cpu.PackedInt4:
        """The matrix, once it is filled."""
        assert self._packed is not None, "filled before it is used"
        return self._packed

    def stack(self, count: int) -> Tensor:
        """See `Linear`: plain numbers, every time."""
        plain = int4_cpu.linear(torch.eye(self.in_features), self.packed).float().T
        return plain.unflatten(0, (count, -1))

    def fill(self, outputs: slice, stored: Stored) -> None:
        """See `Linear`: plain numbers are quantised."""
        if self._rows is None:
            self._packed, self._num_missing = None, sum(self.sizes)
            groups = self.in_features // self.form.group
            self._rows = (torch.empty(sum(self.sizes), self.in_features, dtype=torch.uint8),
                          torch.empty(groups, sum(self.sizes), 2, dtype=torch.bfloat16))
        for rows, piece in self._pieces(outputs, stored):
            self._rows[0][rows], self._rows[1][:, rows] = int4_cpu.quantize(piece, self.form.group)
            self._num_missing -= len(piece)
        if self._num_missing <= 0:
            self._packed, self._rows = int4_cpu.pack(*self._rows), None
