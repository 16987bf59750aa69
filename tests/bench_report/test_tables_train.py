"""Goals before and after, effects over seeds: rows to tables, runs to rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import effects, report
from bench.tables_eval import eval_table
from bench.tables_train import effects_section, extensions_section, goals_section
from longspan.train.report import phase_rows

HEAD = {"device": {"name": "a GPU", "count": 1}, "date": "2026-11-29"}
ROOT = Path(__file__).resolve().parents[2]


def row(stage: str, task: str, score: float, n: int = 20, **more: Any) -> dict[str, Any]:
    return {"model": f"toy-at-{stage}", "task": task, "num_tokens": 4096, "attention": "rope",
            "depth": None, "n": n, "score": score, "ci_low": 0.1, "ci_high": 0.9, **more}


def test_each_goal_is_a_line_and_each_stage_a_column() -> None:
    rows = [row("dpo", "vt", 0.75), row("shipped", "vt", 0.0),
            row("dpo", "niah_single_1", 1.0), row("dpo", "niah_multikey_3", 0.9),
            row("dpo", "absent", 0.9, 41, values={"refused": 0.8095, "false refusals": 0.05}),
            {**row("dpo", "vt", 0.5), "model": "toy"}]
    text = goals_section([{**HEAD, "rows": rows}])
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines()}
    assert "| shipped | dpo |" in text, "in the order of training"
    assert lines["variable tracking"].endswith("| 0.0 (10.0-90.0; 20) | 75.0 (10.0-90.0; 20) |")
    pooled = lines["single and multi-key"].split(" | ")
    assert pooled[4] == "not run" and pooled[5].startswith("95.0 (83.5-98.6; 40)"), "38 of 40"
    assert "81.0 (60.0-92.3; 21)" in lines["absent keys refused"], "every other question, and one"
    assert "5.0 (0.9-23.6; 20)" in lines["false refusals"]
    assert "-at-" not in eval_table({**HEAD, "rows": [
        {**each, "status": "complete", "density": 1.0} for each in rows]})


def write_run(folder: Path, scores: dict[tuple[str, int], list[float]]) -> None:
    folder.mkdir(parents=True)
    (folder / "samples.jsonl").write_text("".join(
        json.dumps({"task": task, "num_tokens": length, "score": score}) + "\n"
        for (task, length), own in scores.items() for score in own))


def test_an_effect_is_the_mean_difference_of_its_seeds(tmp_path: Path) -> None:
    """The interval is Student's: half of it is 4.303 standard deviations over the root of 3."""
    for seed, (before, after) in enumerate([(0.2, 0.4), (0.3, 0.6), (0.1, 0.5)]):
        for arm, score in (("without", before), ("with", after)):
            write_run(tmp_path / "synthetic" / arm / str(seed) / "32k" / "rope",
                      {("vt", 32_768): [score, score]})
    write_run(tmp_path / "dpo" / "with" / "0", {("vt", 4096): [1.0]})
    assert effects.main([str(tmp_path), "--results", str(tmp_path / "results"), "--device",
                         "cpu"]) == 0
    file, = (tmp_path / "results").glob("effects.*.json")
    found, = json.loads(file.read_text())["rows"]
    assert (found["without_score"], found["with_score"], found["num_seeds"]) == (0.2, 0.5, 3)
    assert found["difference"] == pytest.approx(0.3) and found["num_questions"] == 2
    half = 4.303 * 0.1 / 3**0.5
    assert (found["ci_low"], found["ci_high"]) == pytest.approx((0.3 - half, 0.3 + half), abs=1e-4)
    text = effects_section([json.loads(file.read_text())])
    assert "| 32,768 | vt | 20.0 | 50.0 | +30.0 | +5.2 to +54.8 | 3 |" in text
    assert report.build_table("effects", tmp_path / "results") == text


def test_runs_without_two_seeds_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert effects.main([str(tmp_path)]) == 2
    assert "no effect has two seeds" in capsys.readouterr().err


@pytest.mark.parametrize(("script", "arguments"), [
    ("effects.sh", ("other", "run", "out")), ("eval_nano.sh", ()),
    ("two_gpus.sh", ("other", "out"))])
