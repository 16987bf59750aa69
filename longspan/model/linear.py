"""One seam for all products with weights: `Linear`, whatever form its matrix is held in.

A class for each form. What reads checkpoints sees `Target` only, what computes sees `forward`,
`add_to` and `part`, and `make_linear` is the one place that knows which class a form has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.ops.types import Fp8Rows, Matrices
from longspan.weight_form import PLAIN, WeightForm

Stored = Matrices
"""A matrix as a checkpoint brings it: plain numbers of any float type, or quantised."""
Activations = Tensor | Fp8Rows
"""What products take: plain rows, or rows that are rounded already."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of a stored tensor that one of several ranks has."""

    rows: tuple[tuple[int, int], ...] | None = None
    """Ranges of the first axis, in order; None: all of it."""
    columns: tuple[tuple[int, int], ...] | None = None
    """The same of the last axis of a matrix."""


@dataclass(frozen=True, slots=True)
class Target:
    """A place in the model for one tensor of a checkpoint, by its plain name."""

    shape: tuple[int, ...]
    """Shape of the plain numbers."""
    fill: Callable[[Any], object]
    """Takes a `Stored`, on any device; converts where the model holds another form."""
    form: WeightForm | None = None
    """What a matrix is held in, which may be stored quantised; None: it is no such matrix."""
    cut: Cut | None = None
    """What ``fill`` takes of the tensor; None: all of it."""
    fill_rows: Callable[[int, Stored], object] | None = None
    """Takes some rows, from that one on: large matrices are read in pieces. None: cannot."""

    @classmethod
    def of(cls, tensor: Tensor) -> Target:
        """Make the target that is a plain tensor."""
        return cls(tuple(tensor.shape), lambda stored: tensor.copy_(dense(stored)))

    def cut_rows(self, rows: tuple[tuple[int, int], ...], total: int) -> Target:
        """Return the target as some rows of a tensor that has ``total``."""
        assert sum(stop - start for start, stop in rows) == self.shape[0]
        return replace(self, shape=(total, *self.shape[1:]), cut=Cut(rows=rows), fill_rows=None)


def dense(stored: Stored) -> Tensor:
    """Return plain numbers; quantised ones as fp32."""
    return stored if isinstance(stored, Tensor) else stored.dense()


class Linear(nn.Module, ABC):
    """y = x W^T + b without an initial fill: every weight comes from a checkpoint.

    Args:
        form: what the matrix is held in.
        sizes: outputs of each matrix that lies in this one, in order: a merged projection is
            stored as several.
    """

    def __init__(
        self, form: WeightForm, in_features: int, sizes: Sequence[int], *, bias: bool,
        dtype: torch.dtype, device: torch.device | str,
    ) -> None:
        super().__init__()
        self.form = form
        self.in_features, self.sizes = in_features, tuple(sizes)
        self._allocate(sum(sizes), dtype, device)
        self.bias = parameter(sum(sizes), dtype=dtype, device=device) if bias else None

    @abstractmethod
    def _allocate(self, out_features: int, dtype: torch.dtype, device: torch.device | str) -> None:
        """Make the parameters that hold the matrix."""

    @abstractmethod
    def forward(self, x: Activations) -> Tensor:
        """[..., in] to [..., out]; [T, in] where x is rounded, as `group_of` says."""

    def group_of(self, x: Tensor) -> int | None:
        """Return how many numbers of a row of x should share a scale where x, [..., in], or
        something of its shape, is made, 0 for all of them; None: it should stay as it is."""
        return None

    @abstractmethod
    def add_to(self, sums: Tensor, x: Activations) -> None:
        """Add the product, and the bias, to [T, out], in place."""

    @property
    def divides(self) -> bool:
        """Whether `part` takes any outputs, and no more time than its share of them."""
        return False

    @abstractmethod
    def part(self, x: Tensor, outputs: slice) -> Tensor:
        """Compute some of the outputs only; they begin and end where a stored matrix does, unless
        it `divides`."""

    @abstractmethod
    def stack(self, count: int) -> Matrices:
        """Return the weights as a stack of so many equal matrices."""

    @abstractmethod
    def fill(self, outputs: slice, stored: Stored) -> None:
        """Take a stored matrix as the weights of these outputs."""

    @abstractmethod
    def fill_randomly(self, std: float, generator: torch.Generator) -> None:
        """Fill the matrix with normal weights."""

    def _fill_from(self, start: int, row: int, stored: Stored) -> None:
        self.fill(slice(start + row, start + row + stored.shape[0]), stored)

    def targets(self, *names: str) -> dict[str, Target]:
        """Return where tensors of a checkpoint go, by the names of the stored modules."""
        found: dict[str, Target] = {}
        for name, (start, stop) in zip(
                names, pairwise(accumulate(self.sizes, initial=0)), strict=True):
            rows = slice(start, stop)
            found[f"{name}.weight"] = Target(
                (stop - start, self.in_features), partial(self.fill, rows), self.form,
                fill_rows=partial(self._fill_from, start))
            if self.bias is not None:
                found[f"{name}.bias"] = Target.of(self.bias[rows])
        return found


class PlainLinear(Linear):
    """Weights of the type that is computed in."""

    def _allocate(self, out_features: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.weight = parameter(out_features, self.in_features, dtype=dtype, device=device)

    def forward(self, x: Activations) -> Tensor:
        """See `Linear`."""
        assert isinstance(x, Tensor), "activations are rounded for fp8 alone"
        return F.linear(x, self.weight, self.bias)

    def add_to(self, sums: Tensor, x: Activations) -> None:
        """See `Linear`; the product is never written by itself."""
        assert isinstance(x, Tensor)
        sums.addmm_(x, self.weight.t())
        if self.bias is not None:
            sums.add_(self.bias)

    @property
    def divides(self) -> bool:
        """See `Linear`: rows of the matrix."""
        return True

    def part(self, x: Tensor, outputs: slice) -> Tensor:
        """See `Linear`."""
        return F.linear(x, self.weight[outputs], None if self.bias is None else self.bias[outputs])

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows of some tokens, as an embedding. [T] int64 to [T, in]."""
        return F.embedding(ids, self.weight)

    def stack(self, count: int) -> Tensor:
        """See `Linear`."""
        return self.weight.unflatten(0, (count, -1))

    def fill(self, outputs: slice, stored: Stored) -> None:
        """See `Linear`."""
        self.weight[outputs].copy_(dense(stored))

    def fill_randomly(self, std: float, generator: torch.Generator) -> None:
        """See `Linear`."""
        self.weight.normal_(0.0, std, generator=generator)


def plain_linear(
    in_features: int, out_features: int, *, dtype: torch.dtype, device: torch.device | str,
) -> PlainLinear:
    """Allocate a product that is never quantised, without a bias."""
    return PlainLinear(
        PLAIN, in_features, (out_features,), bias=False, dtype=dtype, device=device)


def parameter(*shape: int, dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    """Allocate weights that are not filled and not trained."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
