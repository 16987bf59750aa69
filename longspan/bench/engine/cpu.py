"""`longspan bench cpu`: what sparse prefill saves on this CPU, and where transformers stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from longspan.bench.engine.measure import Measurement, in_subprocess
from longspan.commands.console import note, percent, seconds, show_table
from longspan.commands.results import write_rows
from longspan.cores import num_cores
from longspan.errors import LongspanError

Measure = Callable[[Measurement], dict[str, Any]]


def run(
    model: str, *, lengths: Sequence[int], demo_length: int, transformers_length: int,
    threads: int | None, out: Path, measure: Measure = in_subprocess,
) -> dict[str, Any]:
    """Measure, print, and write the rows. Returns the summary.

    Args:
        lengths: two or more dense lengths; their times give a n + b n^2 by least squares.
    """
    if len(set(lengths)) < 2:
        raise LongspanError("--lengths: two different lengths are needed to extrapolate from")
    threads = threads or num_cores()

    def one(impl: str, num_tokens: int) -> dict[str, Any]:
        row = measure(Measurement(model=model, impl=impl, num_tokens=num_tokens, threads=threads))
        write_rows(out, "cpu", [row])
        return row

    dense = [one("dense", length) for length in lengths]
    sparse = one("sparse", demo_length)
    same = sparse if transformers_length == demo_length else one("sparse", transformers_length)
    other = one("transformers", transformers_length)
    linear, quadratic = fit_quadratic([(row["num_tokens"], row["prefill_s"]) for row in dense])
    expected_s = linear * demo_length + quadratic * demo_length**2
    summary = {
        "model": model, "threads": threads, "dense_s_per_token": linear,
        "dense_s_per_token_squared": quadratic, "demo_length": demo_length,
        "dense_extrapolated_s": round(expected_s, 2),
        "sparse_over_dense_extrapolated": round(expected_s / sparse["prefill_s"], 2),
        "transformers_length": transformers_length,
        "sparse_over_transformers": round(other["prefill_s"] / same["prefill_s"], 2),
    }
    rows = list({(row["impl"], row["num_tokens"]): row for row in [*dense, same, sparse, other]}
                .values())
    file = write_rows(out, "cpu", rows, summary=summary)
    _show(rows, summary)
    note(f"rows in {file}")
    return summary


def fit_quadratic(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Fit t = a n + b n^2 through two points, by least squares through more: (a, b). Noise can make
    the linear share negative; it is 0 then."""
    s2 = sum(n**2 for n, _ in points)
    s3 = sum(n**3 for n, _ in points)
    s4 = sum(n**4 for n, _ in points)
    t1 = sum(n * t for n, t in points)
    t2 = sum(n * n * t for n, t in points)
    determinant = s2 * s4 - s3 * s3
    linear, quadratic = (t1 * s4 - t2 * s3) / determinant, (s2 * t2 - s3 * t1) / determinant
    return (linear, quadratic) if linear >= 0 else (0.0, t2 / s4)


def _show(rows: Sequence[dict[str, Any]], summary: dict[str, Any]) -> None:
    table = [(row["impl"], f"{row['num_tokens']:,}", seconds(row["prefill_s"]),
              percent(row["density"]), f"{row['peak_memory_gib']:.2f} GiB") for row in rows]
    table.append(("dense, extrapolated", f"{summary['demo_length']:,}",
                  seconds(summary["dense_extrapolated_s"]), "", ""))
    show_table(f"prefill of {summary['model']} on {summary['threads']} threads, fp32",
               ("", "tokens", "prefill", "density", "peak memory"), table)
    print(f"sparse is {summary['sparse_over_dense_extrapolated']:.2f} times as fast as dense at "
          f"{summary['demo_length']:,} tokens (dense extrapolated), and "
          f"{summary['sparse_over_transformers']:.2f} times as fast as transformers at "
          f"{summary['transformers_length']:,}")
