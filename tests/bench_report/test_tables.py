"""README sections of the GPU benchmarks, from made-up rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import plots, report
from bench.tables_eval import eval_table, phases_section
from longspan.errors import LongspanError

SHARE = {"linear": 0.6, "selection": 0.05, "attention": 0.3, "rest": 0.05}


def write(folder: Path, bench: str, rows: list[dict[str, Any]]) -> None:
    content = {"bench": bench, "date": "2025-01-02T03:04:05+00:00", "rows": rows,
               "device": {"name": "Chip", "count": 1}}
    (folder / f"{bench}.chip.json").write_text(json.dumps(content))


def ttft_row(attention: str, seconds: float, **values: Any) -> dict[str, Any]:
    return {"shape": "big", "num_tokens": 1_000_000, "attention": attention, "layers": 28,
            "total_layers": 28, "plan": "v1-s2" if attention == "sparse" else None, "gpus": 1,
            "ttft_s": seconds, "ttft_scaled_s": seconds, "density": 0.0219,
            "peak_memory_gib": 76.54, "chunk_len": 32_768, "share": SHARE, **values}


@pytest.mark.parametrize("name", ["ttft", "decode", "ops", "quality", "serve"])
def test_sections_are_empty_without_results(name: str, tmp_path: Path) -> None:
    assert report.build_table(name, tmp_path) == ""


def test_ttft(tmp_path: Path) -> None:
    write(tmp_path, "ttft", [
        ttft_row("sparse", 25.0), ttft_row("sparse", 30.0, num_tokens=2000),
        ttft_row("dense", 50.0, layers=4, ttft_scaled_s=350.0),
        ttft_row("dense", 51.0, layers=4, ttft_scaled_s=357.0, chunk_len=65_536),
        ttft_row("dense", 1.0, layers=1, ttft_scaled_s=28.0), {"error": "x"}])
    text = report.build_table("ttft", tmp_path)
    assert text.startswith("### A million tokens")
    assert ("| big | 1,000,000 | 350.0 s * (50.0 s, 4 of 28) | 25.0 s | 14.0x | 2.2 % | 76.5 GiB "
            "| 60 / 5 / 30 / 5 | 32,768 | v1-s2 |\n") in text
    assert "| big | 2,000 | not run | 30.0 s |  | 2.2 %" in text
    assert "scaled to all" in text and "(Chip, 2025-01-02)" in text


def test_the_plot_is_drawn_and_shown(tmp_path: Path) -> None:
    folder = tmp_path / "bench" / "results"
    folder.mkdir(parents=True)
    write(folder, "ttft", [ttft_row("sparse", 25.0), ttft_row("sparse", 3.0, num_tokens=131_072),
                           ttft_row("sparse", 31.0, quantization="int4"),
                           ttft_row("sparse", 32.0, kv_dtype="int8"),
                           ttft_row("dense", 350.0), {"error": "x"}])
    readme = tmp_path / "README.md"
    readme.write_text("<!-- bench:ttft -->\n<!-- /bench:ttft -->\n")
    report.run(readme, folder)
    assert "\n![ttft.chip](bench/plots/ttft.chip.svg)\n" in readme.read_text()
    drawn = (tmp_path / "bench" / "plots" / "ttft.chip.svg").read_bytes()
    report.run(readme, folder)
    assert (tmp_path / "bench" / "plots" / "ttft.chip.svg").read_bytes() == drawn
    assert b"<svg" in drawn
    assert plots.ttft_lines(json.loads((folder / "ttft.chip.json").read_text())) == {
        ("big", "dense"): [(1_000_000, 350.0)],
        ("big", "sparse"): [(131_072, 3.0), (1_000_000, 25.0)]}
    (folder / "ttft.chip.json").unlink()
    report.run(readme, folder)
    assert readme.read_text() == "<!-- bench:ttft -->\n<!-- /bench:ttft -->\n"


def test_plots_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(LongspanError, match="longspan.plots"):
        plots.draw_ttft({"rows": [ttft_row("dense", 1.0)]}, tmp_path / "x")
    assert not plots.draw_ttft({"rows": []}, tmp_path / "x")


def test_decode(tmp_path: Path) -> None:
    row = {"shape": "big", "context_len": 1_000_000, "batch_size": 1, "layers": 28,
           "total_layers": 28, "step_ms": 17.123, "floor_ms": 16.0, "over_floor": 1.07,
           "kv_tb_per_s": 3.9, "tokens_per_s": 58.4}
    write(tmp_path, "decode", [{"shape": "copy", "context_len": 0, "tb_per_s": 4.2}, row,
                               {**row, "batch_size": 9, "error": "no memory"}])
    text = report.build_table("decode", tmp_path)
    assert ("| big | 1,000,000 | 1 | 28/28 | 17.12 ms | 16.00 ms | 1.07 | 3.90 TB/s | 58 |\n"
            in text)
    assert "copy |" not in text and "| 9 |" not in text


def test_quality(tmp_path: Path) -> None:
    row = {"model": "nano", "num_tokens": 131_072, "num_questions": 32, "place": "end",
           "attention": "tile",
           "score": 0.969, "n": 32, "chunk_len": 65_536, "density": 0.028, "cost": 0.0358,
           "recall": {"mean": 0.9, "p5": 0.5, "min": 0.4}}
    write(tmp_path, "quality", [row, {**row, "attention": "dense", "recall": None}])
    text = report.build_table("quality", tmp_path)
    assert ("| 131,072 | 32 | end | tile | 65,536 | 31 of 32 | 2.80 % | 3.58 % | 90.0 % | 50.0 % | "
            "40.0 % |\n") in text
    assert "| 131,072 | 32 | end | dense |  | 31 of 32 | 2.80 % | 3.58 % |  |  |  |\n" in text


def test_policies_of_several_seeds_are_one_line(tmp_path: Path) -> None:
    """All their questions, with Wilson's interval; the mean KL, and an interval that is as much
    narrower as prompts are more."""
    row = {"model": "m", "num_tokens": 8192, "num_questions": 32, "place": "spread",
           "attention": "tile num_scouts=0", "score": 0.25, "n": 32, "chunk_len": 8192, "seed": 0,
           "ci_low": 0.1, "ci_high": 0.4, "density": 0.2, "cost": 0.2, "kl": 0.03, "kl_low": 0.02,
           "kl_high": 0.04, "text_nats": 1.5, "answer_nats": 1.0, "recall_typical": 0.5,
           "recall_scouts": None, "recall": None}
    more = {**row, "seed": 1, "score": 0.75, "kl": 0.05, "kl_low": 0.04, "kl_high": 0.06}
    dense = {**row, "attention": "dense", "density": 1.0, "kl": 0.0, "kl_low": 0.0, "kl_high": 0.0}
    write(tmp_path, "quality", [row, more, dense, {**dense, "place": "end"}])
    text = report.build_table("policies", tmp_path)
    assert ("| tile num_scouts=0 | 32 of 64 | 38 to 62 | 0.0400 | 0.0329 to 0.0471 | 1.0000 | "
            "1.5000 | 50.0 % |  | 20.0 % |\n") in text
    assert "questions: spread" in text and "questions: end" not in text
    assert text.index("| dense | 8 of 32 |") < text.index("| tile num_scouts=0 |")


def test_ops(tmp_path: Path) -> None:
    square = {"shape": "big", "num_queries": 32_768, "context_len": 32_768}
    chunk = {"shape": "big", "num_queries": 32_768, "context_len": 1_048_576, "content": "random",
             "plan": "v1-s2", "layer": 3}
    whole = {"shape": "big", "num_tokens": 1_048_576, "content": "local", "plan": "v1-s2",
             "chunk_len": 65_536}
    write(tmp_path, "ops", [
        {"op": "copy", "impl": "torch", "params": {}, "tb_per_s": 4.26},
        {"op": "gemm", "impl": "torch", "params": {"m": 8192}, "tflops": 770.1},
        {"op": "dense_causal", "impl": "ours", "params": square, "tflops": 640.4},
        {"op": "dense_causal", "impl": "cudnn", "params": square, "tflops": 651.2},
        {"op": "dense_causal", "impl": "flex", "params": square, "error": "no"},
        {"op": "decode", "impl": "ours", "params": {"shape": "big", "batch_size": 1,
                                                    "context_len": 1000}, "tb_per_s": 3.9},
        {"op": "select", "impl": "ours", "params": chunk, "time_ms": 1.5, "workspace_mib": 40.2},
        {"op": "sparse_chunk", "impl": "ours", "params": chunk, "time_ms": 9.25, "tflops": 590.0,
         "kernel_tflops": 621.4, "density": 0.0219},
        {"op": "whole_sparse", "impl": "ours", "params": whole, "time_ms": 300.0,
         "selection_ms": 30.0, "dense_ms": 12_000.0, "dense_impl": "cudnn", "ratio": 40.0},
        {"op": "dense_chunk_dca_over_rope", "impl": "ours", "params": chunk,
         "slowdown_percent": 1.26}])
    text = report.build_table("ops", tmp_path)
    for line in (
        "| shape | queries | keys | longspan | cuDNN |\n",
        "| big | 32,768 | 32,768 | 640 | **651** |\n", "| big | 1 | 1,000 | **3.90** |\n",
        "| big | 32,768 | 1,048,576 | random | 2.19 % | 1.50 ms | 40 MiB | 9.25 ms | 590 | 621 |",
        "| big | 1,048,576 | local | 300 ms | 10 % | 12,000 ms (cuDNN) | 40.0x | 65,536 | v1-s2 ",
        "| DCA, dense, 1,048,576 keys | +1.3 % time |\n",
        "| copy, read and written | 4.26 TB/s |\n",
        "| bf16 matrix product, 8,192 cubed | 770 TFLOP/s |\n"):
        assert line in text, line


def test_serve(tmp_path: Path) -> None:
    """Shares and ratios for all devices, plain times for GPUs alone."""
    rows = [
        {"scenario": "prefill", "model": "nano", "metric": metric, "value": value, "unit": "",
         "length": 131_072}
        for metric, value in (("decode_pause_max_budgets", 0.8318), ("health_p99", 7.537))]
    rows += [{"scenario": "decode", "model": "nano", "metric": "tag_over_synchronous_batch_16",
              "value": 1.25, "unit": "x", "length": 131_072}]
    write(tmp_path, "serve", rows)
    text = report.build_table("serve", tmp_path)
    for line in ("### A server beside long prompts", "serving nano (",
                 "| longest pause of a running answer meanwhile | 131,072 | 0.83 step budgets |\n",
                 "| /health meanwhile, 99 of 100 within | 131,072 | 7.5 ms |\n",
                 "| tokens a second, run ahead over synchronous, 16 requests |  | 1.25x |\n"):
        assert line in text, line
    (file,) = tmp_path.glob("serve.*.json")
    file.write_text(file.read_text().replace("Chip", "CPU Chip"))
    assert "/health" not in report.build_table("serve", tmp_path)


def test_there_is_a_place_for_each() -> None:
    pages = [(Path(__file__).parents[2] / name).read_text(encoding="utf-8")
             for name in report.PAGES]
    names = [match[2] for page in pages for match in report.MARKED.finditer(page)]
    assert sorted(names) == sorted({*report.TABLES, *report.SECTIONS})


def score_row(task: str, num_tokens: int, attention: str, depth: float | None = None,
              **more: Any) -> dict[str, Any]:
    return {"model": "m", "task": task, "num_tokens": num_tokens, "attention": attention,
            "depth": depth, "n": 10, "score": 0.5, "ci_low": 0.24, "ci_high": 0.76, **more}


def test_scores_and_what_they_cost(tmp_path: Path) -> None:
    """Many lengths are few in the short table, and all in the long one; plots where they are
    curves."""
    results = tmp_path / "results"
    results.mkdir()
    lengths = [4096 * 2**i for i in range(8)]
    rows = [score_row(task, length, arm, density=0.125, ttft_s=1.5, answer_nll=0.25)
            for task in ("ruler-11", "passkey", "niah_multiquery", "vt") for length in lengths
            for arm in ("sparse-dca", "dca+yarn", "dca", "rope")]
    rows += [score_row("needle", length, arm, depth) for length in lengths[:2]
             for arm in ("dca", "paper-dca", "sparse-dca") for depth in (0.0, 0.5)]
    rows.append(score_row("ruler-counting", 4096, "rope", score=None, n=0))
    write(results, "eval", rows)
    text = report.build_table("eval", results)
    head = ("| tokens | attention | passkey | RULER-11 | counting | retrieval, nats a token "
            "| density | first token |")
    assert head in text and "| 8,192 |" not in text and "| 131,072 | dca |" in text
    assert text.index("| 4,096 | rope |") < text.index("| 4,096 | sparse-dca |")
    assert "| 4,096 | rope | 50 (24-76; 10) | 50 (24-76; 10) | not run | 0.25 | 12.5 % | 1.50 s |" \
        in text
    every = report.build_table("scores", results)
    assert "8,192 |" in every and "| vt | 50 (24-76; 10) |" in every
    assert every.startswith("### All scores")
    images = report.draw_images("eval", results, tmp_path / "README.md")
    assert images.splitlines()[1] == "![eval.chip.m.ruler](plots/eval.chip.m.ruler.svg)"
    assert {file.name for file in (tmp_path / "plots").iterdir()} == {
        f"eval.chip.m.{name}.svg" for name in ("ruler", "positions", "needle")}


def test_fidelity(tmp_path: Path) -> None:
    interval = {f"{name}_{end}": None for name in ("kl", "nats_more") for end in ("low", "high")}
    floor = {"model": "m", "task": "all", "num_tokens": 4096, "attention": "dca floor", "n": 2,
             "kl": 1e-9, "kl_p99": 1e-8, "worst_task": {"task": "vt", "kl": 2e-9}, "top1": 1.0,
             "nats_more": 0.0, "density": 1.0, "nats_by_position": {"0-256": 2.0}, **interval}
    sparse = {**floor, "attention": "sparse-dca", "kl": 0.01, "kl_low": 0.005, "kl_high": 0.02,
              "recall": 0.8, "output_error": 0.1, "worst_head": {"recall": 0.25}, "density": 0.05,
              "recall_by_head": [[0.8, 0.25]], "output_error_by_head": [[0.1, 0.2]]}
    write(tmp_path, "fidelity", [floor, sparse, {**sparse, "task": "vt"}])
    text = report.build_table("fidelity", tmp_path)
    assert "| m | 4,096 | sparse-dca | 2 | 0.01 (0.005 to 0.02) |" in text
    assert "| 80.0 % | 25.0 % | 10.0 % | 5.0 % |" in text and text.count("| m |") == 2
    assert "heads.svg" in report.draw_images("fidelity", tmp_path, tmp_path / "README.md")


def test_phases_stand_in_order_and_apart_from_other_models() -> None:
    def row(model: str, length: int, score: float) -> dict[str, Any]:
        return {"model": model, "task": "ruler-11", "num_tokens": length, "attention": "rope",
                "depth": None, "n": 8, "score": score, "ci_low": 0.1, "ci_high": 0.9,
                "status": "complete", "density": 1.0}

    rows = [row("toy-after-128k", 4096, 0.75), row("toy-after-4k", 4096, 0.5),
            row("toy", 4096, 0.25), row("toy-after-128k", 131_072, 0.5)]
    content = {"device": {"name": "a GPU", "count": 1}, "date": "2026-11-28", "rows": rows}
    lines = [line for line in phases_section([content]).splitlines() if "RULER-11" in line]
    assert [line.split(" | ")[0] for line in lines] == ["| 4k", "| 128k"]
    assert lines[0].endswith("| 50 (10-90; 8) | not run |")
    assert "after" not in eval_table(content) and "| 25 (10-90; 8) |" in eval_table(content)
    assert "each phase, plain RoPE: %" in phases_section([content])


def test_what_precedes_all_phases_stands_first_and_dca_beside_plain_rope() -> None:
    rows = [{"model": f"toy-after-{phase}", "task": "ruler-11", "num_tokens": 4096, "n": 8,
             "attention": arm, "depth": None, "score": 0.5, "ci_low": 0.1, "ci_high": 0.9}
            for phase, arm in (("128k", "rope"), ("none", "dca+yarn"), ("none", "rope"))]
    text = phases_section([{"device": {"name": "a GPU", "count": 1}, "date": "2026-11-28",
                            "rows": rows}])
    found = [line.split(" | ")[0] for line in text.splitlines() if "RULER-11" in line]
    assert found == ["| none", "| none, dca+yarn", "| 128k"]
    assert "plain RoPE unless it says otherwise" in text
