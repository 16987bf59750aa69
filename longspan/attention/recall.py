"""Adds up the recall of one prefill slice, layer by layer, without waiting for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RecallSums(NamedTuple):
    """Recall of some sparse queries, summed over layers, to be divided by the weights."""

    sums: Tensor
    """[2] fp32: of typical rows and of scouts, each chunk's mean times its weight."""
    weights: tuple[int, int]
    """(query, layer) pairs that the sums stand for; 0: not measured."""
    num_tokens: int
    """Queries that the sums cover, in the layer that has most."""


class RecallMeter:
    """Takes the layers' measurements of one slice; see `longspan.ops.select.recall`."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._weights = [0, 0]
        self._tokens: dict[int, int] = {}

    def add(self, recall: Tensor, num_typical: int, num_queries: int, layer_idx: int) -> None:
        """Add one segment of one layer. recall: [H, R], ``num_typical`` rows first."""
        typical, scouts = recall[:, :num_typical].mean(), recall[:, num_typical:]
        has_scouts = scouts.shape[1] > 0
        both = torch.stack((typical, scouts.mean() if has_scouts else torch.zeros_like(typical)))
        both = both * num_queries
        self._sums = both if self._sums is None else self._sums + both
        self._weights[0] += num_queries
        self._weights[1] += num_queries * has_scouts
        self._tokens[layer_idx] = self._tokens.get(layer_idx, 0) + num_queries

    def read(self) -> RecallSums | None:
        """Return what was added; None: no query of the slice was sparse."""
        if self._sums is None:
            return None
        return RecallSums(self._sums, (self._weights[0], self._weights[1]),
                          max(self._tokens.values()))
