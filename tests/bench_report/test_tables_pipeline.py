"""The page of several GPUs, from rows."""

from __future__ import annotations

import json
from pathlib import Path

from bench.report import build_table, draw_images
from longspan.cli import run_command
from longspan.commands.results import read_file

RESULTS = Path(__file__).parents[2] / "bench" / "results"


def simulated(folder: Path) -> Path:
    """Rows of a run, and the rows that it starts from, in a folder."""
    for name in ("ttft", "ops", "pipeline"):
        file = f"{name}.nvidia-h200.json"
        (folder / file).write_bytes((RESULTS / file).read_bytes())
    assert run_command(["bench", "pipeline", "--simulate", "--shapes", "qwen2.5-7b", "--gpus",
                        "4,8", "--lengths", "131072", "--out", str(folder)]) == 0
    return folder / "pipeline.simulated-nvidia-h200.json"


def test_rows_tables_and_plots(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    content = read_file(simulated(results))
    assert content["device"]["name"] == "simulated NVIDIA H200"
    assert content["assumed"]["noise"] == 0.05
    rows = {(row["attention"], row["cp"], row["pp"], row["tp"], row["plan"]): row
            for row in content["rows"]}
    assert all(row["source"] == "simulated" for row in rows.values())
    ladder, fixed = (rows["sparse", 1, 4, 1, plan] for plan in ("ladder", "fixed 32768"))
    assert ladder["ttft_s"] < 0.85 * fixed["ttft_s"] and ladder["idle"] < fixed["idle"]
    assert sum(ladder["layers_by_stage"]) == 28 and len(ladder["timeline_ms"]) == 4
    assert abs(ladder["timeline_ms"][-1][-1][1] / 1e3 - ladder["ttft_s"]) < 1e-3
    text = build_table("pipeline", results)
    assert "**qwen2.5-7b, 4 GPUs**" in text and "not measured on several" in text
    cell = (f"{ladder['ttft_s']:.2f} s, {ladder['speedup']:.2f}x, {100 * ladder['idle']:.0f} %")
    both = rows["sparse", 2, 2, 1, "ladder"]
    assert "cp 2 x pp 2, planned / ladder |" in text and f"| {both['ttft_s']:.2f} s, " in text
    assert cell in text and "| all | `noise` | 0.05 | assumed |" in text
    images = draw_images("pipeline", results, tmp_path / "page.md")
    assert "pipeline.simulated-nvidia-h200.timeline.svg" in images
    assert (tmp_path / "plots" / "pipeline.simulated-nvidia-h200.timeline.svg").is_file()


def test_only_simulations_stand_in_the_tables(tmp_path: Path) -> None:
    (tmp_path / "pipeline.chip.json").write_text(json.dumps({"bench": "pipeline", "rows": []}))
    assert build_table("pipeline", tmp_path) == ""
