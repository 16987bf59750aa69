"""Tasks whose text comes from files, and what is said about files that are broken."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longspan.errors import LongspanError
from longspan.eval import metrics
from longspan.eval.prompt import Materials
from longspan.eval.task import Answer, Example, rng_for
from longspan.eval.tasks.registry import TaskOptions, all_tasks

TASKS = all_tasks(TaskOptions())


def squad() -> dict[str, Any]:
    """Three articles of eight paragraphs with a question each, one of them without an answer."""
    def paragraph(article: int, number: int) -> dict[str, Any]:
        fact = f"fact{article}x{number} "
        return {"context": f"Article {article} paragraph {number}. " + fact * 9,
                "qas": [{"question": f"What is in {article}/{number}?",
                         "is_impossible": number == 7,
                         "answers": [] if number == 7 else [
                             {"text": f"fact{article}x{number}"}, {"text": "another form"}]}]}
    return {"data": [{"paragraphs": [paragraph(a, n) for n in range(8)]} for a in range(3)]}


def hotpotqa() -> list[dict[str, Any]]:
    return [{"question": f"Q{i}?", "answer": f"answer{i}", "context": [
        [f"Title {i} {k}", ["Some text. ", f"answer{i} is here."]] for k in range(10)]}
        for i in range(4)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "squad.json").write_text(json.dumps(squad()))
    (tmp_path / "hotpotqa.json").write_text(json.dumps(hotpotqa()))
    line = {"input": "Where?", "context": "Once upon a time. " * 20, "answers": ["here", "there"],
            "all_classes": None, "answer_keywords": "here"}
    for name in ("hotpotqa", "trec", "multifieldqa_zh"):
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(line)}\n" * 3)
    (tmp_path / "factrecall_en_16k.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "test_cases.json").write_text(json.dumps([
        {"idx": 2, "query": "Q?", "prompt": "Long text. Q?", "answer": "A"}]))
    shots = [{"answer": "x", "score": 5}] * 3
    (tmp_path / "few_shots.json").write_text(json.dumps([shots, shots]))
    return tmp_path


def build(name: str, materials: Materials, length: int = 0, index: int = 0) -> Example:
    task = TASKS[name]
    return task.build(materials, length, index, rng_for(task, length, 0, index))[0]


@pytest.mark.parametrize(("name", "length"), [("qa_1", 1024), ("qa_2", 640), ("qa_1", 8192)])
def test_rulers_questions(materials: Materials, data: Path, name: str, length: int) -> None:
    example = build(name, replace(materials, data=data), length)
    text = example.prompt.text
    ask = ("Answer the question based on the given documents. Only give me the answer and do not "
           "output any other words.\n\n")
    head = f"<|im_start|>user\n{ask}The following are given documents.\n\n"
    tail = f"\n\n{ask}Question: {example.question}<|im_end|>\n<|im_start|>assistant\n Answer:"
    assert text.startswith(head) and text.endswith(tail)
    documents = text.removeprefix(head).removesuffix(tail).split("\n\n")
    assert [part.split("\n")[0] for part in documents] == [
        f"Document {i}:" for i in range(1, len(documents) + 1)]
    holds = [example.answer in part for part in documents]
    assert sum(holds) == (1 if name == "qa_1" else 10)
    at = materials.encoder.tokenizer.decode(example.prompt.ids[example.position:][:40])  # type: ignore[attr-defined]
    assert at.startswith("Document ")
    used = len(example.prompt.ids) + TASKS[name].max_tokens
    assert used <= length and (length < 8192) == (example.form == "")
    example.prompt.check(materials.encoder)
    if length == 8192:
        assert example.form == "paragraphs repeat" and used > 0.97 * length
    verdict = TASKS[name].score(example.gold, Answer(text=example.answer.upper()))
    assert verdict.score == 1.0, "any of the forms counts whole"


def test_the_right_paragraph_stands_anywhere(materials: Materials, data: Path) -> None:
    """NVIDIA's shuffle puts it at one depth for all samples of a length."""
    with_data = replace(materials, data=data)
    places = Counter(int(4 * build("qa_1", with_data, 2048, index).depth) for index in range(60))
    assert len(places) == 4 and max(places.values()) < 35
    assert len({build("qa_1", with_data, 2048, i).question for i in range(60)}) > 15


