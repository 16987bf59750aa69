"""Runs: order, resumption and rows, with a fake model that reads the prompt."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from longspan.errors import LongspanError
from longspan.eval.runner import (
    Cell,
    EvalPlan,
    Sample,
    SampleFile,
    Setting,
    build_cell,
    result_rows,
    run,
    work_order,
)
from longspan.eval.task import Answer, Generate, TextBank
from tests.eval.conftest import ChatTokenizer

DENSE, SPARSE = Setting("dense", "rope"), Setting("sparse", "dca+yarn")
PLAN = EvalPlan(model="m", lengths=(1000, 2000), settings=(DENSE, SPARSE), num_questions=8,
                num_haystacks=3, num_distractors=1, setup="abc")


class FakeModel:
    """Reads the document when dense; sparse, it finds nothing. Counts what it is asked."""

    def __init__(self, tokenizer: ChatTokenizer, fail_after: int = 10**9) -> None:
        self.tokenizer, self.fail_after = tokenizer, fail_after
        self.opened: list[Setting] = []
        self.asked: list[array[int]] = []

    @contextmanager
    def open(self, setting: Setting) -> Iterator[Generate]:
        self.opened.append(setting)
        yield lambda prompts, max_tokens: self.answer(setting, prompts)

    def answer(self, setting: Setting, prompts: Sequence[array[int]]) -> list[Answer]:
        if len(self.asked) >= self.fail_after:
            raise KeyboardInterrupt
        self.asked += prompts
        return [Answer(text=self.read(prompt) if setting == DENSE else "no idea", ttft_s=0.1,
                       density=0.5 if index else 0.2, num_cached_tokens=900 if index else 0)
                for index, prompt in enumerate(prompts)]

    def read(self, prompt: array[int]) -> str:
        text = self.tokenizer.decode(prompt)
        key = re.findall(r"number for (\S+) mentioned", text)[-1]
        return re.findall(rf"numbers for {key} is: (\d+)\.", text)[0]


def test_scores_density_and_intervals_by_length_and_setting(
    tmp_path: Path, tokenizer: ChatTokenizer, bank: TextBank
) -> None:
    model = FakeModel(tokenizer)
    cells: list[Cell] = []
    samples = run(PLAN, tokenizer, bank, model.open, SampleFile(tmp_path / "s.jsonl"),
                  lambda cell, new: cells.append(cell))
    rows = [row for row in result_rows(samples) if row["depth"] is None]
    assert [(row["num_tokens"], row["attention"], row["score"]) for row in rows] == [
        (1000, "rope", 1.0), (1000, "sparse-dca+yarn", 0.0),
        (2000, "rope", 1.0), (2000, "sparse-dca+yarn", 0.0)]
    assert {(row["n"], row["num_haystacks"], row["density"], row["task"], row["model"])
            for row in rows} == {(8, 3, 0.2, "passkey", "m")}
    assert (rows[0]["ci_low"], rows[0]["ci_high"]) == (0.6756, 1.0)
    assert len(cells) == 12 and len(samples) == 32


def test_rows_by_depth_add_up(tmp_path: Path, tokenizer: ChatTokenizer, bank: TextBank) -> None:
    samples = run(PLAN, tokenizer, bank, FakeModel(tokenizer).open, SampleFile(tmp_path / "s"))
    rows = [row for row in result_rows(samples) if row["num_tokens"] == 2000
            and row["attention"] == "rope" and row["depth"] is not None]
    assert sum(row["n"] for row in rows) == 8
    assert all(round(row["depth"] * 10 - 0.5, 6) in range(10) for row in rows)


def test_all_settings_answer_the_same_prompts(
    tmp_path: Path, tokenizer: ChatTokenizer, bank: TextBank
) -> None:
    model = FakeModel(tokenizer)
    run(replace(PLAN, num_questions=1, num_haystacks=1, lengths=(1000,)), tokenizer, bank,
        model.open, SampleFile(tmp_path / "s.jsonl"))
    assert len(model.asked) == 2 and model.asked[0] == model.asked[1]


def test_the_first_haystack_of_everything_comes_first() -> None:
    groups = list(work_order(PLAN))
    assert [[(c.setting, c.num_tokens, c.haystack) for c in group] for group in groups] == [
        [(DENSE, 1000, 0), (DENSE, 2000, 0)], [(SPARSE, 1000, 0), (SPARSE, 2000, 0)],
        [(DENSE, 1000, 1), (DENSE, 2000, 1), (DENSE, 1000, 2), (DENSE, 2000, 2)],
        [(SPARSE, 1000, 1), (SPARSE, 2000, 1), (SPARSE, 1000, 2), (SPARSE, 2000, 2)]]


@pytest.mark.parametrize("num_done", [0, 3, 6, 14, 22])
def test_a_run_that_is_cut_off_goes_on_where_it_stopped(
    tmp_path: Path, tokenizer: ChatTokenizer, bank: TextBank, num_done: int
) -> None:
    file = SampleFile(tmp_path / "s.jsonl")
    first = FakeModel(tokenizer, fail_after=num_done)
    with pytest.raises(KeyboardInterrupt):
        run(PLAN, tokenizer, bank, first.open, file)
    with (tmp_path / "s.jsonl").open("a") as torn:
        torn.write('{"key": "half a li')
    second = FakeModel(tokenizer)
    samples = run(PLAN, tokenizer, bank, second.open, file)
    assert len(first.asked) + len(second.asked) == 32
    whole = run(PLAN, tokenizer, bank, FakeModel(tokenizer).open, SampleFile(tmp_path / "t"))
    assert samples == whole


def test_a_finished_run_opens_no_model(
    tmp_path: Path, tokenizer: ChatTokenizer, bank: TextBank
) -> None:
    file = SampleFile(tmp_path / "s.jsonl")
    samples = run(PLAN, tokenizer, bank, FakeModel(tokenizer).open, file)
    again = FakeModel(tokenizer)
    assert run(PLAN, tokenizer, bank, again.open, file) == samples
    assert again.opened == []
    other = FakeModel(tokenizer)
    run(replace(PLAN, seed=1), tokenizer, bank, other.open, file)
    assert len(other.asked) == 32, "samples of another seed do not count"
    file.clear()
    assert file.read() == {}


def test_questions_are_shared_out_over_the_haystacks(
    tokenizer: ChatTokenizer, bank: TextBank
) -> None:
    assert [PLAN.questions_of(index) for index in range(3)] == [3, 3, 2]
    assert len(build_cell(PLAN, Cell(DENSE, 1000, 2), tokenizer, bank)) == 2
    for questions, haystacks in ((2, 3), (5, 0), (0, 0)):
        with pytest.raises(LongspanError, match="at least one question"):
            replace(PLAN, num_questions=questions, num_haystacks=haystacks)


def test_density_is_absent_when_nothing_was_measured() -> None:
    sample = Sample(key="k", model="m", task="passkey", num_tokens=9, attention="rope", haystack=0,
                    depth=1.0, position=9, answer="1", text="1", score=1.0, density=None,
                    ttft_s=None, num_cached_tokens=0)
    rows = result_rows([sample])
    assert [row["density"] for row in rows] == [None, None]
    assert rows[1]["depth"] == 0.95
