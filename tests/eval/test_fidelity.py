"""Rows of `longspan eval fidelity` out of made-up measurements, and their plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longspan.eval.fidelity import TextFidelity, chosen_positions, fidelity_rows
from longspan.eval.plot_fidelity import draw_fidelity


def text(task: str, kl: Sequence[float], **fields: Any) -> TextFidelity:
    nats = fields.pop("nats", np.full(9, 2.0))
    return TextFidelity(**{
        "task": task, "num_tokens": 10, "index": 0, "attention": "sparse-dca", "nats": nats,
        "dense_nats": np.full(len(nats), 1.5), "kl": np.array(kl, float),
        "agrees": np.array([value < 1 for value in kl]), "density": 0.25, **fields})


def heads(*means: Sequence[float]) -> list[list[list[float]]]:
    return [[[mean, mean / 2, mean / 4] for mean in layer] for layer in means]


@pytest.mark.parametrize(("num_tokens", "count", "answer_len"), [
    (5, 8, 0), (9, 8, 0), (100, 8, 0), (100, 8, 7), (1_000_000, 2048, 30), (100, 8, 20)])
def test_positions_hold_the_end_and_reach_the_beginning(
    num_tokens: int, count: int, answer_len: int
) -> None:
    places = chosen_positions(num_tokens, count, answer_len)
    assert (np.diff(places) > 0).all() and places[0] == 1 and places[-1] == num_tokens - 1
    assert set(range(num_tokens - max(answer_len, 1), num_tokens)) <= set(places.tolist())
    assert len(places) <= max(count, answer_len + 1)
    if num_tokens == 1_000_000:
        assert len(places) == count and (places[:1024] < num_tokens - 1024).all()


def test_rows_name_the_worst_and_carry_intervals() -> None:
    texts = [text("vt", [0.1, 0.3, 2.0], recalls=heads([0.9, 0.5]), errors=heads([0.1, 0.2])),
             text("vt", [0.1, 0.1, 0.1], index=1, answer_len=2, recalls=heads([0.7, 0.5]),
                  errors=heads([0.1, 0.4])),
             text("cwe", [0.2, 0.2, 0.2], recalls=heads([0.2, 0.8]), errors=heads([0.3, 0.0]))]
    cwe, vt, every = fidelity_rows("m", texts)
    assert (vt["task"], vt["n"], vt["num_positions"], vt["kl_max"]) == ("vt", 2, 6, 2.0)
    assert vt["kl"] == pytest.approx(0.45, abs=1e-5) and vt["kl_low"] == pytest.approx(0.1)
    assert (cwe["kl_low"], cwe["nats_more_low"]) == (None, None), "one text has no interval"
    assert vt["top1"] == pytest.approx(5 / 6, abs=1e-4)
    assert vt["top1_low"] < 5 / 6 < vt["top1_high"]
    assert (vt["nats_more"], vt["answer_kl"], vt["num_answer_tokens"]) == (0.5, 0.1, 2)
    assert vt["recall_by_head"] == [[0.8, 0.5]] and vt["output_error_by_head"] == [[0.1, 0.3]]
    assert vt["worst_head"] == {"layer": 0, "head": 1, "recall": 0.5, "output_error": 0.3}
    assert (every["task"], every["n"], every["worst_task"]["task"]) == ("all", 3, "vt")
    assert every["density"] == 0.25


def test_arms_and_lengths_are_rows_of_their_own() -> None:
    texts = [text("vt", [0.1]), text("vt", [0.1], attention="dca floor"),
             text("vt", [0.1], num_tokens=20)]
    rows = fidelity_rows("m", texts)
    assert [(row["num_tokens"], row["attention"]) for row in rows] == [
        (10, "dca floor"), (10, "sparse-dca"), (20, "sparse-dca")]
    assert "recall" not in rows[0], "dense attention keeps everything"


def test_nats_by_position_leave_short_ends_out() -> None:
    nats = np.concatenate([np.full(256, 3.0), np.full(256, 2.0), np.full(300, 9.0)])
    (row,) = fidelity_rows("m", [text("perplexity", [0.1], nats=nats)])
    assert row["nats_by_position"] == {"0-256": 3.0, "256-512": 2.0}


def test_plots(tmp_path: Path) -> None:
    nats = np.full(2000, 2.0)
    texts = [text("vt", [0.1], nats=nats, recalls=heads([0.9, 0.5], [1.0, 0.2]),
                  errors=heads([0.1, 0.2], [0.0, 0.4])),
             text("vt", [0.1], nats=nats, attention="dca floor")]
    files = draw_fidelity(fidelity_rows("m", texts), tmp_path)
    assert [file.name for file in files] == [
        "fidelity.m.sparse-dca.heads.svg", "fidelity.m.positions.svg"]
    assert all(file.read_text().startswith("<?xml") for file in files)
