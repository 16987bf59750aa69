"""What the parts of a prefill cost on one GPU, from the committed rows of ``bench ttft`` and
``bench ops``, for simulations of several.

A fit for each part; `Rates.sources` says of each figure which rows it comes from, and what no row
tells is an assumption that is called one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longspan.bench.shapes import BUDGET_FILES, Shape, released_budgets
from longspan.commands.results import read_file
from longspan.config import ModelConfig
from longspan.errors import LongspanError

PLAN = "released-tile"
"""Budgets of the rows that the sparse rates come from."""
STRETCHES = tuple(0.05 * step for step in range(1, 41))
"""Tried for `Rates.stretch`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumptions:
    """What no committed row tells."""

    stage_s: float = 2e-3
    """Fixed time of a chunk on a stage: launches, and what the host does."""
    hop_s: float = 30e-6
    """Latency of sending activations to the next stage."""
    collective_s: float = 60e-6
    """Latency of one all-gather or all-reduce."""
    bytes_per_s: float = 400e9
    """Between two GPUs of one host, each way."""
    noise: float = 0.05
    """Ranks in lockstep wait for the slowest one in every layer: share of their time."""


ASSUMED = Assumptions()


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Seconds that the parts of a prefill take on one GPU."""

    linear_s: float
    """Products with weights, for a token and a layer."""
    rest_s: float
    """All else, for a token and a layer."""
    norm_s: float
    """Norms, which are part of the rest: ranks that share a layer's heads each compute them."""
    dense_pair_s: float
    """One query and key of one head, dense."""
    sparse_pair_s: float
    """The same among what a selection keeps."""
    stretch: float
    """A head with the budget B keeps ``B (1 - exp(-L / (stretch B)))`` keys of L."""
    shrink: float
    """Share of what is kept that each token of a chunk's length costs: keys of the chunk itself
    that stand behind a query."""
    selection_s: tuple[float, float, float]
    """One selection: fixed, for a token of context, for a token of the chunk."""
    sources: Mapping[str, str]
    """Where each figure comes from."""


def read_rates(shape: Shape, results: Path, device: str) -> Rates:
    """Fit the rates of a shape to the rows of one device.

    Args:
        results: folder of result files.
        device: the device's part of their names, such as ``nvidia-h200``.

    Raises `LongspanError` where rows are missing.
    """
    rows = _rows(results, "ttft", device)
    own = [row for row in rows if row["shape"] == shape.name]
    sparse = [row for row in rows if row.get("plan") == PLAN]
    own_sparse = [row for row in own if row.get("plan") == PLAN]
    dense = [row for row in own if row["attention"] == "dense"]
    if not own_sparse or not dense:
        raise LongspanError(
            f"{results}: no rows of bench ttft for {shape.name} on {device}, dense and with the "
            f"budgets {PLAN}: run longspan bench ttft there, or name other shapes")
    model = shape.model
    pair_s, stretch, shrink = _fit_pairs(sparse)
    linear = [_linear_s(row, model) for row in own_sparse]
    rest = [row["share"]["rest"] * row["ttft_s"] / row["num_tokens"] / model.num_layers
            for row in own_sparse]
    pairs = [row["share"]["attention"] * row["ttft_s"] / (
        (row["layers"] - 1) * model.num_heads * row["num_tokens"] ** 2 / 2) for row in dense]
    norm_s, norm_source = _norm_s(results, device, model)
    lengths = ", ".join(f"{row['num_tokens']:,} ({row['chunk_len']:,})" for row in own_sparse)
    return Rates(
        linear_s=median(linear), rest_s=median(rest), norm_s=min(norm_s, median(rest)),
        dense_pair_s=median(pairs), sparse_pair_s=pair_s, stretch=stretch, shrink=shrink,
        selection_s=_fit_selection(sparse, own_sparse), sources={
            "linear_s": f"median of shares of ttft rows {PLAN}: {lengths} tokens (chunk)",
            "rest_s": "the same rows", "norm_s": norm_source,
            "dense_pair_s": "median of shares of dense ttft rows: " + ", ".join(
                f"{row['num_tokens']:,}" for row in dense),
            "sparse_pair_s": f"least squares over all {len(sparse)} ttft rows {PLAN}",
            "stretch": "the same", "shrink": "the same", "selection_s": "the same"})


def layer_budgets(name: str) -> list[list[int]]:
    """Return the keys that each head of each layer of a shape keeps by its released budgets."""
    return [[vertical + slash for _, vertical, slash, _ in heads.values()]
            for heads in released_budgets(name)]


