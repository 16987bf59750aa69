"""Runs: order, cuts, files and rows, with a fake model that reads the prompt."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longspan.errors import LongspanError
from longspan.eval.prompt import Materials, Prompt
from longspan.eval.runner import Plan, build, rescore, run, work_order
from longspan.eval.samples import RunFolder, Sample, open_runs
from longspan.eval.task import Answer, Model
from longspan.eval.tasks.registry import TaskOptions, all_tasks, make_tasks

TASKS = make_tasks(["passkey", "vt", "absent"], TaskOptions(num_questions=4, num_distractors=1))
PLAN = Plan(tasks=TASKS, lengths=(1024, 2048), num_samples=8)


class FakeModel:
    """Reads passkeys out of the prompt; counts what it is asked."""

    def __init__(self, fail_after: int = 10**9) -> None:
        self.fail_after, self.asked = fail_after, list[str]()

    def __call__(self, prompts: Sequence[Prompt], max_tokens: int) -> list[Answer]:
        return [self.answer(prompt, bool(i)) for i, prompt in enumerate(prompts)]

    def answer(self, prompt: Prompt, is_cached: bool) -> Answer:
        if len(self.asked) >= self.fail_after:
            raise KeyboardInterrupt
        self.asked.append(prompt.sha256)
        key = re.findall(r"number for (\S+) mentioned", prompt.text)
        found = re.findall(rf"numbers for {key[-1]} is: (\d+)\.", prompt.text) if key else []
        return Answer(text=found[0] if found else "not mentioned", ttft_s=0.1,
                      density=0.5 if is_cached else 0.2, num_cached_tokens=900 * is_cached)


def run_in(folder: Path, materials: Materials, model: FakeModel, plan: Plan = PLAN,
           **options: Any) -> dict[str, Sample]:
    with RunFolder(folder) as out:
        run(plan, materials, Model(model), out, **options)
        return out.read()


def test_the_first_document_of_everything_comes_first(materials: Materials) -> None:
    order = [(job.task.name, job.num_tokens, job.index) for job in work_order(PLAN, materials)]
    first = [(name, length, 0) for name in ("passkey", "vt", "absent") for length in (1024, 2048)]
    assert order[:6] == first
    assert order[6:12] == [(name, length, 1) for name, length, _ in first]
    assert order[12:14] == [("vt", 1024, 2), ("vt", 2048, 2)], "two documents hold 8 passkeys"
    assert len(order) == 2 * (2 + 8 + 8)


def test_samples_hold_recipes_and_verdicts_not_prompts(
    tmp_path: Path, materials: Materials
) -> None:
    model = FakeModel()
    samples = run_in(tmp_path, materials, model)
    assert len(samples) == 48 and [s.ids_sha256 for s in samples.values()] == model.asked
    sample = samples["passkey/1024/seed0/1/q2"]
    assert (sample.score, sample.status, sample.prompt_tokens, sample.num_tokens) == (
        1.0, "ok", 1000, 1024)
    assert sample.depth is not None and 0.4 < sample.depth < 0.8
    assert samples["vt/2048/seed0/7"].hits == (False,) * 5
    assert max(map(len, (tmp_path / "samples.jsonl").read_text().splitlines())) < 900


@pytest.mark.parametrize("num_done", [0, 1, 6, 9, 47])
def test_a_run_that_is_cut_off_goes_on_where_it_stopped(
    tmp_path: Path, materials: Materials, num_done: int
) -> None:
    first = FakeModel(fail_after=num_done)
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path / "cut", materials, first)
    with (tmp_path / "cut" / "samples.jsonl").open("a") as torn:
        torn.write('{"key": "half a li')
    second = FakeModel()
    samples = run_in(tmp_path / "cut", materials, second)
    whole = run_in(tmp_path / "whole", materials, FakeModel())
    assert {key: replace(s, total_s=None) for key, s in samples.items()} == {
        key: replace(s, total_s=None) for key, s in whole.items()}
    # a document that was cut in the middle is lost, those before it are not asked again
    assert 48 <= len(first.asked) + len(second.asked) <= 48 + 3
    assert run_in(tmp_path / "cut", materials, FakeModel(fail_after=0)) == samples


def test_a_document_of_which_some_questions_are_answered(
    tmp_path: Path, materials: Materials
) -> None:
    run_in(tmp_path, materials, FakeModel())
    file = tmp_path / "samples.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2] + lines[4:]))
    model = FakeModel()
    assert len(run_in(tmp_path, materials, model)) == 48 and len(model.asked) == 2


def test_more_samples_later_are_only_the_new_ones(tmp_path: Path, materials: Materials) -> None:
    run_in(tmp_path, materials, FakeModel(), replace(PLAN, num_samples=4))
    model = FakeModel()
    samples = run_in(tmp_path, materials, model)
    assert len(model.asked) == 24
    assert {s.ids_sha256 for s in samples.values()} == {
        s.ids_sha256 for s in run_in(tmp_path / "x", materials, FakeModel()).values()}


def test_the_time_limit_stops_before_something_new(tmp_path: Path, materials: Materials) -> None:
    with RunFolder(tmp_path) as out:
        outcome = run(PLAN, materials, Model(FakeModel()), out, time_limit_s=0.0)
        assert outcome.is_stopped and outcome.num_new == 0
        assert not run(PLAN, materials, Model(FakeModel()), out).is_stopped


def test_another_seed_asks_other_prompts(tmp_path: Path, materials: Materials) -> None:
    one, other = FakeModel(), FakeModel()
    run_in(tmp_path, materials, one)
    run_in(tmp_path, materials, other, replace(PLAN, seed=1))
    assert not set(one.asked) & set(other.asked) and len(other.asked) == 48


def test_many_at_a_time_give_the_same(tmp_path: Path, materials: Materials) -> None:
    whole, other = (run_in(tmp_path / str(n), materials, FakeModel(), concurrency=n)
                    for n in (1, 6))
    assert {key: (s.ids_sha256, s.score) for key, s in whole.items()} == {
        key: (s.ids_sha256, s.score) for key, s in other.items()}


def test_times_are_kept_only_of_one_document_at_a_time(
    tmp_path: Path, materials: Materials
) -> None:
    for name, options in (("alone", {}), ("two", {"concurrency": 2}),
                          ("shared", {"is_timed": False})):
        found = run_in(tmp_path / name, materials, FakeModel(), **options)
        times = {(s.ttft_s, s.total_s is None) for s in found.values()}
        assert times == ({(0.1, False)} if name == "alone" else {(None, True)})


def test_right_answers_are_scored_behind_their_prompts(
    tmp_path: Path, materials: Materials
) -> None:
    """One number or a list of them; what is longer than an answer may be has no score."""
    asked = dict[str, tuple[str, int]]()

    def score(prompts: Sequence[Prompt], firsts: Sequence[int] = ()) -> list[Answer]:
        for prompt, first in zip(prompts, firsts, strict=True):
            text = materials.encoder.tokenizer.decode(prompt.ids[first:])  # type: ignore[attr-defined]
            asked[prompt.sha256] = text, first
        return [Answer(logprobs=np.where(np.arange(1, len(prompt.ids)) < first, np.nan, -2.0))
                for prompt, first in zip(prompts, firsts, strict=True)]

    tasks = make_tasks(["passkey", "niah_multivalue", "vt"], TaskOptions(num_questions=2))
    plan = Plan(tasks=tasks, answer_nll=True, num_samples=2, lengths=(2048,))
    with RunFolder(tmp_path) as out:
        run(plan, materials, Model(FakeModel(), score), out)
        samples = out.read()
    texts = [text for text, _ in asked.values()]
    passkeys = [s for s in samples.values() if s.task == "passkey"]
    assert {s.answer_nll for s in passkeys} == {2.0}
    assert {s.answers[0] for s in passkeys} <= set(texts)
    lists = [s for s in samples.values() if s.task == "niah_multivalue"]
    assert {s.answer_nll for s in lists} == {2.0}
    assert {" " + ", ".join(s.answers) for s in lists} <= set(texts), "the prompt ends in a word"
    vt = [s for s in samples.values() if s.task == "vt"]
    assert {s.answer_nll for s in vt} == {None}, "five names are more than 30 of these tokens"
    with RunFolder(tmp_path / "x") as out, pytest.raises(LongspanError, match="--answer-nll"):
        run(plan, materials, Model(FakeModel()), out)


def test_the_first_answer_counts_whatever_comes_later(tmp_path: Path) -> None:
    def sample(text: str, status: str = "ok") -> Sample:
        return Sample(key="k", task="vt", num_tokens=9, index=0, prompt_tokens=5, ids_sha256="x",
                      text=text, status=status)

    with RunFolder(tmp_path) as out:
        out.append([sample("", "timeout"), sample("first"), sample("second"), sample("", "error")])
        assert out.read() == {"k": sample("first")}


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    with RunFolder(tmp_path), pytest.raises(LongspanError, match="another run is writing there"), \
            RunFolder(tmp_path):
        pass
    with RunFolder(tmp_path):
        pass


def test_a_full_disk_is_one_line_and_loses_nothing(
    tmp_path: Path, materials: Materials, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk:
        """A file that has room for some lines and a half."""

        def __init__(self, file: Any) -> None:
            self.file, self.room = file, 3

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: bytes) -> None:
            self.room -= 1
            self.file.write(data if self.room > 0 else data[:20])
            if self.room <= 0:
                self.file.flush()
                raise OSError(errno.ENOSPC, "No space left on device")

    with RunFolder(tmp_path) as out, pytest.raises(LongspanError) as caught:
        out._file = FullDisk(out._file)
        run(PLAN, materials, Model(FakeModel()), out)
    assert "No space left on device" in str(caught.value) and "run again" in str(caught.value)
    with RunFolder(tmp_path) as out:
        kept = out.read()
    assert len(kept) == 8
    model = FakeModel()
    assert len(run_in(tmp_path, materials, model)) == 48 and len(model.asked) == 40


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    inside = tmp_path / "file" / "x"
    with pytest.raises(LongspanError, match="cannot be written"), RunFolder(inside):
        pass


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(LongspanError, match="no run there"):
        open_runs([tmp_path])
    for content in ("{", "[]", '{"schema": "other"}'):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(LongspanError, match="not the manifest of a run"):
            open_runs([tmp_path])


@pytest.mark.parametrize(("change", "message"), [
    (lambda: replace(PLAN, num_samples=0), "at least one is needed"),
    (lambda: replace(PLAN, lengths=()), "no length was named"),
    (lambda: TaskOptions(num_depths=0), "must be positive"),
    (lambda: TaskOptions(num_distractors=-1), "must not be negative")])
def test_plans_that_make_no_sense(change: Callable[[], Any], message: str) -> None:
    with pytest.raises(LongspanError, match=message):
        change()


def test_scoring_again_follows_the_scorers(tmp_path: Path, materials: Materials) -> None:
    samples = run_in(tmp_path, materials, FakeModel())
    wrong = {key: replace(s, score=0.5, label="?") for key, s in samples.items()}
    assert rescore(wrong, all_tasks(TaskOptions())) == samples
    file = tmp_path / "samples.jsonl"
    line = json.loads(file.read_text().splitlines()[0])
    file.write_text(json.dumps({**line, "task": "gone"}) + "\n")
    with pytest.raises(LongspanError, match="no task is called 'gone'"):
        rescore(RunFolder(tmp_path).read(), all_tasks(TaskOptions()))


@pytest.mark.parametrize("num_tokens", [1, 40])
def test_lengths_without_room_are_named_in_the_users_numbers(
    num_tokens: int, materials: Materials
) -> None:
    """Every task whose length is asked for; the length that the line names is enough."""
    for task in all_tasks(TaskOptions()).values():
        if not task.is_sized or "qa_" in task.name or task.name == "perplexity" and num_tokens > 1:
            continue
        plan = Plan(tasks=(task,), lengths=(num_tokens,))
        job = next(work_order(plan, materials))
        line = (rf"^{re.escape(task.name)}: {num_tokens} tokens, answer included, are too short "
                r".*; at least [\d,]+ are needed$")
        with pytest.raises(LongspanError, match=line) as caught:
            build(plan, job, materials)
        least = int(str(caught.value).split("least ")[1].split()[0].replace(",", ""))
        assert build(plan, replace(job, num_tokens=least + 64), materials)
