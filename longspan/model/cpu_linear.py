"""What products with quantised weights on CPUs have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from longspan.model.linear import Activations, Linear, Stored, dense

ROWS = 4_096
"""Rows made at random at a time: there may be no room for plain numbers."""
NUMBERS = 2**18
"""Numbers quantised at a time: what is computed with them stays in the cache."""


class CpuLinear(Linear):
    """A matrix that is quantised as it comes, and laid out for its product when all rows have."""

    @abstractmethod
    def _multiply(self, x: Tensor) -> Tensor:
        """[T, in] to [T, out], with the bias, in any type."""

    def forward(self, x: Activations) -> Tensor:
        """See `Linear`."""
        assert isinstance(x, Tensor), "activations are rounded for fp8 alone"
        out = self._multiply(x if x.dim() == 2 else x.flatten(0, -2)).to(x.dtype)
        return out if x.dim() == 2 else out.view(*x.shape[:-1], -1)

    def part(self, x: Tensor, outputs: slice) -> Tensor:
        """See `Linear`: all are computed, which only the last layer of a prefill asks for."""
        return self(x)[..., outputs]

    def fill_randomly(self, std: float, generator: torch.Generator) -> None:
        """See `Linear`."""
        for start in range(0, sum(self.sizes), ROWS):
            rows = slice(start, min(start + ROWS, sum(self.sizes)))
            plain = torch.empty(rows.stop - start, self.in_features)
            self.fill(rows, plain.normal_(0.0, std, generator=generator))

    def _pieces(self, outputs: slice, stored: Stored) -> Iterator[tuple[slice, Tensor]]:
        """Part a stored matrix, in plain numbers, into rows that are quantised together."""
        start = outputs.start
        for piece in dense(stored).split(max(1, NUMBERS // self.in_features)):
            yield slice(start, start + len(piece)), piece
            start += len(piece)