def test_questions_without_answers_are_left_out(materials: Materials, data: Path) -> None:
    asked = {build("qa_1", replace(materials, data=data), 1024, i).question for i in range(80)}
    assert not any("/7?" in question for question in asked)


def test_longbench_prompts(materials: Materials, data: Path) -> None:
    with_data = replace(materials, data=data)
    text = build("longbench:hotpotqa", with_data).prompt.text
    assert text.startswith("<|im_start|>user\nAnswer the question based on the given passages.")
    assert text.endswith("Question: Where?\nAnswer:<|im_end|>\n<|im_start|>assistant\n")
    plain = build("longbench:trec", with_data).prompt.text
    assert plain.startswith("Please determine the type") and plain.endswith("\nWhere?")
    task = TASKS["longbench:hotpotqa"]
    assert [task.num_documents(n, with_data) for n in (2, 99)] == [2, 3]


def test_lveval_and_longbench_chat(materials: Materials, data: Path) -> None:
    with_data = replace(materials, data=data)
    example = build("lveval:factrecall_en_16k", with_data)
    assert example.gold.facts == {"keywords": "here"} and example.gold.answers[0] == "here"
    chat = build("longbench-chat", with_data)
    assert "Long text. Q?" in chat.prompt.text and len(chat.gold.facts["shots"]) == 3
    verdict = TASKS["longbench-chat"].score(chat.gold, Answer(text="A"))
    assert (verdict.score, verdict.label) == (None, "not judged")


def test_prompts_that_the_model_cannot_take(materials: Materials, data: Path) -> None:
    small = replace(materials, data=data, max_prompt_tokens=100)
    with pytest.raises(LongspanError, match=r"longbench:hotpotqa: a prompt of \d+ tokens and 32 of "
                                            r"answer are more than the model's 100"):
        build("longbench:hotpotqa", small)


def test_chinese_sets_miss_jieba_before_anything_is_asked(
    materials: Materials, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(metrics, "cut_chinese", asked.append)
    TASKS["longbench:multifieldqa_zh"].num_documents(2, replace(materials, data=data))
    assert asked == [""]


BROKEN = {
    "qa_1": [("squad.json", '{"data": [{"par', "no JSON, or cut short"),
             ("squad.json", "[1, 2]", "a list of objects is expected; this is another file"),
             ("squad.json", '{"data": [{"title": 1}]}', "item 1: paragraphs is missing"),
             ("squad.json", '{"data": [{"paragraphs": [{"context": "x", "qas": []}]}]}',
              "no question there has an answer")],
    "qa_2": [("hotpotqa.json", "{}", "a list of objects"),
             ("hotpotqa.json", '[{"question": 1}]', "answer, context is missing")],
    "longbench:hotpotqa": [
        ("hotpotqa.jsonl", '{"input": "a", "context": "b", "answers": [], "all_classes": 1}\n{"inp',
         "line 2: no JSON, or cut short"),
        ("hotpotqa.jsonl", "", "the file is empty"),
        ("hotpotqa.jsonl", '{"a": 1}', "line 1: input, context, answers, all_classes is missing"),
        ("hotpotqa.jsonl", "3", "line 1: input, context")],
    "longbench-chat": [("test_cases.json", "nonsense", "no JSON"),
                       ("few_shots.json", "[]", "no rated answers of case 2 there"),
                       ("few_shots.json", "[1, [{}]]", "answer, score is missing")],
}


@pytest.mark.parametrize(("task", "file", "content", "message"), [
    (task, *case) for task, cases in BROKEN.items() for case in cases])
def test_broken_files(
    materials: Materials, data: Path, task: str, file: str, content: str, message: str
) -> None:
    (data / file).write_text(content)
    with pytest.raises(LongspanError, match=message) as caught:
        build(task, replace(materials, data=data), 2048)
    assert file in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_unreadable_files(materials: Materials, data: Path) -> None:
    with pytest.raises(LongspanError, match="qa_1 needs its data files; name their folder with"):
        build("qa_1", materials, 2048)
    with pytest.raises(LongspanError, match=r"no squad.json or dev-v2.0.json there"):
        build("qa_1", replace(materials, data=data / ".."), 2048)
    (data / "hotpotqa.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(LongspanError, match="not UTF-8 text"):
        build("longbench:hotpotqa", replace(materials, data=data))
