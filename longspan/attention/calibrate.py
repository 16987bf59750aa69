"""Sparsity refinement: how much budget each head needs for its recall (arXiv 2501.15383, 5.5).

A calibrator watches the dense prefill of long texts, layer by layer and chunk by chunk. For each
chunk in the second half of a text it selects as sparse prefill would, for every plan of a ladder of
growing budgets, attends to the selected keys, and compares the LSE of every row with that of dense
attention. Each head then takes the first step of the ladder whose mean recall reaches a threshold;
one that no step satisfies is diffuse and takes the last, and what its output is off by with the
mean correction is named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from longspan import ops
from longspan.attention.observer import AttendedRows, AttentionObserver
from longspan.attention.sparsity import SparsityPlan
from longspan.errors import LongspanError
from longspan.ops.geometry import segments

CANDIDATES = ((30, 800), (100, 750), (500, 700), (3500, 100))
"""(vertical, slash) pairs of MInference's offline search, about equal in cost."""
SEARCH_LEN = 30_720
"""Length that the search is made for, tokens."""
TIE = 0.005
"""Recall by which a later candidate must be better."""
GROWTH = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Steps of the ladder: factors of the initial budgets."""
CHECKED_TILES = 4
"""Tiles at a chunk's end whose outputs are compared."""


class Tally:
    """Sums of what was measured, over rows: [steps, L, H] of recall, [L, H] of squares of outputs.

    Plain lists, so that it can be kept in a file between two runs.
    """

    def __init__(self, num_steps: int, num_layers: int, num_heads: int) -> None:
        self.recall = [[[0.0] * num_heads for _ in range(num_layers)] for _ in range(num_steps)]
        self.error, self.output = ([[0.0] * num_heads for _ in range(num_layers)] for _ in range(2))
        self.rows = [0] * num_layers

    def as_dict(self) -> dict[str, Any]:
        """Return what `load` takes, for JSON."""
        return {"recall": self.recall, "error": self.error, "output": self.output,
                "rows": self.rows}

    @classmethod
    def load(cls, raw: Mapping[str, Any]) -> Tally:
        """Take up the sums of an earlier run."""
        tally = cls(0, 0, 0)
        tally.recall, tally.rows = raw["recall"], raw["rows"]
        tally.error, tally.output = raw["error"], raw["output"]
        return tally

    def add(self, layer: int, recall: Tensor, error: Tensor, output: Tensor, rows: int) -> None:
        """Add one segment. recall: [steps, H] sums over rows; error, output: [H] squares."""
        for step, values in enumerate(recall.tolist()):
            _add(self.recall[step][layer], values)
        _add(self.error[layer], error.tolist())
        _add(self.output[layer], output.tolist())
        self.rows[layer] += rows

    def recalls(self) -> list[list[list[float]]]:
        """Return the mean recall, [steps][L][H]."""
        return [[[value / max(1, rows) for value in row]
                 for row, rows in zip(layers, self.rows, strict=True)] for layers in self.recall]

    def output_errors(self) -> list[list[float]]:
        """Return the relative error of the outputs at the last step, corrected, [L][H]."""
        return [[(error / output) ** 0.5 if output else 0.0
                 for error, output in zip(errors, outputs, strict=True)]
                for errors, outputs in zip(self.error, self.output, strict=True)]


