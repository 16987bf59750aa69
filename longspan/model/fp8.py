"""Products with e4m3 weights."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.model.linear import Linear, Stored, parameter
from longspan.ops import fp8_linear, quantize_rows
from longspan.ops.types import Fp8Weights
from longspan.weight_form import WeightForm


class Fp8Linear(Linear):
    """e4m3 numbers with a scale for each output."""

    form = WeightForm("fp8-rows")

    def _allocate(self, out_features: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.values = parameter(
            out_features, self.in_features, dtype=torch.float8_e4m3fn, device=device)
        self.scales = parameter(out_features, 1, dtype=torch.float32, device=device)

    @property
    def weights(self) -> Fp8Weights:
        """The matrix."""
        return Fp8Weights(self.values, self.scales)

    def forward(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        return fp8_linear(x, self.weights, self.bias)

    def add_to(self, sums: Tensor, x: Tensor) -> None:
        """See `Linear`."""
        sums.add_(fp8_linear(x, self.weights, self.bias))

    def part(self, x: Tensor, outputs: slice) -> Tensor:
        """See `Linear`."""
        part = Fp8Weights(self.values[outputs], self.scales[outputs])
        return fp8_linear(x, part, None if self.bias is None else self.bias[outputs])

    def stack(self, count: int) -> Fp8Weights:
        """See `Linear`."""
        return Fp8Weights(self.values.unflatten(0, (count, -1)),
                          self.scales.unflatten(0, (count, -1)))

    def fill(self, outputs: slice, stored: Stored) -> None:
        """See `Linear`: plain numbers are quantised."""
        if isinstance(stored, Tensor):
            stored = quantize_rows(stored.to(self.values.device))
        self.values[outputs].copy_(stored.values)
        self.scales[outputs].copy_(stored.scales)

    def fill_randomly(self, std: float, generator: torch.Generator) -> None:
        """See `Linear`; some rows at a time, for there may be no room for plain numbers."""
        for start in range(0, len(self.values), RANDOM_ROWS):
            rows = slice(start, start + RANDOM_ROWS)
            plain = torch.empty(
                self.values[rows].shape, dtype=torch.float32, device=self.values.device)
            self.fill(rows, plain.normal_(0.0, std, generator=generator))


RANDOM_ROWS = 4_096
