"""Needle tasks of our own: where facts and questions stand, and how answers are judged."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from longspan.data import facts as training
from longspan.errors import LongspanError
from longspan.eval.prompt import Frame, Materials
from longspan.eval.task import Answer, Example, Task, rng_for
from longspan.eval.tasks import needles, wordings
from longspan.eval.tasks.perplexity import position_bins
from longspan.eval.tasks.registry import TaskOptions, all_tasks

TASKS = all_tasks(TaskOptions(num_depths=3, num_questions=4, num_distractors=2))
OURS = ("needle", "hard_negatives", "ordinal", "absent", "unseen_wordings", "fresh_wordings",
        "questions_start", "questions_middle", "questions_end", "questions_spread")
NEEDLE = r"^One of the special magic numbers for (\S+) is: (\d{7})\.$"
LENGTH = 2048


def build(name: str, materials: Materials, index: int = 0, length: int = LENGTH) -> Example:
    task = TASKS[name]
    return task.build(materials, length, index, rng_for(task, length, 0, index))[0]


def said(task: Task, example: Example, text: str) -> tuple[float | None, str]:
    verdict = task.score(example.gold, Answer(text=text))
    return verdict.score, verdict.label


@pytest.mark.parametrize("name", [*OURS, "passkey", "perplexity"])
@pytest.mark.parametrize("length", [1024, 2048, 8192])
def test_lengths_are_exact(materials: Materials, name: str, length: int) -> None:
    for frame in (materials.frame, Frame("", "")):
        example = build(name, replace(materials, frame=frame), length=length)
        assert len(example.prompt.ids) + TASKS[name].max_tokens == length
        example.prompt.check(materials.encoder)


@pytest.mark.parametrize("name", OURS)
def test_too_short(materials: Materials, name: str) -> None:
    with pytest.raises(LongspanError, match=r"too short for \d+ facts; at least \d+ tokens"):
        build(name, materials, length=300)


def test_the_grid_takes_depths_in_turn(materials: Materials) -> None:
    depths = [build("needle", materials, index, 8192).depth for index in range(4)]
    assert depths == pytest.approx([0.0, 0.5, 1.0, 0.0], abs=0.03)
    grid = [build("needle", materials, index).gold.facts for index in range(3)]
    assert grid == [{"depth": 0.0}, {"depth": 0.5}, {"depth": 1.0}]


def test_hard_negatives_share_words_with_the_key(materials: Materials) -> None:
    example = build("hard_negatives", materials, length=4096)
    facts = dict(re.findall(NEEDLE, example.prompt.text, re.MULTILINE))
    (key,) = [key for key, value in facts.items() if value == example.answer]
    assert f" {key} " in example.question and len(facts) == 17
    adjective, noun = key.split("-")
    assert sum(k.startswith(adjective + "-") for k in facts) == 9
    assert sum(k.endswith("-" + noun) for k in facts) == 9
    task = TASKS["hard_negatives"]
    assert said(task, example, f"It is {example.answer}.") == (1.0, "")
    other = next(value for value in facts.values() if value != example.answer)
    assert said(task, example, other) == (0.0, "another fact")
    assert said(task, example, "1") == (0.0, "invented")
    assert said(task, example, "none") == (0.0, "no number")


def test_order(materials: Materials) -> None:
    seen = set()
    for index in range(12):
        example = build("ordinal", materials, index)
        found = re.findall(NEEDLE, example.prompt.text, re.MULTILINE)
        assert len(found) == 8 and len({key for key, _ in found}) == 1
        (place,) = [i for i, (_, value) in enumerate(found) if value == example.answer]
        word = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")[place]
        assert example.question == (f"What is the {word} of the eight special magic numbers for "
                                    f"{found[0][0]} mentioned in the provided text?")
        seen.add(place)
    assert len(seen) > 4


def test_absent_facts_must_be_refused(materials: Materials) -> None:
    task = TASKS["absent"]
    absent, present = build("absent", materials, 0), build("absent", materials, 1)
    for example, is_there in ((absent, False), (present, True)):
        facts = dict(re.findall(NEEDLE, example.prompt.text, re.MULTILINE))
        asked = re.findall(r"number for (\S+) mentioned", example.question)[0]
        assert len(facts) == 4 and (asked in facts) is is_there
    assert said(task, absent, "It is not mentioned.") == (1.0, "")
    assert said(task, absent, "1234567") == (0.0, "invented")
    assert said(task, absent, "") == (0.0, "no answer")
    assert said(task, present, "not mentioned") == (0.0, "false refusal")
    assert said(task, present, present.answer) == (1.0, "")
    assert said(task, present, "7") == (0.0, "wrong")
    refused = task.score(present.gold, Answer(text="The text does not mention it."))
    assert refused.values == {"false refusals": 1.0}


@pytest.mark.parametrize("text", [
    "Not mentioned.", "There is no such number.", "It isn't given", "The text doesn't say.",
    "unknown", "None", "I cannot find it"])
def test_refusals(text: str) -> None:
    assert needles.REFUSALS.search(text)


def test_wordings_are_none_of_training(materials: Materials) -> None:
    known = [sentence for _, sentence, *_ in training.NATURAL] + list(training.RECORDS)
    known += [training.RULER, training.PASSKEY, *training.KEYED_PASSKEY]
    known += [sentence for sentence, _ in training.RULER_LOOSE]
    trained = {frozenset(re.findall(r"[a-z]{4,}", sentence.lower())) for sentence in known}
    for sentence, _ in wordings.UNSEEN:
        words = frozenset(re.findall(r"[a-z]{4,}", sentence.lower().replace("{value}", "")
                                     .replace("{key}", "")))
        assert all(len(words & other) <= 1 for other in trained), sentence
    for index in range(5):
        example = build("unseen_wordings", materials, index)
        assert example.prompt.text.count(example.answer) == 1
        line = next(line for line in example.prompt.text.split("\n") if example.answer in line)
        sentence, question = wordings.UNSEEN[index]
        pattern = re.escape(sentence).replace(r"\{key\}", r"(\S+)").replace(
            r"\{value\}", r"\d{7}")
        found = re.fullmatch(pattern, line)
        assert found and example.question == question.format(key=found[1])


def test_fresh_wordings_are_asked_in_turn_among_others(materials: Materials) -> None:
    first = [sentence.index("{value}") < sentence.index("{key}") for sentence, _ in wordings.FRESH]
    assert sum(first) == len(first) / 2 == 12
    for index in range(26):
        example = build("fresh_wordings", materials, index)
        sentence, question = wordings.FRESH[index % 24]
        found = re.fullmatch(re.escape(question).replace(r"\{key\}", r"(\S+)"), example.question)
        assert found
        assert sentence.format(key=found[1], value=example.answer) in example.prompt.text
        hidden = [other for other, _ in wordings.FRESH if re.search(re.escape(other).replace(
            r"\{key\}", r"\S+").replace(r"\{value\}", r"\d{7}"), example.prompt.text)]
        assert len(hidden) == wordings.NUM_HIDDEN


@pytest.mark.parametrize(("place", "low", "high"), [
    ("start", 0.0, 0.12), ("middle", 0.4, 0.6), ("end", 0.9, 0.99)])
def test_questions_stand_together(
    materials: Materials, place: str, low: float, high: float
) -> None:
    example = build(f"questions_{place}", materials, length=8192)
    text = example.prompt.text
    found = [(m.start() / len(text), m[1], m[2]) for m in re.finditer(
        r"^Question (\d): What is the special magic number for (\S+)\?$", text, re.MULTILINE)]
    facts = dict(re.findall(NEEDLE, text, re.MULTILINE))
    assert [number for _, number, _ in found] == ["1", "2", "3", "4"]
    assert tuple(facts[key] for *_, key in found) == example.gold.answers
    assert all(low <= at <= high for at, *_ in found)
    assert text.endswith("Answer the 4 questions that stand in the text, in their order, with the "
                         "numbers only.<|im_end|>\n<|im_start|>assistant\n")
    task = TASKS[f"questions_{place}"]
    assert said(task, example, " ".join(example.gold.answers[1:]))[0] == 0.75


def test_questions_are_spread(materials: Materials) -> None:
    text = build("questions_spread", materials, length=8192).prompt.text
    places = [m.start() / len(text) for m in re.finditer(r"^Question \d:", text, re.MULTILINE)]
    assert all(i / 4 - 0.05 < place < (i + 1) / 4 + 0.05 for i, place in enumerate(places))
    assert len(places) == 4


def test_perplexity_by_position(materials: Materials) -> None:
    import numpy as np
    assert position_bins(1500) == [(0, 256), (256, 512), (512, 1024), (1024, 1500)]
    task, example = TASKS["perplexity"], build("perplexity", materials)
    logprobs = np.repeat([-3.0, -1.0], [256, LENGTH - 2 - 256])
    verdict = task.score(example.gold, Answer(text="", logprobs=logprobs))
    assert verdict.values["0-256"] == 3.0 and verdict.values["1024-2046"] == 1.0
    assert verdict.score == pytest.approx(-logprobs.mean())
