"""LongBench's and LV-Eval's metrics, by hand."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable

import pytest

from longspan.errors import MissingDependencyError
from longspan.eval import metrics
from longspan.eval.task import Answer, Gold
from longspan.eval.tasks import longbench, longbench_chat, lveval

Cut = Callable[[], None]


@pytest.fixture
def cut_by_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for jieba, which is another program's work."""
    monkeypatch.setattr(metrics, "cut_chinese", lambda text: text.split(" "))


def digest(prompts: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(prompts, sort_keys=True).encode()).hexdigest()[:16]


def test_prompts_are_the_published_ones() -> None:
    """Digests of LongBench's dataset2prompt.json and of DATASET_PROMPT in LV-Eval's config.py."""
    assert digest(longbench.PROMPTS) == "bb89f011861ff65f"
    assert digest(lveval.PROMPTS) == "c6900fa8dffd5ef8"
    assert (len(lveval.IGNORED_ENGLISH), len(lveval.IGNORED_CHINESE)) == (38, 85)


def test_f1_of_words() -> None:
    words = metrics.english_words
    assert words("The Cat, sat on a mat!") == ["cat", "sat", "on", "mat"]
    assert metrics.f1(words("the cat sat"), words("cat")) == pytest.approx(2 / 3)
    assert metrics.f1(words("cat cat"), words("cat")) == pytest.approx(2 / 3)
    assert metrics.f1([], ["cat"]) == metrics.f1(["dog"], ["cat"]) == 0.0


@pytest.mark.parametrize(("prediction", "answer", "score"), [
    ("the cat sat on the mat", "the cat lay on the mat", 4 / 5),  # of five different words each
    ("a b c d", "a x b y", 0.5),
    ("d c b a", "a b c d", 0.25),
    ("a b. c d", "c d. a b", 1.0),  # sentences are compared one by one
    ("", "a", 0.0), ("...", "a", 0.0), ("x", "a", 0.0)])
def test_rouge_l(prediction: str, answer: str, score: float) -> None:
    assert metrics.rouge_l(prediction, answer) == pytest.approx(score, abs=1e-6)


def test_long_summaries_do_not_exhaust_the_stack() -> None:
    text = " ".join(f"w{i}" for i in range(1200))
    assert metrics.rouge_l(text, text) == pytest.approx(1.0)


@pytest.mark.parametrize(("prediction", "score"), [
    ("return x", 1.0), ("\n\n# note\n`code`\nreturn x\nmore", 1.0), ("return y", 0.88),
    ("", 0.0), ("# only", 0.0)])
def test_edit_similarity(prediction: str, score: float) -> None:
    assert metrics.edit_similarity(prediction, "return x") == score


def test_classes() -> None:
    classes = ("Human", "Human: group", "Place", "Number")
    assert metrics.classification("Human: group", "Human: group", classes) == 1.0
    assert metrics.classification("Place or Number", "Place", classes) == 0.5
    assert metrics.classification("Place", "Number", classes) == 0.0
    assert metrics.classification("nothing", "Number", classes) == 0.0


def test_numbers() -> None:
    assert metrics.share_of_numbers("5 or 6 or 5", "5") == pytest.approx(2 / 3)
    assert metrics.share_of_numbers("none", "5") == 0.0
    paragraph = longbench.metric_of("passage_retrieval_en")
    assert paragraph("Paragraph 12", "Paragraph 12") == 1.0
    assert paragraph("Paragraph 1", "Paragraph 12") == 0.0
    assert longbench.metric_of("passage_retrieval_zh")("段落7", "段落7") == 1.0


@pytest.mark.parametrize(("dataset", "text", "answers", "score"), [
    ("hotpotqa", "The Eiffel tower", ["big ben", "eiffel tower"], 1.0),
    ("trec", "\nPlace\nNumber", ["Place"], 1.0),  # only the first line counts
    ("gov_report", "a b c d", ["a x b y"], 0.5),
    ("passage_count", "7", ["7"], 1.0),
    ("lcc", "return x", ["return x"], 1.0),
    ("multifieldqa_zh", "北京 。", ["北京"], 1.0),
    ("dureader", "北京 上海", ["北京 上海"], 1.0)])
def test_longbench_scores(
    cut_by_space: None, dataset: str, text: str, answers: list[str], score: float
) -> None:
    task = longbench.LongBenchTask.of(dataset)
    gold = Gold(answers=tuple(answers), facts={"classes": ["Place", "Number"]})
    assert task.score(gold, Answer(text=text)).score == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize(("dataset", "text", "keywords", "score"), [
    ("hotpotwikiqa_mixup", "it is the tower of london", "tower", 0.75),
    ("hotpotwikiqa_mixup", "it is of london", "tower", 0.0),  # the key word is missing
    ("hotpotwikiqa_mixup", "it is of london", None, 4 / 7),
    ("hotpotwikiqa_mixup", "the of", "of", 0.0),  # found, but ignored
    ("factrecall_en", "of london", "tower", 0.8),  # not gated
    ("cmrc_mixup", "北京 好", None, 0.5),  # the answer stands in for key words
    ("cmrc_mixup", "好", None, 0.0),
    ("dureader_mixup", "北京 的 城", None, 0.5)])
def test_lveval_scores(
    cut_by_space: None, dataset: str, text: str, keywords: str | None, score: float
) -> None:
    task = lveval.LvEvalTask.of(dataset, "16k")
    right = "tower of london" if dataset in lveval.ENGLISH else "北京 城市"
    gold = Gold(answers=(right, "never looked at"), facts={"keywords": keywords})
    assert task.score(gold, Answer(text=text)).score == pytest.approx(score, abs=1e-6)


def test_chinese_needs_jieba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'longspan\[longbench\]'"):
        metrics.chinese_words("北京")


def test_the_judge_is_asked_in_longbench_chats_words() -> None:
    gold = Gold(answers=("REF",), facts={"question": "Q?", "shots": [
        {"answer": f"A{i}", "score": i + 3} for i in range(3)]})
    system, user = longbench_chat.judge_messages(gold, "MINE {x}")
    assert system["content"] == "You're a good assistant at evaluating the quality of texts."
    text = user["content"]
    shots = "".join(f"[Assistant's answer begins]\nA{i}\n[Assistant's answer ends]\n\nRating: "
                    f"[[{i + 3}]]\n\n" for i in range(3))
    assert f"and their ratings:\n\n{shots}Please rate the following assistant answers" in text
    assert "[Question]\nQ?\n\n[Reference answer begins]\nREF\n[Reference answer ends]" in text
    assert text.endswith("[Assistant's answer begins]\nMINE {x}\n[Assistant's answer ends]\n\n"
                         "Rating: ")


@pytest.mark.parametrize(("reply", "score"), [
    ("[[7]]", 0.7), ("Maybe [[3]], no: [[8.5]]", 0.85), ("Rating: [[10/10]]", 1.0),
    ("seven", None), ("[[x]]", None), ("[[0]]", None), ("[[11]]", None)])
def test_ratings(reply: str, score: float | None) -> None:
    assert longbench_chat.read_rating(reply) == score
