"""`longspan bench quality`: prompts, matched cost, recall; nano on a short document."""

from __future__ import annotations

import random
import re
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.plots_quality import draw_quality
from longspan import cli
from longspan.attention.head_errors import HeadErrors
from longspan.attention.sparsity import SparsityPlan
from longspan.bench.engine import quality, questions
from longspan.bench.engine.quality import DENSE, QualityOptions, Setting, Subject
from longspan.bench.shapes import changed, scaled
from longspan.commands import results
from longspan.engine.request import SamplingParams
from longspan.engine.text.tokenizer import Tokenizer
from longspan.errors import LongspanError
from longspan.eval.text import TextBank
from longspan.model.weights import resolve_checkpoint

TEXTS = Path(sysconfig.get_paths()["stdlib"]) / "json"

def options(**values: Any) -> QualityOptions:
    defaults: dict[str, Any] = {
        "model": "nano", "lengths": (3000,), "settings": quality.SETTINGS, "num_single": 2,
        "num_many": 4, "seeds": (0,), "text_roots": (TEXTS,), "chunk_len": 1024}
    return QualityOptions(**{**defaults, **values})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(resolve_checkpoint("nano"))


@pytest.fixture(scope="module")
def bank(tokenizer: Tokenizer) -> TextBank:
    return TextBank.from_roots([TEXTS], tokenizer)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(options(), "cpu")


def test_many_questions_are_a_conversation(tokenizer: Tokenizer, bank: TextBank) -> None:
    quiz = questions.many_questions(bank, tokenizer, 2500, 5, random.Random(1))
    assert 2300 < quiz.prompt_len <= 2500 and len(quiz.answers) == 5
    for place, answer in quiz.answers:
        assert tuple(quiz.ids[place : place + len(answer)]) == answer
    tail = tokenizer._tokenizer.decode(list(quiz.ids[-400:]), skip_special_tokens=False)
    turns = tail.split("<|im_start|>assistant\n")
    assert len(turns) >= 5 and turns[-1].isdigit()
    assert "<|im_end|>\n<|im_start|>user\nWhat is the special magic number for " in tail
    values = [tokenizer.decode(answer) for _, answer in quiz.answers]
    assert len(set(values)) == 5 and all(len(value) == 7 for value in values)
    text = tokenizer.decode(quiz.ids[: quiz.answers[0][0]])
    assert all(f"is: {value}." in text for value in values)