class Calibrator(AttentionObserver):
    """Measures every plan of a ladder on chunks of a dense prefill.

    Args:
        ladder: plans of one policy; the last one's outputs are compared.
        tally: where sums go.
        first: rows before this position are not measured.
    """

    def __init__(self, ladder: Sequence[SparsityPlan], tally: Tally, first: int) -> None:
        self._ladder, self._tally, self._first = tuple(ladder), tally, first
        self._parts: list[AttendedRows] = []

    def attended(self, rows: AttendedRows) -> None:
        """Collect the rows of a slice, which may come in pieces, and measure it when it is
        whole."""
        if rows.start == rows.item.cached_len:
            self._parts = []
        self._parts.append(rows)
        if rows.start + rows.q.shape[0] < rows.item.context_len:
            return
        parts, self._parts = self._parts, []
        q, lse = torch.cat([part.q for part in parts]), torch.cat([part.lse for part in parts])
        begin, tile_len = rows.item.cached_len, rows.cache.k.shape[1]
        first = max(begin, -(-self._first // tile_len) * tile_len)
        stop = rows.item.context_len // tile_len * tile_len
        for start, end in segments(first, max(first, stop), rows.rotary.stride):
            own = slice(start - begin, end - begin)
            self._measure(rows, q[own], lse[own], start)

    def _measure(self, rows: AttendedRows, q: Tensor, full: Tensor, start: int) -> None:
        """Measure one segment. q: [T, H, D]; full: [T, H]."""
        args = (rows.cache, rows.item.block_table)
        rest = (rows.rotary, rows.item.scale)
        found = []
        for plan in self._ladder:
            selection = ops.select_vertical_slash(
                q, *args, start, *rest, plan.layer(rows.layer_idx))
            lse = ops.sparse_prefill_attention(q, *args, start, *rest, selection, False)[1]
            found.append(torch.exp(lse - full).sum(0))
        checked = min(len(q), CHECKED_TILES * rows.cache.k.shape[1])
        last, place = q[-checked:], start + len(q) - checked
        dense = ops.prefill_attention(last, *args, place, *rest)[0].float()
        out = ops.sparse_prefill_attention(last, *args, place, *rest, selection, True)[0].float()
        self._tally.add(rows.layer_idx, torch.stack(found), (out - dense).square().sum((0, 2)),
                        dense.square().sum((0, 2)), len(q))


def candidates(policy: SparsityPlan, length: int) -> list[SparsityPlan]:
    """Return a plan for each pair of the offline search on a text of ``length`` tokens: in
    proportion where that is shorter than `SEARCH_LEN`, or the most columns would always win."""
    share = min(1.0, length / SEARCH_LEN)
    pairs = [(math.ceil(vertical * share), math.ceil(slash * share))
             for vertical, slash in CANDIDATES]
    return [with_budgets(policy, lambda layer, head, pair=pair: pair) for pair in pairs]


def best_candidates(tally: Tally, plans: Sequence[SparsityPlan]) -> SparsityPlan:
    """Choose the candidate that keeps most for each head: the unrefined plan."""
    recalls = tally.recalls()

    def best(layer: int, head: int) -> tuple[int, int]:
        chosen = 0
        for step in range(1, len(plans)):
            if recalls[step][layer][head] > recalls[chosen][layer][head] + TIE:
                chosen = step
        return plans[chosen].vertical[layer][head], plans[chosen].slash[layer][head]

    return with_budgets(plans[0], best)


def ladder(initial: SparsityPlan) -> list[SparsityPlan]:
    """Return plans that grow from the initial one."""
    return [with_budgets(initial, lambda layer, head, factor=factor: (
        round(initial.vertical[layer][head] * factor),
        round(initial.slash[layer][head] * factor))) for factor in GROWTH]


def refined(tally: Tally, initial: SparsityPlan, threshold: float) -> SparsityPlan:
    """Give each head the first step of the ladder that reaches the threshold, or the last."""
    steps, recalls = ladder(initial), tally.recalls()

    def enough(layer: int, head: int) -> tuple[int, int]:
        chosen = next((plan for plan, found in zip(steps, recalls, strict=True)
                       if found[layer][head] >= threshold), steps[-1])
        return chosen.vertical[layer][head], chosen.slash[layer][head]

    return with_budgets(initial, enough)


def achieved(tally: Tally, threshold: float) -> list[list[float]]:
    """Return each head's recall with `refined`'s budgets, [L][H]."""
    recalls = tally.recalls()
    return [[next((found[layer][head] for found in recalls if found[layer][head] >= threshold),
                  recalls[-1][layer][head]) for head in range(len(recalls[0][layer]))]
            for layer in range(len(recalls[0]))]


def with_budgets(policy: SparsityPlan, budget: Any) -> SparsityPlan:
    """Return the policy with ``budget(layer, head)``, (vertical, slash), for each head."""
    pairs = [[budget(layer, head) for head in range(len(row))]
             for layer, row in enumerate(policy.vertical)]
    return replace(policy, vertical=tuple(tuple(v for v, _ in row) for row in pairs),
                   slash=tuple(tuple(s for _, s in row) for row in pairs))


def check_threshold(threshold: float) -> None:
    """Raise `LongspanError` unless a recall can be asked for."""
    if not 0 < threshold < 1:
        raise LongspanError(f"recall is {threshold:g}; it must be above 0 and below 1, for "
                            "example 0.9")


def _add(sums: list[float], values: Sequence[float]) -> None:
    for index, value in enumerate(values):
        sums[index] += value
