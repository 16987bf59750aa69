"""The CPU comparison: the fit, the ratios and the rows, on made-up times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longspan.bench.engine import cpu, measure
from longspan.bench.engine.measure import Measurement
from longspan.commands import results
from longspan.errors import LongspanError
from longspan.eval.text import python_text_roots
from tests.doubles import write_checkpoint


def made_up(measurement: Measurement) -> dict[str, Any]:
    n = measurement.num_tokens
    times = {"dense": 1e-3 * n + 1e-6 * n * n, "sparse": 2e-3 * n, "transformers": 1e-2 * n}
    return {"model": "m", "impl": measurement.impl, "num_tokens": n, "threads": 2,
            "prefill_s": times[measurement.impl], "density": 1.0, "peak_memory_gib": 1.0}


def test_ratios_from_the_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = cpu.run("m", lengths=[1000, 2000], demo_length=4000, transformers_length=2000,
                      threads=2, out=tmp_path, measure=made_up)
    assert summary["dense_extrapolated_s"] == 20.0
    assert summary["sparse_over_dense_extrapolated"] == 2.5
    assert summary["sparse_over_transformers"] == 5.0
    out = capsys.readouterr().out
    assert "2.50 times as fast as dense" in out and "5.00 times as fast as transformers" in out
    (content,) = results.read_bench(tmp_path, "cpu")
    assert [(row["impl"], row["num_tokens"]) for row in content["rows"]] == [
        ("dense", 1000), ("dense", 2000), ("sparse", 2000), ("sparse", 4000),
        ("transformers", 2000)]
    assert content["summary"] == summary


def test_two_lengths_are_needed(tmp_path: Path) -> None:
    with pytest.raises(LongspanError, match="two different lengths"):
        cpu.run("m", lengths=[8, 8], demo_length=9, transformers_length=9, threads=1, out=tmp_path)


@pytest.mark.parametrize(("points", "expected"), [
    ([(1, 3.0), (2, 10.0)], (1.0, 2.0)),
    ([(10, 210.0), (20, 820.0), (40, 3240.0)], (1.0, 2.0)),
    ([(1, 1.0), (2, 8.0)], (0.0, 33 / 17)),
])
def test_fit(points: list[tuple[int, float]], expected: tuple[float, float]) -> None:
    assert cpu.fit_quadratic(points) == pytest.approx(expected)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("model"), model_type="qwen2",
                                max_position_embeddings=8192))


def test_measures_this_engine(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    roots = [root / "json" for root in python_text_roots()]
    monkeypatch.setattr(measure, "python_text_roots", lambda: roots)
    # the warm-up is as long as the prompt: it must not be the same, or the cache has it
    for impl in ("dense", "sparse"):
        row = measure.measure(Measurement(model=model, impl=impl, num_tokens=700, threads=1))
        assert row["prefill_s"] > 0 and row["peak_memory_gib"] > 0 and 0 < row["density"] <= 1
        assert (row["impl"], row["num_tokens"], row["threads"]) == (impl, 700, 1)


def test_measures_transformers_in_a_process_of_its_own(model: str) -> None:
    row = measure.in_subprocess(
        Measurement(model=model, impl="transformers", num_tokens=5000, threads=1))
    assert row["impl"] == "transformers" and row["prefill_s"] > 0 and row["density"] == 1


def test_a_failing_measurement_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LongspanError, match="failed with status"):
        measure.in_subprocess(
            Measurement(model=str(tmp_path / "x"), impl="dense", num_tokens=500, threads=1))
