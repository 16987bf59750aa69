"""Products with int4 weights, on CPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.model.int8 import ROWS, quantised_rows
from longspan.model.linear import Activations, Linear, Stored, dense
from longspan.ops.quant import int4_cpu


class Int4CpuLinear(Linear):
    """Four bits a number; groups of a row share a scale. Laid out when all rows have come."""

    def _allocate(self, out_features: int, dtype: torch.dtype, device: torch.device | str) -> None:
        assert torch.device(device).type == "cpu", device
        self._rows: tuple[Tensor, Tensor] | None = None
        self._packed: int4_cpu.PackedInt4 | None = None
        self._num_missing = out_features

    def forward(self, x: Activations) -> Tensor:
        """See `Linear`."""
        assert isinstance(x, Tensor), "activations are rounded for fp8 alone"
        out = int4_cpu.linear(x if x.dim() == 2 else x.flatten(0, -2), self.packed)
        out = (out if self.bias is None else out + self.bias).to(x.dtype)
        return out if x.dim() == 2 else out.view(*x.shape[:-1], -1)

    def add_to(self, sums: Tensor, x: Activations) -> None:
        """See `Linear`."""
        assert isinstance(x, Tensor)
        sums.add_(int4_cpu.linear(x, self.packed))
        if self.bias is not None:
            sums.add_(self.bias)

    def part(self, x: Tensor, outputs: slice) -> Tensor:
        """See `Linear`: all are computed, which only the last layer of a prefill asks for."""
        return self(x)[..., outputs]

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
        matrix = dense(stored)
        if self._rows is None:
            self._packed, self._num_missing = None, sum(self.sizes)
            groups = self.in_features // self.form.group
            self._rows = (torch.empty(sum(self.sizes), self.in_features, dtype=torch.uint8),
                          torch.empty(groups, sum(self.sizes), 2, dtype=torch.bfloat16))
        start = outputs.start
        for piece in matrix.split(quantised_rows(self.in_features)):
            rows = slice(start, start + len(piece))
            self._rows[0][rows], self._rows[1][:, rows] = int4_cpu.quantize(piece, self.form.group)
            start = rows.stop
        self._num_missing -= len(matrix)
        if self._num_missing <= 0:
            self._packed, self._rows = int4_cpu.pack(*self._rows), None

    def fill_randomly(self, std: float, generator: torch.Generator) -> None:
        """See `Linear`."""
        for start in range(0, sum(self.sizes), ROWS):
            rows = slice(start, min(start + ROWS, sum(self.sizes)))
            plain = torch.empty(rows.stop - start, self.in_features)
            self.fill(rows, plain.normal_(0.0, std, generator=generator))
