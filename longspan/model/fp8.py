"""Products with e4m3 weights."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.model.linear import Activations, Linear, Stored, parameter
from longspan.ops import activation_group, fp8_linear, quantize_blocks, quantize_rows
from longspan.ops.types import FP8_BLOCK, Fp8Weights

RANDOM_ROWS = 4_096
"""Rows of random weights made at a time: there may be no room for all of them before they are
quantised."""


class Fp8Linear(Linear):
    """e4m3 numbers with a scale for each output, or for each block of 128 x 128."""

    def _allocate(self, out_features: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.is_blocked = self.form.kind == "fp8-blocks"
        self.values = parameter(
            out_features, self.in_features, dtype=torch.float8_e4m3fn, device=device)
        shape = ((-(-out_features // FP8_BLOCK), -(-self.in_features // FP8_BLOCK))
                 if self.is_blocked else (out_features, 1))
        self.scales = parameter(*shape, dtype=torch.float32, device=device)
        self._dtype = dtype

    def forward(self, x: Activations) -> Tensor:
        """See `Linear`."""
        return fp8_linear(x, Fp8Weights(self.values, self.scales), self.bias, self._dtype)

    def group_of(self, x: Tensor) -> int | None:
        """See `Linear`."""
        return activation_group(Fp8Weights(self.values, self.scales), x)

    def add_to(self, sums: Tensor, x: Activations) -> None:
        """See `Linear`."""
        sums.add_(self.forward(x))

    def part(self, x: Tensor, outputs: slice) -> Tensor:
        """See `Linear`."""
        part = Fp8Weights(self.values[outputs], self.scales[self._scale_rows(outputs)])
        bias = None if self.bias is None else self.bias[outputs]
        return fp8_linear(x, part, bias, self._dtype)

    def stack(self, count: int) -> Fp8Weights:
        """See `Linear`."""
        return Fp8Weights(self.values.unflatten(0, (count, -1)),
                          self.scales.unflatten(0, (count, -1)))

    def fill(self, outputs: slice, stored: Stored) -> None:
        """See `Linear`: plain numbers are quantised."""
        if isinstance(stored, Tensor):
            quantize = quantize_blocks if self.is_blocked else quantize_rows
            stored = quantize(stored.to(self.values.device))
        assert isinstance(stored, Fp8Weights)
        self.values[outputs].copy_(stored.values)
        self.scales[self._scale_rows(outputs)].copy_(stored.scales)

    def fill_randomly(self, std: float, generator: torch.Generator) -> None:
        """See `Linear`."""
        for start in range(0, len(self.values), RANDOM_ROWS):
            rows = slice(start, min(start + RANDOM_ROWS, len(self.values)))
            plain = torch.empty(
                self.values[rows].shape, dtype=torch.float32, device=self.values.device)
            self.fill(rows, plain.normal_(0.0, std, generator=generator))

    def _scale_rows(self, outputs: slice) -> slice:
        """Return the rows of the scales that belong to outputs."""
        if not self.is_blocked:
            return outputs
        start, stop, _ = outputs.indices(len(self.values))
        assert start % FP8_BLOCK == 0
        return slice(start // FP8_BLOCK, -(-stop // FP8_BLOCK))
