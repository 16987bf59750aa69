"""How long a prompt may take, before anything of the model is there: counted operations over the
speed of one matrix product, measured in a moment."""

from __future__ import annotations

import time

import torch

from longspan.commands.console import seconds
from longspan.engine.control.latency import Forecast
from longspan.engine.setup.engine_plan import ResolvedEngine
from longspan.engine.setup.prior_costs import FLOPS

SIZE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the product."""
MEASURE_S = 0.2


def predict_rows(engine: ResolvedEngine, length: int, is_here: bool) -> list[tuple[str, str]]:
    """Predict the time to the first token and of each further one, said to be a guess; of what does
    not fit there is none, for its settings are no one's.

    Args:
        is_here: the plan is for this machine: its speed is measured.
    """
    if engine.memory.missing_bytes:
        return [("first token, a guess", "none, as it does not fit")]
    assert engine.config.device is not None and engine.config.dtype is not None
    kind = engine.config.device.split(":")[0]
    speed = FLOPS[kind]
    if is_here:
        speed = product_speed(engine.config.device, engine.config.dtype)
    factor = FLOPS[kind] / speed
    forecast = forecast_of(engine)
    prefill_s = forecast.prefill_s(0, length) * factor
    decode_s = factor * forecast.costs.decode_s(1, length)
    how = "measured here" if is_here else "assumed"
    return [("first token, a guess", f"after {duration(prefill_s)} (at {speed / 1e9:,.0f} GFLOP/s, "
                                     f"{how})"),
            ("each further one", f"{1000 * decode_s:,.0f} ms, a guess")]


def forecast_of(engine: ResolvedEngine) -> Forecast:
    """Return the prediction that an engine begins with."""
    config = engine.scheduler_config()
    assert config.prior is not None
    is_sparse = engine.plan is not None
    above = 0 if engine.config.attention == "sparse" else engine.model.sparse_threshold
    return Forecast(
        costs=config.prior, block_size=config.block_size,
        prefill_chunk_len=config.prefill_chunk_len, sparse_above=above if is_sparse else None,
        tail_len=config.tail_len)


def product_speed(device: str, dtype: str) -> float:
    """Measure operations per second of matrix products: the best of those that fit the time."""
    kind = device.split(":")[0]
    size = SIZE[kind]
    factors = torch.ones(size, size, dtype=getattr(torch, dtype), device=device)
    best, end = float("inf"), time.monotonic() + MEASURE_S
    while time.monotonic() < end or best == float("inf"):
        start = time.monotonic()
        factors @ factors
        if kind == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.monotonic() - start)
    return 2 * size**3 / max(best, 1e-9)


def duration(value_s: float) -> str:
    """Format a duration that may be hours."""
    if value_s < 100:
        return seconds(value_s)
    minutes = round(value_s / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
