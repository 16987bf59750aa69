"""Rows, macro scores and areas; comparisons; plots."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from longspan.errors import LongspanError, MissingDependencyError
from longspan.eval.compare import compare_runs
from longspan.eval.plot import draw_all
from longspan.eval.samples import Sample
from longspan.eval.stats import wilson_interval
from longspan.eval.summary import Arm, summarise
from longspan.eval.tasks.registry import RULER_11, TaskOptions, all_tasks

TASKS = all_tasks(TaskOptions())
ARM = Arm("m", "dca+yarn", {"haystack": "packages", "held_out": True})


def samples(task: str, length: int | None, scores: Sequence[float | None], **fields: Any
            ) -> list[Sample]:
    return [Sample(
        key=f"{task}/{length}/{i}", task=task, num_tokens=length, index=i, prompt_tokens=1000,
        ids_sha256=f"{task}{length}{i}", score=score, **{
            "positions": (100 * i % 1000,), "ttft_s": 1.0 + i, "density": 0.5, **fields})
        for i, score in enumerate(scores)]


def rows_of(planned: dict[str, dict[str, int]], found: list[Sample]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = summarise(ARM, planned, found, TASKS)["rows"]
    return rows


def test_every_row_carries_n_and_its_interval() -> None:
    found = samples("niah_single_1", 4096, [1.0] * 19 + [0.0])
    rows = rows_of({"niah_single_1": {"4096": 20}}, found)
    row = rows[0]
    low, high = wilson_interval(19, 20)
    assert row == {
        "model": "m", "task": "niah_single_1", "num_tokens": 4096, "attention": "dca+yarn",
        "haystack": "packages", "held_out": True, "depth": None, "n": 20, "score": 0.95,
        "ci_low": round(low, 4), "ci_high": round(high, 4), "method": "wilson",
        "num_planned": 20, "num_documents": 20, "status": "complete", "density": 0.5,
        "ttft_s": 10.5, "ttft_n": 20, "prompt_tokens": 1000}
    depths = [row for row in rows if row["task"] == "niah_single_1" and row["depth"] is not None]
    assert sum(row["n"] for row in depths) == 20 and len(depths) == 10


def test_what_was_not_run_is_shown_as_not_run() -> None:
    found = samples("vt", 4096, [0.2, 0.4]) + samples("vt", 8192, [1.0], status="timeout")
    found += samples("longbench-chat", None, [None, 0.7], label="x")
    rows = rows_of({"vt": {"4096": 4, "8192": 2, "16384": 2}, "longbench-chat": {"data": 3}}, found)
    status = {(row["task"], row["num_tokens"]): (row["n"], row["score"], row["status"])
              for row in rows}
    assert status["vt", 4096] == (2, 0.3, "2 not run")
    assert status["vt", 8192] == (0, None, "1 timeout, 1 not run")
    assert status["vt", 16384] == (0, None, "2 not run")
    assert status["longbench-chat", None] == (1, 0.7, "1 not judged, 1 not run")
    assert status["ruler-11", 4096] == (0, None, "10 of 11 tasks not run")
    assert ("ruler-retrieval", 4096) not in status and ("ruler-13", 4096) not in status


def test_macro_scores_show_tasks_at_the_floor() -> None:
    found = [s for name in RULER_11 for s in samples(
        name, 4096, [0.0 if name in ("vt", "cwe", "fwe") else 1.0] * 10)]
    rows = rows_of({name: {"4096": 10} for name in RULER_11}, found)
    scores = {row["task"]: row for row in rows if row["depth"] is None}
    assert scores["ruler-retrieval"]["score"] == 1.0 and scores["ruler-tracking"]["score"] == 0.0
    assert scores["ruler-counting"]["score"] == 0.0
    macro = scores["ruler-11"]
    assert macro["score"] == pytest.approx(8 / 11, abs=1e-4) and macro["n"] == 110
    assert macro["ci_low"] < 8 / 11 < macro["ci_high"], "no interval is without width"
    assert set(RULER_11) <= set(scores)


def test_groups_have_costs_and_nats_of_their_tasks() -> None:
    """Nats have no bounds, so their interval is no Wilson's; one document has no interval."""
    found = samples("cwe", 4096, [0.0] * 4) + samples("fwe", 4096, [0.0] * 4, ttft_s=None)
    for sample, nats in zip(found, (1.0, 1.0, 1.0, 1.0, 2.0, 4.0, 2.0, 4.0), strict=True):
        object.__setattr__(sample, "answer_nll", nats)
    rows = rows_of({"cwe": {"4096": 4}, "fwe": {"4096": 4}}, found)
    cwe, fwe, group = (next(row for row in rows if row["task"] == name)
                       for name in ("cwe", "fwe", "ruler-counting"))
    assert (cwe["answer_nll"], cwe["answer_nll_low"], cwe["answer_nll_high"]) == (1.0, 1.0, 1.0)
    assert 2.0 <= fwe["answer_nll_low"] < fwe["answer_nll"] == 3.0 < fwe["answer_nll_high"] <= 4.0
    assert (group["answer_nll"], group["answer_nll_n"]) == (2.0, 8)
    assert 1.0 < group["answer_nll_low"] < 2.0 < group["answer_nll_high"]
    assert (group["density"], group["ttft_s"], group["ttft_n"]) == (0.5, 2.5, 4)
    (row,) = rows_of({"vt_no_space": {"4096": 1}},
                     samples("vt_no_space", 4096, [1.0], answer_nll=0.5))
    assert (row["answer_nll"], row["answer_nll_low"]) == (0.5, None)