def test_scripts_refuse_what_they_do_not_know(
    tmp_path: Path, script: str, arguments: tuple[str, ...]
) -> None:
    found = subprocess.run(["bash", ROOT / "bench" / script, *arguments], cwd=tmp_path,
                           capture_output=True, text=True, check=False)
    assert found.returncode and found.stderr.count("\n") == 1


def test_goals_are_measured_by_one_command(tmp_path: Path) -> None:
    """Tiny: one prompt of each line that is not a million tokens long."""
    made = subprocess.run(
        ["bash", ROOT / "bench" / "eval_nano.sh", "nano", "shipped", tmp_path / "out"],
        cwd=ROOT, capture_output=True, text=True, check=False, env={
            **os.environ, "PYTHON": sys.executable, "LENGTHS": "900", "N": "1", "WORDS": "2",
            "WORDS_LENGTH": "900", "GIB": "1", "MILLION": "0", "TASKS": "niah_single_1,vt",
            "PYTHONPATH": str(ROOT)})
    assert made.returncode == 0 and not made.stdout, made.stdout + made.stderr
    tasks = [json.loads(line)["task"] for file in (tmp_path / "out").rglob("samples.jsonl")
             for line in file.read_text().splitlines()]
    assert set(tasks) == {"absent", "fresh_wordings", "niah_single_1", "unseen_wordings", "vt"}


def test_an_extension_says_what_short_contexts_lost() -> None:
    """From the log of a run to the table; a model from nothing has no line before."""
    steps: list[dict[str, Any]] = [
        {"phase": phase, "num_tokens": tokens, "seconds": 2.0, "tflops": 300.0, "loss": 1.5,
         "bits_per_byte": 0.6, "answer_accuracy": None, "peak_memory_gib": 9.0}
        for phase, tokens in (("64k", 100), ("64k", 200), ("128k", 300))]
    gates = [{"gate": "before", "held_out_bits_per_byte": 0.5}, *steps[:2],
             {"gate": "64k", "held_out_bits_per_byte": 0.505}, steps[2]]
    rows = phase_rows(gates, "toy") + phase_rows(steps, "new")
    assert [row["tflops"] for row in rows] == [300.0] * 4
    lines = extensions_section([{**HEAD, "rows": rows}]).splitlines()
    assert lines[0] == "toy (a GPU, 2026-11-29)" and len(lines) == 7
    assert lines[4:] == ["| none |  |  |  |  | 0.5000 |  |",
                         "| 64k | 200 | 50 | 300 | 1.5000 | 0.5050 | +1.00 % |",
                         "| 128k | 100 | 50 | 300 | 1.5000 | not run |  |"]


def test_an_extension_is_judged_by_one_command(tmp_path: Path) -> None:
    """Before it, by DCA and after it, each at both lengths."""
    made = subprocess.run(
        ["bash", ROOT / "bench" / "eval_extension.sh", "nano", "nano", tmp_path / "out"],
        cwd=ROOT, capture_output=True, text=True, check=False, env={
            **os.environ, "PYTHON": sys.executable, "LENGTHS": "700 900", "N": "1 2", "GIB": "1",
            "NAME": "toy", "MOST": "4096", "TASKS": "niah_single_1", "PYTHONPATH": str(ROOT)})
    assert made.returncode == 0 and not made.stderr, made.stdout + made.stderr
    found = sorted((file.parent.parent.name, len(file.read_text().splitlines()))
                   for file in (tmp_path / "out").rglob("samples.jsonl"))
    assert found == [(f"{what}-{length}", count)
                     for what in ("128k-rope", "none-dca+yarn", "none-rope")
                     for length, count in (("700", 1), ("900", 2))]


@pytest.mark.parametrize(("settings", "status", "said"), [
    ({"PYTHON": "true", "LENGTHS": "1k 2k", "N": "5"}, 2, "LENGTHS has 2 entries, N 1"),
    ({"PYTHON": "false", "LENGTHS": "1k 2k", "N": "5 5"}, 1, "status 1")])
def test_what_fails_of_an_extension_is_told(
    tmp_path: Path, settings: dict[str, str], status: int, said: str,
) -> None:
    made = subprocess.run(
        ["bash", ROOT / "bench" / "eval_extension.sh", "a", "b", tmp_path / "out"], check=False,
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, **settings})
    assert made.returncode == status and said in made.stderr