def kept_keys(
    budgets: NDArray[np.float64], start: int, stop: int, stretch: float,
) -> NDArray[np.float64]:
    """Return the keys kept by all queries between two positions together, for heads of these
    budgets (see `Rates.stretch`)."""
    reach = stretch * budgets
    return budgets * (stop - start + reach * (np.exp(-stop / reach) - np.exp(-start / reach)))


def last_layer_share(model: ModelConfig) -> float:
    """Return the last layer's share of a layer's products in prefill: keys and values alone."""
    hidden = model.hidden_size
    kv = 2 * model.num_kv_heads * model.head_dim * hidden
    attention = 2 * model.num_heads * model.head_dim * hidden
    return kv / (kv + attention + 3 * hidden * model.intermediate_size)


def selected_contexts(num_tokens: int, chunk_len: int) -> tuple[int, float]:
    """Return the number of a prompt's chunks and their mean context, tokens."""
    ends = [min(start + chunk_len, num_tokens) for start in range(0, num_tokens, chunk_len)]
    return len(ends), sum(ends) / len(ends)


def _rows(results: Path, bench: str, device: str) -> list[dict[str, Any]]:
    file = results / f"{bench}.{device}.json"
    if not file.is_file():
        raise LongspanError(f"{file}: no such file; run longspan bench {bench} on that device, or "
                            "name the folder with --results")
    return [row for row in read_file(file)["rows"] if "error" not in row]


def _linear_s(row: Mapping[str, Any], model: ModelConfig) -> float:
    layers = model.num_layers - 1 + last_layer_share(model)
    return float(row["share"]["linear"] * row["ttft_s"] / row["num_tokens"] / layers)


def _fit_pairs(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
    """Fit seconds of a pair, stretch and shrink in relative error."""
    seconds = np.array([row["share"]["attention"] * row["ttft_s"] for row in rows])
    chunks = np.array([row["chunk_len"] for row in rows], dtype=float)
    best = (np.inf, 0.0, 0.0, 0.0)
    for stretch in STRETCHES:
        pairs = np.array([_pairs(row["shape"], row["num_tokens"], stretch) for row in rows])
        terms = np.stack([pairs / seconds, -pairs * chunks / seconds], axis=1)
        (pair_s, shrunk_s), *_ = np.linalg.lstsq(terms, np.ones(len(rows)), rcond=None)
        error = float(np.square(terms @ [pair_s, shrunk_s] - 1).sum())
        best = min(best, (error, pair_s, stretch, shrunk_s / pair_s))
    return float(best[1]), best[2], max(0.0, float(best[3]))


def _pairs(name: str, num_tokens: int, stretch: float) -> float:
    if name not in BUDGET_FILES:
        raise LongspanError(f"{name}: no released budgets; there are {', '.join(BUDGET_FILES)}")
    budgets = np.array(layer_budgets(name)[:-1], dtype=float)
    return float(kept_keys(budgets, 0, num_tokens, stretch).sum())


def _fit_selection(
    rows: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]],
) -> tuple[float, float, float]:
    """Fit fixed time, context and chunk length to the shape with most rows, and scale the fit to
    the shape's own rows."""
    names = [row["shape"] for row in rows]
    most = max(sorted(set(names)), key=names.count)
    terms, seconds = zip(*(_selection(row) for row in rows if row["shape"] == most), strict=True)
    scale = np.array(terms) / np.array(seconds)[:, None]
    found, *_ = np.linalg.lstsq(scale, np.ones(len(seconds)), rcond=None)
    found = np.maximum(found, 0)
    factor = median(second / float(np.dot(found, term)) for term, second in map(_selection, own))
    fixed, context, query = (float(factor * value) for value in found)
    return fixed, context, query


def _selection(row: Mapping[str, Any]) -> tuple[tuple[float, float, float], float]:
    """Return the terms of a row's mean selection and its time, seconds."""
    count, context = selected_contexts(row["num_tokens"], row["chunk_len"])
    seconds = row["share"]["selection"] * row["ttft_s"] / count / (row["total_layers"] - 1)
    return (1.0, context, float(row["chunk_len"])), seconds


def _norm_s(results: Path, device: str, model: ModelConfig) -> tuple[float, str]:
    rows = [row for row in _rows(results, "ops", device) if row["op"] == "add_rms_norm"]
    if not rows:
        return 0.0, "no row: all of the rest is taken as shared"
    params = rows[0]["params"]
    hidden = Shape.make(params["shape"]).model.hidden_size
    each_s = 2e-3 * rows[0]["time_ms"] / params["num_queries"]
    return (each_s * model.hidden_size / hidden,
            "two norms a layer: ops row add_rms_norm, scaled by the hidden size")
