"""Needle tasks of our own, over real text: a grid of depths, hard negatives, absent facts, order,
several questions at several places.

Where a question asks for one number, the first number of the answer counts. All use the needle
sentence that the passkey task uses, so that what differs is what the task is about.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from longspan.eval.metrics import first_number, string_hits
from longspan.eval.prompt import Materials, bury_in_prose
from longspan.eval.task import Answer, Example, Gold, Task, Verdict
from longspan.eval.tasks.niah import join_keys
from longspan.eval.tasks.passkey import INSTRUCTION, MAX_ANSWER_TOKENS, NEEDLE, QUESTION
from longspan.eval.tasks.ruler import join_answers
from longspan.eval.words import ADJECTIVES, NOUNS, draw_key, draw_keys, draw_number

NUM_NEGATIVES = 16
NUM_ORDINAL = 8
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
ORDINAL_QUESTION = ("What is the {ordinal} of the eight special magic numbers for {key} mentioned "
                    "in the provided text?")
REFUSAL = "not mentioned"
REFUSAL_INSTRUCTION = (f"Answer with the number only. If the text does not mention it, answer: "
                       f"{REFUSAL}.")
REFUSALS = re.compile(
    r"\b(not mentioned|no mention|not (?:given|stated|found|provided|present|available|contain)"
    r"|does(?: not|n't)|is(?: not|n't)|unknown|cannot|can't|none|no (?:such|special|magic))\b",
    re.IGNORECASE)
PLACES = ("start", "middle", "end", "spread")
NUM_SPREAD = 4
QUESTION_LINE = "Question {number}: What is the special magic number for {key}?\n"
ANSWER_ALL = ("Answer the {count} questions that stand in the text, in their order, with the "
              "numbers only.")


@dataclass(frozen=True, slots=True)
class Fact:
    """A hidden number."""

    depth: float
    key: str
    value: str
    sentence: str = NEEDLE

    @property
    def line(self) -> str:
        """The line that hides it."""
        return self.sentence.format(key=self.key, value=self.value)


@dataclass(frozen=True, slots=True)
class Quiz:
    """Facts of a document and a question about one of them, or about none."""

    facts: Sequence[Fact]
    question: str
    asked: int | None = 0
    """Which fact; None: the text does not hold what is asked for."""
    instruction: str = INSTRUCTION


class NumberTask(Task):
    """One question whose answer is a number."""

    @property
    def by_depth(self) -> bool:
        """The number stands in one place."""
        return True

    def score(self, gold: Gold, answer: Answer) -> Verdict:
        """Give 1 if the first number is the right one; a number of another fact is told apart."""
        found = first_number(answer.text)
        if found == gold.answers[0]:
            return Verdict(score=1.0)
        others = gold.facts.get("others", ())
        label = "no number" if found is None else "another fact" if found in others else "invented"
        return Verdict(score=0.0, label=label)


@dataclass(frozen=True, kw_only=True)
class GridTask(NumberTask):
    """One needle at each of several depths: the heat map of length by depth."""

    name: str = "needle"
    num_depths: int = 11
    max_tokens: int = MAX_ANSWER_TOKENS

    def build(
        self, materials: Materials, num_tokens: int, index: int, rng: random.Random
    ) -> list[Example]:
        """Build one prompt; the depths take turns."""
        depth = (index % self.num_depths) / max(1, self.num_depths - 1)
        (key,) = draw_keys(rng, 1)
        quiz = Quiz([Fact(depth, key, draw_number(rng))], QUESTION.format(key=key))
        example = ask_one(quiz, self, materials, num_tokens, rng)
        return [replace(example, gold=replace(example.gold, facts={"depth": round(depth, 4)}))]

    def options(self) -> dict[str, Any]:
        """Return the depths of the grid."""
        return {"num_depths": self.num_depths}


@dataclass(frozen=True, kw_only=True)
class HardNegativesTask(NumberTask):
    """One needle among others whose keys share a word with its own."""

    name: str = "hard_negatives"
    max_tokens: int = MAX_ANSWER_TOKENS

    def build(
        self, materials: Materials, num_tokens: int, index: int, rng: random.Random
    ) -> list[Example]:
        """Build one prompt."""
        key = draw_key(rng)
        adjective, noun = key.split("-")
        half = NUM_NEGATIVES // 2
        others = [f"{adjective}-{other}" for other in _others(NOUNS, noun, half, rng)]
        others += [f"{other}-{noun}" for other in _others(ADJECTIVES, adjective, half, rng)]
        facts = [Fact(rng.random(), each, draw_number(rng)) for each in [key, *others]]
        return [ask_one(Quiz(facts, QUESTION.format(key=key)), self, materials, num_tokens, rng)]


@dataclass(frozen=True, kw_only=True)
class OrdinalTask(NumberTask):
    """Eight needles with one key; one of them is asked for by its place among them."""

    name: str = "ordinal"
    max_tokens: int = MAX_ANSWER_TOKENS

    def build(
        self, materials: Materials, num_tokens: int, index: int, rng: random.Random
    ) -> list[Example]:
        """Build one prompt."""
        key = draw_key(rng)
        depths = sorted(rng.random() for _ in range(NUM_ORDINAL))
        facts = [Fact(depth, key, draw_number(rng)) for depth in depths]
        asked = rng.randrange(NUM_ORDINAL)
        question = ORDINAL_QUESTION.format(ordinal=ORDINALS[asked], key=key)
        return [ask_one(Quiz(facts, question, asked), self, materials, num_tokens, rng)]


@dataclass(frozen=True, kw_only=True)
class AbsentTask(Task):
    """Every other question asks for a number that the text does not hold and must be refused."""

    name: str = "absent"
    max_tokens: int = MAX_ANSWER_TOKENS
    num_facts: ClassVar[int] = 4

    def build(
        self, materials: Materials, num_tokens: int, index: int, rng: random.Random
    ) -> list[Example]:
        """Build one prompt."""
        keys = draw_keys(rng, self.num_facts + 1)
        is_absent = index % 2 == 0
        facts = [Fact(rng.random(), key, draw_number(rng)) for key in keys[1:]]
        quiz = Quiz(facts, QUESTION.format(key=keys[0] if is_absent else keys[1]),
                    None if is_absent else 0, REFUSAL_INSTRUCTION)
        return [ask_one(quiz, self, materials, num_tokens, rng)]

    def score(self, gold: Gold, answer: Answer) -> Verdict:
        """Give 1 for a refusal where there is nothing, and for the number where there is one."""
        found = first_number(answer.text)
        refuses = found is None and REFUSALS.search(answer.text) is not None
        if gold.facts["is_absent"]:
            if refuses:
                return Verdict(score=1.0, values={"refused": 1.0})
            label = "no answer" if found is None else "invented"
            return Verdict(score=0.0, label=label, values={"refused": 0.0})
        if found == gold.answers[0]:
            return Verdict(score=1.0, values={"false refusals": 0.0})
        label = "false refusal" if refuses else "wrong"
        return Verdict(score=0.0, label=label, values={"false refusals": float(refuses)})


@dataclass(frozen=True, kw_only=True)
class QuestionsTask(Task):
    """Several questions inside the text: all at its start, in its middle, at its end, or spread."""

    name: str
    place: str
    max_tokens: int = 96

    @property
    def is_binary(self) -> bool:
        """Several numbers are asked for."""
        return False

    def build(
        self, materials: Materials, num_tokens: int, index: int, rng: random.Random
    ) -> list[Example]:
        """Build one prompt."""
        keys = draw_keys(rng, NUM_SPREAD)
        facts = [Fact(rng.random(), key, draw_number(rng)) for key in keys]
        lines = [(depth, QUESTION_LINE.format(number=number, key=key)) for number, (depth, key) in
                 enumerate(zip(self._depths(rng), keys, strict=True), 1)]
        tail = materials.frame.tail("\n\n" + ANSWER_ALL.format(count=NUM_SPREAD))
        budget = num_tokens - self.max_tokens
        document = bury_in_prose(
            materials, head="", num_tokens=budget, rng=rng,
            facts=[*((fact.depth, fact.line) for fact in facts), *lines],
            num_tail_tokens=materials.encoder.count(tail))
        answers = tuple(fact.value for fact in facts)
        return [Example(prompt=document.finish(materials, tail, budget),
                        gold=Gold(answers=answers), question=join_keys(keys),
                        positions=tuple(document.positions[:NUM_SPREAD]))]

    def score(self, gold: Gold, answer: Answer) -> Verdict:
        """Return the share of the numbers that the answer holds."""
        hits = string_hits(answer.text, gold.answers)
        return Verdict(score=sum(hits) / len(hits), hits=hits)

    def reference(self, gold: Gold) -> str:
        """Return all numbers, in the order of the questions."""
        return join_answers(gold.answers)

    def _depths(self, rng: random.Random) -> list[float]:
        """Return where the questions stand, in their order."""
        if self.place == "spread":
            return [(number + rng.random()) / NUM_SPREAD for number in range(NUM_SPREAD)]
        return [{"start": 0.0, "middle": 0.5, "end": 1.0}[self.place]] * NUM_SPREAD


def ask_one(
    quiz: Quiz, task: Task, materials: Materials, num_tokens: int, rng: random.Random
) -> Example:
    """Build the prompt of a quiz: real text around the facts, the question at its end."""
    budget = num_tokens - task.max_tokens
    tail = materials.frame.tail(f"\n\n{quiz.question} {quiz.instruction}")
    document = bury_in_prose(
        materials, head="", facts=[(fact.depth, fact.line) for fact in quiz.facts], rng=rng,
        num_tail_tokens=materials.encoder.count(tail), num_tokens=budget)
    others = [fact.value for i, fact in enumerate(quiz.facts) if i != quiz.asked]
    is_absent = quiz.asked is None
    answer = REFUSAL if quiz.asked is None else quiz.facts[quiz.asked].value
    positions = () if quiz.asked is None else (document.positions[quiz.asked],)
    return Example(
        prompt=document.finish(materials, tail, budget), question=quiz.question,
        gold=Gold(answers=(answer,), facts={"others": others, "is_absent": is_absent}),
        positions=positions)


def _others(words: Sequence[str], word: str, count: int, rng: random.Random) -> list[str]:
    return rng.sample([other for other in words if other != word], count)
