"""What the parts of a prefill cost on one GPU, from the committed rows of ``bench ttft``, ``bench
ops`` and ``bench pipeline``, for simulations of several.

A fit for each part; `Rates.sources` says of each figure which rows it comes from, and what no row
tells is an assumption that is called one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longspan.bench.pipeline.steps import SparseRates, fit_steps, read_steps
from longspan.bench.shapes import Shape
from longspan.commands.results import read_file
from longspan.config import ModelConfig
from longspan.errors import LongspanError

PLAN = "released-tile"
"""Plan of the sparse rows that products and the rest come from."""
MODEL_OF_STEPS = "qwen2.5-7b"
"""Shape of the steps that attention and selection come from."""


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
    sparse: SparseRates
    """Attention and selection of a sparse chunk."""
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
    own_sparse = [row for row in own if row.get("plan") == PLAN]
    dense = [row for row in own if row["attention"] == "dense"]
    if not own_sparse or not dense:
        raise LongspanError(
            f"{results}: no rows of bench ttft for {shape.name} on {device}, dense and with the "
            f"budgets {PLAN}: run longspan bench ttft there, or name other shapes")
    model = shape.model
    linear_s, rest_s = _token_s(own_sparse, model)
    pairs = [row["share"]["attention"] * row["ttft_s"] / (
        (row["layers"] - 1) * model.num_heads * row["num_tokens"] ** 2 / 2) for row in dense]
    norm_s, norm_source = _norm_s(results, device, model)
    sparse, sparse_source = _sparse(rows, own_sparse, shape, results, device)
    lengths = ", ".join(f"{row['num_tokens']:,} ({row['chunk_len']:,})" for row in own_sparse)
    return Rates(
        linear_s=linear_s, rest_s=rest_s, norm_s=min(norm_s, rest_s), dense_pair_s=median(pairs),
        sparse=sparse, sources={
            "linear_s": f"median of shares of ttft rows {PLAN}: {lengths} tokens (chunk)",
            "rest_s": "the same rows", "norm_s": norm_source,
            "dense_pair_s": "median of shares of dense ttft rows: " + ", ".join(
                f"{row['num_tokens']:,}" for row in dense),
            "pair_s": sparse_source, "stretch": "the same", "shrink": "the same",
            "selection_s": "the same; " + (
                "scaled by the selections of ttft rows of both shapes"
                if shape.name != MODEL_OF_STEPS else "fixed, for a token of context")})


def layer_budgets(shape: Shape) -> NDArray[np.float64]:
    """Return the keys that each head of each layer of a shape keeps: [layer, head]."""
    plan = shape.plan
    return plan.budget_share * (np.array(plan.vertical, float) + np.array(plan.slash, float))


def dca_stride(model: ModelConfig) -> int:
    """Return the length of DCA's chunks, or more than any prompt has."""
    return model.dca.dca_chunk_len if model.dca else 1 << 40


def last_layer_share(model: ModelConfig) -> float:
    """Return the last layer's share of a layer's products in prefill: keys and values alone."""
    hidden = model.hidden_size
    kv = 2 * model.num_kv_heads * model.head_dim * hidden
    attention = 2 * model.num_heads * model.head_dim * hidden
    return kv / (kv + attention + 3 * hidden * model.intermediate_size)


def _rows(results: Path, bench: str, device: str) -> list[dict[str, Any]]:
    file = results / f"{bench}.{device}.json"
    if not file.is_file():
        raise LongspanError(f"{file}: no such file; run longspan bench {bench} on that device, or "
                            "name the folder with --results")
    return [row for row in read_file(file)["rows"] if "error" not in row]


def _token_s(rows: Sequence[Mapping[str, Any]], model: ModelConfig) -> tuple[float, float]:
    """Return what products and the rest cost, for a token and a layer."""
    layers = model.num_layers - 1 + last_layer_share(model)
    linear = [row["share"]["linear"] * row["ttft_s"] / row["num_tokens"] / layers for row in rows]
    rest = [row["share"]["rest"] * row["ttft_s"] / row["num_tokens"] / model.num_layers
            for row in rows]
    return median(linear), median(rest)


def _sparse(
    rows: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]], shape: Shape,
    results: Path, device: str,
) -> tuple[SparseRates, str]:
    """Fit attention and selection to one shape's steps; of another shape's selections it is known
    how much longer they take."""
    base = Shape.make(MODEL_OF_STEPS)
    timed = [row for row in _rows(results, "pipeline", device) if is_timed(row, base)]
    if not timed:
        raise LongspanError(
            f"{results}: no rows of bench pipeline for {base.name} on one {device}, in chunks of "
            "several lengths: run longspan bench pipeline --ranks 1 there")
    base_rows = [row for row in rows if row["shape"] == base.name and row.get("plan") == PLAN]
    linear_s, rest_s = _token_s(base_rows, base.model)
    layers = base.model.num_layers - 1
    token_s = linear_s * (layers + last_layer_share(base.model)) + rest_s * layers
    found = fit_steps(
        [step for row in timed for step in read_steps(row, base.plan.tail_len)],
        layer_budgets(base)[:-1], stride=dca_stride(base.model), step_s=ASSUMED.stage_s,
        token_s=token_s)
    known = {(row["num_tokens"], row["chunk_len"]): _selected_s(row) for row in base_rows}
    ratios = [_selected_s(row) / known[key] for row in own
              if (key := (row["num_tokens"], row["chunk_len"])) in known]
    if not ratios:
        raise LongspanError(
            f"{results}: rows of bench ttft for {shape.name} on {device} have other prompt and "
            f"chunk lengths than {base.name}'s: run longspan bench ttft there with the same")
    fixed, context = (median(ratios) * value for value in found.selection_s)
    lengths = ", ".join(sorted({row["plan"].removeprefix("fixed ") for row in timed}, key=int))
    return (replace(found, selection_s=(fixed, context)),
            f"least squares over the steps of {len(timed)} pipeline rows of one GPU, "
            f"{base.name}, {base.plan_label}, chunks of {lengths}")


def is_timed(row: Mapping[str, Any], shape: Shape) -> bool:
    """Tell whether a row of ``bench pipeline`` holds the steps of one GPU, by a shape's plan."""
    return (row["source"] == "measured" and row["shape"] == shape.name
            and row["attention"] == "sparse" and row["cp"] * row["pp"] * row["tp"] == 1
            and row["plan"].startswith("fixed ") and row["policy"] == shape.plan_label
            and row["layers"] == row["total_layers"] and "timeline_ms" in row)


def _selected_s(row: Mapping[str, Any]) -> float:
    """Return the time of a row's selections in one layer, seconds."""
    return float(row["share"]["selection"] * row["ttft_s"] / (row["total_layers"] - 1))


def _norm_s(results: Path, device: str, model: ModelConfig) -> tuple[float, str]:
    rows = [row for row in _rows(results, "ops", device) if row["op"] == "add_rms_norm"]
    if not rows:
        return 0.0, "no row: all of the rest is taken as shared"
    params = rows[0]["params"]
    hidden = Shape.make(params["shape"]).model.hidden_size
    each_s = 2e-3 * rows[0]["time_ms"] / params["num_queries"]
    return (each_s * model.hidden_size / hidden,
            "two norms a layer: ops row add_rms_norm, scaled by the hidden size")
