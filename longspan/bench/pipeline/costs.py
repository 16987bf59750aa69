"""How long a chunk takes in each layer, on ranks that share the layer by rows or by heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from longspan.bench.pipeline.rates import (
    ASSUMED,
    Assumptions,
    Rates,
    dca_stride,
    last_layer_share,
    layer_budgets,
)
from longspan.bench.pipeline.steps import kept_keys, num_selections
from longspan.bench.shapes import Shape

Times = NDArray[np.float64]
"""[num_layers] seconds."""
ELEMENT_BYTES = 2
"""Keys, values and activations are bf16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """How the GPUs work together: cp x tp ranks share each layer, pp groups of them the layers."""

    cp: int = 1
    """Ranks that share each chunk's rows (context parallelism)."""
    pp: int = 1
    """Stages of layers (pipeline parallelism)."""
    tp: int = 1
    """Ranks that share each layer's heads (tensor parallelism)."""

    @property
    def count(self) -> int:
        """Number of GPUs."""
        return self.cp * self.pp * self.tp

    @property
    def label(self) -> str:
        """Name of the arrangement, such as ``pp4 tp2``."""
        parts = [f"{name}{size}" for name, size in
                 (("cp", self.cp), ("pp", self.pp), ("tp", self.tp)) if size > 1]
        return " ".join(parts) or "one GPU"


class LayerCosts:
    """Predicts the time of a chunk in each layer.

    Args:
        sparse: attention is sparse, by the shape's plan.
    """

    def __init__(
        self, shape: Shape, rates: Rates, *, sparse: bool, ranks: Ranks,
        assumed: Assumptions = ASSUMED,
    ) -> None:
        self.model, self._rates, self._sparse = shape.model, rates, sparse
        self._ranks, self._assumed = ranks, assumed
        self._budgets, self._stride = layer_budgets(shape), dca_stride(shape.model)
        self._weights = np.array([_slowest_share(tuple(heads), self.model.num_kv_heads, ranks.tp)
                                  for heads in self._budgets.tolist()])
        self._last_share = last_layer_share(shape.model)
        self._known: dict[tuple[int, int], list[float]] = {}

    def seconds(self, start: int, stop: int) -> list[float]:
        """Predict the time of a chunk from ``start`` to ``stop - 1`` in each layer, seconds."""
        key = start, stop
        if key not in self._known:
            found = self._compute_s(start, stop)
            if self._ranks.cp * self._ranks.tp > 1:
                found *= 1 + self._assumed.noise
            self._known[key] = (found + self._wait_s(stop - start)).tolist()
        return self._known[key]

    def send_s(self, num_tokens: int) -> float:
        """Return the time in which activations reach the next stage, seconds."""
        num_bytes = ELEMENT_BYTES * self.model.hidden_size * num_tokens / self._ranks.cp
        return self._assumed.hop_s + num_bytes / self._assumed.bytes_per_s

    def _compute_s(self, start: int, stop: int) -> Times:
        rates, ranks, size = self._rates, self._ranks, stop - start
        sharers = ranks.cp * ranks.tp
        rest_s = rates.norm_s * size / ranks.cp + (rates.rest_s - rates.norm_s) * size / sharers
        found = np.full(self.model.num_layers, rates.linear_s * size / sharers + rest_s)
        if self._sparse:
            sparse = rates.sparse
            keys = kept_keys(self._budgets, start, stop, sparse.stretch).sum(axis=1)
            fixed, context = sparse.selection_s
            found += sparse.pair_s * (1 - sparse.shrink * size) * keys * self._weights / ranks.cp
            found += num_selections(start, stop, self._stride) * (fixed + context * stop / sharers)
        else:
            pairs = self.model.num_heads * size * (stop + start) / 2
            found += rates.dense_pair_s * pairs / sharers
        found[-1] = self._last_share * rates.linear_s * size / sharers  # its keys and values
        return found

    def _wait_s(self, num_tokens: int) -> Times:
        """Return the time of each layer's collectives, seconds; as if none hid behind
        computation."""
        ranks, assumed, model = self._ranks, self._assumed, self.model
        wait_s = np.zeros(model.num_layers)
        if ranks.cp > 1:  # keys and values of the others' rows
            kv_bytes = 2 * ELEMENT_BYTES * model.num_kv_heads // ranks.tp * model.head_dim
            wait_s += assumed.collective_s + (
                num_tokens * kv_bytes * (ranks.cp - 1) / ranks.cp / assumed.bytes_per_s)
        if ranks.tp > 1:  # two reductions of the rows
            row_bytes = 2 * ELEMENT_BYTES * model.hidden_size * (ranks.tp - 1) / ranks.tp
            wait_s[:-1] += 2 * (assumed.collective_s
                                + num_tokens / ranks.cp * row_bytes / assumed.bytes_per_s)
        return wait_s


@lru_cache(maxsize=4096)
def _slowest_share(budgets: tuple[float, ...], num_kv_heads: int, num_ranks: int) -> float:
    """Return the slowest rank's share of a layer's budgets under the best choice of which KV groups
    each rank has, as many for each."""
    size = len(budgets) // num_kv_heads
    groups = [sum(budgets[index * size:(index + 1) * size]) for index in range(num_kv_heads)]
    return _spread(groups, num_ranks) / sum(groups)


def _spread(groups: Sequence[float], num_ranks: int) -> float:
    if num_ranks == 1:
        return sum(groups)
    first, *rest = sorted(groups, reverse=True)
    size = len(groups) // num_ranks
    best = float("inf")
    for picked in combinations(range(len(rest)), size - 1):  # the largest group's companions
        own = first + sum(rest[index] for index in picked)
        others = [value for index, value in enumerate(rest) if index not in picked]
        best = min(best, max(own, _spread(others, num_ranks - 1)))
    return best
