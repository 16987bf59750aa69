"""Products with int4 weights."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from longspan.model.linear import Activations, Linear, Stored, parameter
from longspan.ops import int4_linear, quantize_int4
from longspan.ops.types import Int4Weights

RANDOM_ROWS = 4_096
"""As in `longspan.model.fp8`."""


class Int4Linear(Linear):
    """Four bits a number; groups of a row share a scale and a zero point.

    With act order each stored matrix has its inputs in an order of its own. Those of a merged
    projection were mostly quantised together and share it; where they do not, each is a product of
    its own.
    """

    def _allocate(self, out_features: int, dtype: torch.dtype, device: torch.device | str) -> None:
        groups = self.in_features // self.form.group
        self.packed = parameter(
            out_features, self.in_features // 2, dtype=torch.uint8, device=device)
        self.scales = parameter(out_features, groups, dtype=torch.float16, device=device)
        self.zeros = parameter(out_features, groups, dtype=torch.uint8, device=device)
        self.orders: Tensor | None = None
        if self.form.has_order:
            self.orders = parameter(
                len(self.sizes), self.in_features, dtype=torch.int32, device=device)
        self.shares_order = True
        self._starts = list(accumulate(self.sizes, initial=0))

    def forward(self, x: Activations) -> Tensor:
        """See `Linear`."""
        assert isinstance(x, Tensor), "activations are rounded for fp8 alone"
        return self.part(x, slice(0, sum(self.sizes)))

    def add_to(self, sums: Tensor, x: Activations) -> None:
        """See `Linear`."""
        sums.add_(self.forward(x))

    def part(self, x: Tensor, outputs: slice) -> Tensor:
        """See `Linear`."""
        if self.shares_order:
            return self._product(x, outputs)
        start, stop, _ = outputs.indices(sum(self.sizes))
        first, last = self._starts.index(start), self._starts.index(stop)
        return torch.cat([self._product(x, slice(*self._starts[part:part + 2]))
                          for part in range(first, last)], -1)

    def stack(self, count: int) -> Int4Weights:
        """See `Linear`."""
        assert self.orders is None, "experts in an order of their own are refused"
        return Int4Weights(*(part.unflatten(0, (count, -1))
                             for part in (self.packed, self.scales, self.zeros)))

    def fill(self, outputs: slice, stored: Stored) -> None:
        """See `Linear`: plain numbers are quantised."""
        if isinstance(stored, Tensor):
            stored = quantize_int4(stored.to(self.packed.device), self.form.group)
        assert isinstance(stored, Int4Weights)
        self._copy(outputs, stored)
        if self.orders is not None:
            identity = torch.arange(self.in_features, dtype=torch.int32)
            self.orders[self._starts.index(outputs.start)].copy_(
                identity if stored.order is None else stored.order)
            self.shares_order = bool((self.orders == self.orders[0]).all())

    def fill_randomly(self, std: float, generator: torch.Generator) -> None:
        """See `Linear`."""
        for start in range(0, len(self.packed), RANDOM_ROWS):
            rows = slice(start, min(start + RANDOM_ROWS, len(self.packed)))
            plain = torch.empty(self.packed[rows].shape[0], self.in_features,
                                dtype=torch.float32, device=self.packed.device)
            plain.normal_(0.0, std, generator=generator)
            self._copy(rows, quantize_int4(plain, self.form.group))
        if self.orders is not None:
            self.orders.copy_(torch.arange(self.in_features, dtype=torch.int32))

    def _copy(self, outputs: slice, stored: Int4Weights) -> None:
        self.packed[outputs].copy_(stored.packed)
        self.scales[outputs].copy_(stored.scales)
        self.zeros[outputs].copy_(stored.zeros)

    def _product(self, x: Tensor, outputs: slice) -> Tensor:
        order = None
        if self.orders is not None:
            order = self.orders[0 if self.shares_order else self._starts.index(outputs.start)]
        weights = Int4Weights(
            self.packed[outputs], self.scales[outputs], self.zeros[outputs], order)
        return int4_linear(x, weights, None if self.bias is None else self.bias[outputs])
