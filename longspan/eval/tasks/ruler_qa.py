"""RULER's two question tasks: SQuAD and HotpotQA paragraphs from files that somebody downloaded.

RULER asks the first 500 questions of the file, which are those of a few articles, and shuffles all
of them alike, so that the right paragraph stands at one depth per length. Here questions come from
all of the file, and every prompt is shuffled for itself.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from longspan.errors import LongspanError
from longspan.eval.data_files import find_file, items, read_json
from longspan.eval.metrics import string_hits
from longspan.eval.prompt import Materials, Prompt, TooShortError, count_tokens, open_prompt
from longspan.eval.task import Answer, Example, Gold, Task, Verdict
from longspan.eval.tasks.ruler import QUESTIONS
from longspan.eval.text import Encoder

FILES = {"squad": ("squad.json", "dev-v2.0.json"),
         "hotpotqa": ("hotpotqa.json", "hotpot_dev_distractor_v1.json")}


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its answers, and the paragraphs (by number) to show with it."""

    text: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]
    """With the answer, or made to distract from it."""
    related: tuple[int, ...] = ()
    """The documents of the same article."""


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """All questions and paragraphs of a file."""

    questions: tuple[Question, ...]
    documents: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DocumentTask(Task):
    """One question over as many paragraphs as fit."""

    name: str
    dataset: str
    max_tokens: int = 32

    def build(
        self, materials: Materials, num_tokens: int, index: int, rng: random.Random
    ) -> list[Example]:
        """Build one prompt."""
        questions = self._questions(materials)
        question = rng.choice(questions.questions)
        head, tail, prefix = QUESTIONS.fill(query=question.text)
        start = open_prompt(materials, head)
        last = materials.encoder.piece(materials.frame.tail(tail.removeprefix("\n\n"), prefix))
        room = num_tokens - self.max_tokens - count_tokens([*start, last])
        chosen, repeats = _choose(materials.encoder, questions, question, room, rng)
        if not chosen:
            raise TooShortError(num_tokens, num_tokens - room + _tokens_of(
                materials.encoder, questions, question), "the paragraphs of one question")
        rng.shuffle(chosen)
        texts = [f"Document {number}:\n{questions.documents[i]}\n\n"
                 for number, i in enumerate(chosen, 1)]
        pieces = [materials.encoder.piece(text) for text in texts]
        prompt = Prompt([*start, *pieces, last], materials.frame)
        return [Example(prompt=prompt, gold=Gold(answers=question.answers),
                        question=question.text,
                        positions=(count_tokens([*start, *pieces[:chosen.index(
                            question.documents[0])]]),),
                        form="paragraphs repeat" if repeats else "")]

    def score(self, gold: Gold, answer: Answer) -> Verdict:
        """Score with RULER's ``string_match_part``."""
        hits = string_hits(answer.text, gold.answers)
        return Verdict(score=float(any(hits)), hits=hits)

    def _questions(self, materials: Materials) -> QuestionSet:
        file = find_file(materials.data, FILES[self.dataset], self.name)
        return read_squad(file) if self.dataset == "squad" else read_hotpotqa(file)


@lru_cache(maxsize=2)
def read_squad(file: Path) -> QuestionSet:
    """Read SQuAD 2.0's questions that have an answer. Raises `LongspanError` for another file."""
    content = read_json(file)
    articles = items(content.get("data") if isinstance(content, dict) else None, str(file),
                     ("paragraphs",))
    paragraphs = [items(article["paragraphs"], str(file), ("context", "qas"))
                  for article in articles]
    documents = sorted({part["context"].strip() for parts in paragraphs for part in parts})
    number = {text: i for i, text in enumerate(documents)}
    found = []
    for parts in paragraphs:
        related = [number[part["context"].strip()] for part in parts]
        for part, own in zip(parts, related, strict=True):
            found += [
                Question(qa["question"], tuple(answer["text"] for answer in qa["answers"]), (own,),
                         tuple(other for other in related if other != own))
                for qa in part["qas"] if not qa.get("is_impossible") and qa.get("answers")]
    return _checked(QuestionSet(tuple(found), tuple(documents)), file)


@lru_cache(maxsize=2)
def read_hotpotqa(file: Path) -> QuestionSet:
    """Read HotpotQA's questions with their ten paragraphs. Raises `LongspanError` for another
    file."""
    content = items(read_json(file), str(file), ("question", "answer", "context"))
    texts = [tuple(f"{title}\n{''.join(lines)}".strip() for title, lines in item["context"])
             for item in content]
    documents = sorted({text for parts in texts for text in parts})
    number = {text: i for i, text in enumerate(documents)}
    found = tuple(Question(item["question"], (item["answer"],), tuple(map(number.get, parts)))  # type: ignore[arg-type]
                  for item, parts in zip(content, texts, strict=True))
    return _checked(QuestionSet(found, tuple(documents)), file)


def _checked(questions: QuestionSet, file: Path) -> QuestionSet:
    if not questions.questions:
        raise LongspanError(f"{file}: no question there has an answer; this is another file")
    return questions


def _choose(
    encoder: Encoder, questions: QuestionSet, question: Question, room: int, rng: random.Random
) -> tuple[list[int], bool]:
    """Choose paragraphs that fit: those of the question, those of its article, then any; all of
    them again when the file has no more. Nothing if not even the first ones fit."""
    chosen: list[int] = []
    used = 0
    for document in _candidates(questions, question, rng):
        used += _cost(encoder, questions, document, len(chosen) + 1)
        if used > room:
            break
        chosen.append(document)
    enough = len(chosen) >= len(question.documents)
    return (chosen if enough else []), len(chosen) > len(questions.documents)


def _candidates(
    questions: QuestionSet, question: Question, rng: random.Random
) -> Iterator[int]:
    yield from question.documents
    yield from rng.sample(question.related, len(question.related))
    first = {*question.documents, *question.related}
    others = [i for i in range(len(questions.documents)) if i not in first]
    yield from rng.sample(others, len(others))
    others += question.related
    while others:  # the file has no more: its paragraphs again, but not those with the answer
        yield from rng.sample(others, len(others))


def _cost(encoder: Encoder, questions: QuestionSet, document: int, number: int) -> int:
    """Count the tokens of a paragraph with its heading, remembered: most prompts show many of the
    same."""
    heading = encoder.cached(f"Document {number}:\n")
    return len(heading.ids) + len(encoder.cached(questions.documents[document] + "\n\n").ids)


def _tokens_of(encoder: Encoder, questions: QuestionSet, question: Question) -> int:
    return sum(_cost(encoder, questions, document, number)
               for number, document in enumerate(question.documents, 1))