def test_too_many_questions_are_refused(
    tokenizer: Tokenizer, bank: TextBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(questions, "TOKENS_PER_TURN", 10)
    with pytest.raises(LongspanError, match="ask fewer"):
        questions.many_questions(bank, tokenizer, 2500, 5, random.Random(1))


def test_single_questions_share_their_document(tokenizer: Tokenizer, bank: TextBank) -> None:
    quizzes = questions.single_questions(bank, tokenizer, 2000, 3, random.Random(2))
    assert all(quiz.prompt_len == 2000 == quiz.answers[0][0] for quiz in quizzes)
    assert len({quiz.ids[:1800].tobytes() for quiz in quizzes}) == 1
    assert len({quiz.ids.tobytes() for quiz in quizzes}) == 3


@pytest.fixture
def nano_with_a_small_plan(tmp_path: Path) -> Path:
    """nano with budgets that leave something out of short prompts."""
    folder = tmp_path / "nano"
    folder.mkdir()
    for file in resolve_checkpoint("nano").iterdir():
        if file.name != "sparsity_plan.json":
            (folder / file.name).symlink_to(file)
    plan = SparsityPlan.default(6, 4, vertical=48, slash=256)
    replace(plan, probe_strided=16, tail_len=256).save(folder / "sparsity_plan.json")
    return folder


def test_nano_answers_and_the_rows_say_so(
    nano_with_a_small_plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", "quality", "--model", str(nano_with_a_small_plan), "--lengths", "2000",
                 "--single", "2", "--many", "3", "--text-root", str(TEXTS), "--chunk-len", "512",
                 "--policy", "num_scouts=64,most_scouts=64,tail_len=0,budget_share=0.5",
                 "--device", "cpu",
                 "--places", "one,end,spread", "--commit", "abc", "--out", str(tmp_path)]
    assert cli.run_command(arguments) == 0
    (content,) = results.read_bench(tmp_path, "quality")
    policy = "tile num_scouts=64,most_scouts=64,tail_len=0,budget_share=0.5"
    rows = {(row["attention"], row["num_questions"]): row for row in content["rows"]
            if row["num_questions"] == 1 or row["place"] == "end"}
    assert set(rows) == {
        (name, count) for name in (*quality.SETTINGS, policy) for count in (1, 3)}
    assert rows[policy, 1]["plan"]["num_scouts"] == 64
    assert rows[policy, 1]["density"] < rows["tile", 1]["density"]
    spread = {row["attention"]: row for row in content["rows"] if row["place"] == "spread"}
    assert spread["dense"]["score"] == 1 and spread["dense"]["answer_nats"] < 0.1
    assert 0 < spread["dense"]["text_nats"] < 6
    assert spread["dense"]["kl"] == 0 < spread["tile"]["kl"] < 2 and spread["tile"]["top1"] < 1
    for count, n in ((1, 2), (3, 3)):
        dense = rows["dense", count]
        assert (dense["score"], dense["n"], dense["density"], dense["recall"]) == (1, n, 1, None)
        assert rows["tile", count]["score"] == 1
        for name in ("tile", "paper"):
            row = rows[name, count]
            assert 0 < row["density"] < 1 and row["plan"]["mode"] == name
            assert 0 < row["recall"]["min"] <= row["recall"]["mean"] <= 1
            heads = [head for layer in row["recall_by_head"] for head in layer]
            assert len(heads) == 20  # without the last layer
            assert all(0 <= least <= low <= 1.0001 for _, low, least in heads)
    assert rows["paper", 1]["cost"] == pytest.approx(rows["tile", 1]["cost"], rel=0.25)
    captured = capsys.readouterr()
    assert "recall" in captured.out and "paper budgets" in captured.err


def test_questions_spread_over_the_prompt(tokenizer: Tokenizer, bank: TextBank) -> None:
    """The first at a quarter of the prompt, the last at its end, in even steps."""
    quiz = questions.many_questions(bank, tokenizer, 6000, 4, random.Random(2), place="spread")
    assert 5800 < quiz.prompt_len <= 6000
    places = [place for place, _ in quiz.answers]
    steps = [b - a for a, b in zip(places, places[1:], strict=False)]
    assert 1350 < places[0] < 1550 and max(steps) - min(steps) < 20
    for place, answer in quiz.answers:
        assert tuple(quiz.ids[place : place + len(answer)]) == answer


def test_scores_count_every_token(
    subject: Subject, bank: TextBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiz = questions.many_questions(bank, subject.tokenizer, 1500, 3, random.Random(3))
    place, answer = quiz.answers[1]
    wrong = (*answer[:-1], answer[-1] + 1)
    changed = questions.Quiz(quiz.ids, (quiz.answers[0], (place, wrong), quiz.answers[2]))
    assert [subject.measure([one], DENSE)["score"] for one in (quiz, changed)] == [1, 0.667]
    single = questions.single_questions(bank, subject.tokenizer, 1200, 1, random.Random(3))[0]
    assert subject.measure([single], DENSE)["score"] == 1
    off = questions.Quiz(single.ids, ((1200, single.answers[0][1][::-1]),))
    assert subject.measure([off], DENSE)["score"] == 0


def test_recall_is_that_of_the_last_rows(subject: Subject, bank: TextBank) -> None:
    """By layer in order, from a position on; dense prefill has none."""
    quiz = questions.single_questions(bank, subject.tokenizer, 2600, 1, random.Random(4))[0]
    plan = replace(scaled(subject.plan, 0.1), tail_len=256)
    found = []
    for start in (0, 1024, 2600):
        recall = HeadErrors(from_position=start, skipped_layer=5)
        with subject._engine(Setting("tile", plan)) as llm:
            llm.observe(recall)
            llm.generate([quiz.ids], SamplingParams(max_tokens=1))
        found.append(recall.recalls())
    every, later, none = found
    assert none == [] and len(every) == len(later) == 5 and every != later
    assert all(len(layer) == 4 for layer in every)
    assert all(0 < least <= low <= 1.0001 and least <= mean <= 1.0001
               for layer in every + later for mean, low, least in layer)


def test_questions_whose_facts_are_hard_to_tell_apart(
    tokenizer: Tokenizer, bank: TextBank,
) -> None:
    """Beside each fact two that share a word with its key, and no other number answers."""
    quiz = questions.many_questions(
        bank, tokenizer, 6000, 4, random.Random(2), place="negatives")
    text = tokenizer.decode(quiz.ids)
    keys = re.findall(r"magic numbers for (\S+) is: \d{7}\.", text)
    asked = re.findall(r"magic number for (\S+) mentioned", text)
    assert len(set(keys)) == len(keys) == 12 and len(asked) == 4 == len(quiz.answers)
    for key in asked:
        adjective, noun = key.split("-")
        assert sum(other.startswith(f"{adjective}-") for other in keys) >= 2
        assert sum(other.endswith(f"-{noun}") for other in keys) >= 2
    for (place, answer), key in zip(quiz.answers, asked, strict=True):
        value = tokenizer.decode(answer)
        assert tuple(quiz.ids[place : place + len(answer)]) == answer
        assert f"magic numbers for {key} is: {value}." in text


def test_questions_about_two_facts_from_either_half(tokenizer: Tokenizer, bank: TextBank) -> None:
    quiz = questions.many_questions(bank, tokenizer, 8000, 4, random.Random(2), place="far")
    text = tokenizer.decode(quiz.ids)
    asked = re.findall(r"magic numbers for (\S+) and (\S+) mentioned", text)
    assert len(asked) == 4 and len({key for pair in asked for key in pair}) == 8
    assert len(quiz.answers) == 8
    document = text[: text.index("What are all")]
    for pair, start in zip(asked, range(0, 8, 2), strict=True):
        places = []
        for key, (place, answer) in zip(pair, quiz.answers[start : start + 2], strict=True):
            assert tuple(quiz.ids[place : place + len(answer)]) == answer
            fact = f"magic numbers for {key} is: {tokenizer.decode(answer)}."
            places.append(document.index(fact) / len(document))
        assert places[0] < 0.6 and places[1] > 0.4 and places[0] < places[1]


def test_what_no_policy_can_beat(tmp_path: Path) -> None:
    """The oracle, online budgets and other plans have rows of their own, time is told where nobody
    watches, and all of it is drawn."""
    small = replace(SparsityPlan.default(6, 4, vertical=32, slash=128), num_scouts=0)
    small.save(tmp_path / "small.json")
    arguments = ["bench", "quality", "--lengths", "2000", "--single", "1", "--many", "3",
                 "--text-root", str(TEXTS), "--chunk-len", "512", "--attention", "dense",
                 "--policy", "recall_target=0.8", "--plan", str(tmp_path / "small.json"),
                 "--oracle", "0.15",
                 "--places", "spread", "--no-heads", "--device", "cpu", "--commit", "abc",
                 "--out", str(tmp_path)]
    assert cli.run_command(arguments) == 0
    (content,) = results.read_bench(tmp_path, "quality")
    rows = {row["attention"]: row for row in content["rows"]}
    assert set(rows) == {"dense", "tile recall_target=0.8", "plan small", "oracle 0.15"}
    assert all(row["seconds"] > 0 and row["recall_by_head"] == [] for row in rows.values())
    assert rows["tile recall_target=0.8"]["recall_typical"] > 0.78
    assert 0.15 < rows["oracle 0.15"]["density"] < rows["plan small"]["density"] < 0.3
    assert all(0 < row["kl"] < 3 and row["recall_typical"] > 0.3
               for name, row in rows.items() if name != "dense")
    files = draw_quality(content, tmp_path / "quality")
    assert [file.name for file in files] == ["quality.nano.2000.spread.svg"]
    drawn = files[0].read_text()
    assert all(f"<!-- {label} -->" in drawn for label in (
        "ours, online", "calibrated plan", "oracle", "dense", "prefill, s"))


def test_weights_and_caches_of_eight_bits_beside_plain_ones(tmp_path: Path) -> None:
    """Both are compared with what is dense and plain."""
    arguments = ["bench", "quality", "--lengths", "2000", "--many", "3", "--text-root", str(TEXTS),
                 "--attention", "dense", "--quantization", "int8", "--kv-dtype", "int8",
                 "--places", "spread", "--no-heads", "--device", "cpu", "--commit", "abc",
                 "--out", str(tmp_path)]
    assert cli.run_command(arguments) == 0
    (content,) = results.read_bench(tmp_path, "quality")
    rows = {row["attention"]: row for row in content["rows"]}
    assert set(rows) == {"dense", "dense int8 weights", "dense int8 KV"}
    assert rows.pop("dense")["kl"] == 0
    assert all(0 < row["kl"] < 0.02 and row["density"] == 1 for row in rows.values())


def test_a_stopped_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    """A row for each seed; those that are there are kept as they are, and what is missing is
    compared with dense attention although that is not measured again."""
    assert cli.run_command(["bench", "quality", "--seeds", "0,x"]) == 2
    assert "--seeds: '0,x' is no list of whole numbers" in capsys.readouterr().err
    arguments = ["bench", "quality", "--lengths", "1600", "--many", "2", "--text-root", str(TEXTS),
                 "--chunk-len", "512", "--places", "spread", "--no-heads", "--device", "cpu",
                 "--commit", "abc", "--out", str(tmp_path), "--seeds", "0,4"]
    assert cli.run_command([*arguments, "--attention", "dense"]) == 0
    (first,) = results.read_bench(tmp_path, "quality")
    more = [*arguments, "--attention", "dense,tile", "--policy", "vertical=8,slash=128", "--resume"]
    assert cli.run_command([*more, "--budget-s", "0.001"]) == 0
    assert "not measured, the budget" in capsys.readouterr().err
    assert cli.run_command(more) == 0
    assert "dense 512 0: measured before, kept" in capsys.readouterr().err
    (second,) = results.read_bench(tmp_path, "quality")
    rows = {(row["attention"], row["seed"]): row for row in second["rows"]}
    assert {name for name, _ in rows} == {"dense", "tile", "tile vertical=8,slash=128"}
    assert len(rows) == 6
    for row in first["rows"]:
        assert rows["dense", row["seed"]].items() >= row.items()
    for seed in (0, 4):
        row = rows["tile vertical=8,slash=128", seed]
        assert 0 < row["kl_low"] < row["kl"] < row["kl_high"]


def test_wrong_options() -> None:
    for options_, message in (({"places": ("x",)}, "--places: 'x'"), ({"oracles": (1.5,)}, "1.5"),
                              ({"kv_dtypes": ("int4",)}, "--kv-dtype: 'int4' is not one of int8"),
                              ({"quantizations": ("q4",)}, "--quantization: 'q4'")):
        with pytest.raises(LongspanError, match=message):
            options(**options_)
    with pytest.raises(LongspanError, match="mode 'x'"):
        changed(SparsityPlan.default(2, 2), "mode=x")
    plan = changed(SparsityPlan.default(2, 2), "mode=paper,vertical=70,slash=100")
    assert plan == changed(SparsityPlan.default(2, 2), "vertical=70,slash=100").paper()
    with pytest.raises(LongspanError, match="--attention: 'x'"):
        options(settings=("x",))