def test_a_grid_keeps_its_depths() -> None:
    """Real depths lie a little before them, and would fall into the tenth before."""
    found = [s for i, depth in enumerate((0.0, 0.1, 0.2, 1.0)) for s in samples(
        "needle", 4096 + i, [1.0], positions=(int(990 * depth),), facts={"depth": depth})]
    rows = rows_of({"needle": {str(4096 + i): 1 for i in range(4)}}, found)
    assert [row["depth"] for row in rows if row["depth"] is not None] == [0.0, 0.1, 0.2, 1.0]


def test_labels_values_and_forms_are_counted() -> None:
    found = samples("absent", 4096, [0.0, 0.0, 1.0], form="f")
    for sample, label, value in zip(found, ("invented", "invented", ""), (1.0, 0.0, 0.0),
                                    strict=True):
        object.__setattr__(sample, "label", label)
        object.__setattr__(sample, "values", {"refused": value})
    (row,) = rows_of({"absent": {"4096": 3}}, found)
    assert row["labels"] == {"invented": 2} and row["values"] == {"refused": 0.3333}
    assert row["form"] == "f"


def test_areas_say_how_far_they_reach() -> None:
    lengths = [4096 * 2**i for i in range(9)]
    scores = [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5]
    found = [s for length, score in zip(lengths, scores, strict=True)
             for s in samples("passkey", length, [1.0, score > 0.6, 1.0, score > 0.6])]
    planned = {"passkey": {str(length): 4 for length in lengths}}
    (area,) = summarise(ARM, planned, found, TASKS)["areas"]
    assert area["score"] == pytest.approx((3 + 0.75 + 4 * 0.5) / 8, abs=1e-4)
    assert (area["status"], area["n"]) == ("complete", 36)
    assert area["ci_low"] < area["score"] < area["ci_high"]
    part = [s for s in found if s.num_tokens in lengths[1:5]]
    (area,) = summarise(ARM, planned, part, TASKS)["areas"]
    assert area["status"] == "measured from 8,192 to 65,536 tokens only"
    assert summarise(ARM, planned, found[:4], TASKS)["areas"] == []


def by_key(found: list[Sample]) -> dict[str, Sample]:
    return {sample.key: sample for sample in found}


def test_comparisons_are_paired_and_count_what_disagrees() -> None:
    first = samples("niah_single_1", 4096, [1.0] * 20) + samples("vt", 4096, [0.8, 0.6, 0.4])
    second = samples("niah_single_1", 4096, [1.0] * 15 + [0.0] * 5) + samples(
        "vt", 4096, [0.8, 0.6, 0.4])
    rows = compare_runs(by_key(first), by_key(second[:19] + second[20:]), TASKS)
    single, vt, tracking = rows
    assert (single["n"], single["num_better"], single["num_worse"]) == (19, 0, 4)
    assert (single["first"], single["difference"]) == (1.0, -0.2105)
    assert single["method"] == "mcnemar" and single["p_value"] == 0.125
    assert single["verdict"] == "undecided" and vt["num_better"] == vt["num_worse"] == 0
    assert tracking["task"] == "ruler-tracking" and tracking["p_value"] is None


def test_comparisons_of_nats() -> None:
    first = samples("vt", 4096, [0.0, 0.0, 0.0], answer_nll=1.0)
    second = samples("vt", 4096, [0.0, 0.0, 0.0], answer_nll=1.5)
    row = compare_runs(by_key(first), by_key(second[:2]), TASKS)[0]
    assert (row["nll_n"], row["nll_difference"]) == (2, 0.5)
    row = compare_runs(by_key(first), by_key(second[:1]), TASKS)[0]
    assert row["nll_ci_low"] is None, "one document says nothing about the spread"


def test_comparisons_of_what_cannot_be_compared() -> None:
    first = by_key(samples("vt", 4096, [1.0]))
    with pytest.raises(LongspanError, match="no answered prompt in common"):
        compare_runs(first, by_key(samples("vt", 8192, [1.0])), TASKS)
    with pytest.raises(LongspanError, match="vt/4096/0: the two runs asked different prompts"):
        compare_runs(first, {key: Sample(**{**{f: getattr(s, f) for f in s.__slots__},
                                            "ids_sha256": "other"})
                             for key, s in first.items()}, TASKS)


def test_plots(tmp_path: Path) -> None:
    found = [s for length in (4096, 32_768) for task in ("needle", "vt")
             for s in samples(task, length, [1.0, 0.0, 1.0] * 3)]
    planned = {task: {"4096": 9, "32768": 9, "131072": 9} for task in ("needle", "vt")}
    first = summarise(ARM, planned, found, TASKS)
    second = summarise(Arm("m", "sparse-dca+yarn", {}), planned, found[:20], TASKS)
    files = draw_all([first, second], tmp_path)
    names = sorted(file.name for file in files)
    assert names == [
        "m--sparse-dca+yarn-minus-m--dca+yarn.svg", "needle.m--dca+yarn.heatmap.svg",
        "needle.m--sparse-dca+yarn.heatmap.svg", "scores.svg"]
    texts = {file.name: file.read_text() for file in files}
    draw_all([first, second], tmp_path)
    assert texts == {file.name: file.read_text() for file in files}, "the same figures, same file"
    with pytest.raises(LongspanError, match="no scored sample to plot"):
        draw_all([summarise(ARM, planned, [], TASKS)], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(LongspanError, match="cannot be written"):
        draw_all([first], tmp_path / "file" / "x")


def test_plots_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = samples("vt", 4096, [1.0])
    with pytest.raises(MissingDependencyError, match=r"pip install 'longspan\[plots\]'"):
        draw_all([summarise(ARM, {"vt": {"4096": 1}}, found, TASKS)], tmp_path)
