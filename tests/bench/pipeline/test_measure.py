"""Prompts measured over processes on the CPU: every plan has its row, timelines add up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.pipeline_rows import measured_rows
from bench.plots_pipeline import draw_pipeline
from bench.tables_pipeline import pipeline_section
from longspan.bench.pipeline.costs import Ranks
from longspan.bench.pipeline.measure import MeasureOptions, measure, parse_arrangement
from longspan.bench.pipeline.simulate import BEST
from longspan.bench.session import BenchOptions, BenchSession
from longspan.bench.shapes import PlanOptions, Shape
from longspan.commands.results import read_file
from longspan.errors import LongspanError

LENGTH = 640
SIZES: dict[str, Any] = {
    "lengths": (LENGTH,), "chunk_lens": (128, 256), "layers": 3, "memory_gib": 1.0}


def rows_of(out: Path, **options: Any) -> tuple[int, list[dict[str, Any]], dict[str, Any]]:
    session = BenchSession("pipeline", BenchOptions.make("cpu", out, None, None))
    status = measure(session, Shape.make("nano", PlanOptions()), MeasureOptions(
        **SIZES, **options))
    content = read_file(next(out.glob("pipeline.*.json")))
    return status, content["rows"], content


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Any]:
    out = tmp_path_factory.mktemp("results")
    status, rows, content = rows_of(
        out, attention=("dense",), decode_steps=3, users=2,
        arrangements=(Ranks(), Ranks(pp=2), Ranks(cp=2, pp=2)))
    assert status == 0
    return [row for row in rows if row["source"] == "measured"], content


def test_every_plan_of_every_arrangement_has_a_row(measured: Any) -> None:
    rows, _ = measured
    found = {(row["cp"], row["pp"], row["tp"]): set[str]() for row in rows}
    for row in rows:
        found[row["cp"], row["pp"], row["tp"]].add(row["plan"])
    fixed = {"fixed 128", "fixed 256"}
    assert found == {(1, 1, 1): fixed, (1, 2, 1): fixed | {"planned"},
                     (2, 2, 1): fixed | {"planned"}}
    for row in rows:
        lens = {"fixed 128": 128, "fixed 256": 256}
        if row["plan"] in lens:  # pipelines too are cut as asked for
            assert row["longest_chunk"] == lens[row["plan"]]
            assert row["num_chunks"] == -(-LENGTH // lens[row["plan"]])
    best = {row["pp"]: row for row in measured_rows(rows) if row["plan"] == BEST and row["cp"] == 1}
    assert best[2]["ttft_s"] == min(
        row["ttft_s"] for row in rows
        if (row["cp"], row["pp"]) == (1, 2) and row["plan"].startswith("fixed "))
    assert best[2]["chunk_len"] == best[2]["longest_chunk"]


def test_timelines_lie_within_the_time_and_follow_one_another(measured: Any) -> None:
    rows, _ = measured
    for row in rows:
        assert len(row["timeline_ms"]) == row["cp"] * row["pp"] * row["tp"]
        for spans in row["timeline_ms"]:
            assert len(spans) >= row["num_chunks"]
            assert all(start < stop for start, stop in spans)
            assert all(one[1] <= other[0] for one, other in zip(spans, spans[1:], strict=False))
            assert spans[0][0] >= 0 and spans[row["num_chunks"] - 1][0] < 1e3 * row["ttft_s"]
        if row["pp"] == 2:  # the second stage begins a chunk when the first one has done with it
            ranks, own = row["timeline_ms"], row["cp"]
            for first, second in zip(ranks[:own], ranks[own:], strict=True):
                assert all(done[1] <= begun[0] for done, begun in zip(first, second, strict=False))
    assert all(0 <= row["idle"] < 1 for row in rows)
    assert all(row["predicted_s"] > 0 for row in rows if row["cp"] * row["pp"] > 1)
    alone = [row for row in rows if row["cp"] * row["pp"] == 1]
    assert all(row["speedup"] == 1 for row in alone)
    assert all(len(row["launch_s"]) == row["num_chunks"] for row in alone)  # a CPU computes in it
    assert all(sum(row["launch_s"]) > 0.5 * row["ttft_s"] for row in alone)


def test_decoding_and_prompts_together_have_rows_of_their_own(measured: Any) -> None:
    _, content = measured
    for source in ("decode", "users"):
        rows = [row for row in content["rows"] if row["source"] == source]
        assert [(row["cp"], row["pp"]) for row in rows] == [(1, 1), (1, 2), (2, 2)]
        for row in rows:
            assert not row["divides_kv"] and row["num_tokens"] == LENGTH
            if source == "decode":
                assert 0 < row["low_ms"] <= row["step_ms"] <= row["high_ms"]
            else:
                one, other = row["ttft_each_s"]
                assert 0 < one <= other == row["ttft_s"]
                assert row["tokens_per_s"] == pytest.approx(2 * LENGTH / other, rel=1e-3)


def test_rows_become_a_table_and_a_plot(measured: Any, tmp_path: Path) -> None:
    _, content = measured
    table = pipeline_section([content])
    assert table.count("\n| nano, dense, 640 (3 of 6 layers) |") == 3 and "| pp 2 |" in table
    assert table.count("\n| nano, 640 |") == 3 == table.count("\n| nano, dense, 2 x 640 |")
    assert "| cp 2 x pp 2 |" in table
    (plot,) = draw_pipeline(content, tmp_path / "pipeline.cpu")
    assert plot.name == "pipeline.cpu.timeline.svg" and plot.stat().st_size > 1000


def test_what_cannot_be_arranged_is_a_row_that_says_so(tmp_path: Path) -> None:
    status, rows, _ = rows_of(tmp_path, attention=("dense",), arrangements=(Ranks(tp=3),))
    assert status == 1
    (row,) = rows
    assert "tensor_parallel 3" in row["error"]


@pytest.mark.parametrize(("text", "ranks"), [
    ("1", Ranks()), ("cp2", Ranks(cp=2)), ("cp2xtp4", Ranks(cp=2, tp=4))])
def test_arrangements_are_read(text: str, ranks: Ranks) -> None:
    assert parse_arrangement(text) == ranks


@pytest.mark.parametrize("text", ["2", "cp", "cp1", "xx2", "cp2x", "cp2xcp2", "cp-2"])
def test_other_arrangements_are_refused(text: str) -> None:
    with pytest.raises(LongspanError, match="--ranks: "):
        parse_arrangement(text)
