"""Passkey retrieval: numbers hidden in a long document, each asked for on its own.

All questions of a haystack share the document, so that an engine with a prefix cache computes it
once. Every fact is a distractor for the questions about the others.
The needle sentence and the question are RULER's (NVIDIA/RULER, Apache-2.0).
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longspan.errors import LongspanError
from longspan.eval.metrics import first_number
from longspan.eval.prompt import Frame, Materials, bury_in_prose
from longspan.eval.task import Answer, Example, Gold, Task, Verdict
from longspan.eval.text import Encoder, TextBank, TextTokenizer
from longspan.eval.words import draw_key, draw_keys, draw_number

NEEDLE = "One of the special magic numbers for {key} is: {value}.\n"
QUESTION = "What is the special magic number for {key} mentioned in the provided text?"
INSTRUCTION = "Answer with the number only."
MAX_ANSWER_TOKENS = 24
MAX_KEY_DRAWS = 4096


@dataclass(frozen=True, kw_only=True)
class PasskeyTask(Task):
    """Questions about numbers spread over the document, several to a document."""

    name: str = "passkey"
    max_tokens: int = MAX_ANSWER_TOKENS
    num_questions: int = 20
    num_distractors: int = 5
    """Facts in each document that nobody asks for."""

    @property
    def by_depth(self) -> bool:
        """Each question asks for one fact."""
        return True

    def build(
        self, materials: Materials, num_tokens: int, index: int, rng: random.Random
    ) -> list[Example]:
        """Build the questions about one document."""
        return haystack(
            materials, num_tokens=num_tokens - self.max_tokens, rng=rng,
            depths=spread_depths(self.num_questions, rng), num_distractors=self.num_distractors)

    def score(self, gold: Gold, answer: Answer) -> Verdict:
        """Give 1 if the first number is the one asked for."""
        return Verdict(score=score_number(answer.text, gold.answers[0]))

    def options(self) -> dict[str, Any]:
        """Return the questions and distractors of a document."""
        return {"num_questions": self.num_questions, "num_distractors": self.num_distractors}


def passkey_haystack(
    bank: TextBank, tokenizer: TextTokenizer, *, num_tokens: int, depths: Sequence[float],
    rng: random.Random, num_distractors: int = 0,
) -> list[Example]:
    """Build `haystack` in the tokenizer's chat template."""
    materials = Materials(encoder=Encoder(tokenizer), bank=bank, frame=Frame.chat(tokenizer))
    return haystack(materials, num_tokens=num_tokens, depths=depths, rng=rng,
                    num_distractors=num_distractors)


def haystack(
    materials: Materials, *, num_tokens: int, depths: Sequence[float], rng: random.Random,
    num_distractors: int = 0,
) -> list[Example]:
    """Build a document with a fact at each depth, and the question about each, in order.

    Every prompt is exactly `num_tokens` long, chat template included.

    Args:
        depths: of the facts asked for, 0 to 1, in the document.
        num_distractors: further facts that nobody asks for.

    Raises `LongspanError` when that many facts do not fit.
    """
    tails = _equal_tails(materials, len(depths), rng)
    needles = [(depth, key, draw_number(rng)) for key, depth in zip(tails, depths, strict=True)]
    needles += [(rng.random(), key, draw_number(rng))
                for key in draw_keys(rng, num_distractors, set(tails))]
    first_tail = next(iter(tails.values()))
    document = bury_in_prose(
        materials, head="", num_tokens=num_tokens, rng=rng,
        num_tail_tokens=materials.encoder.count(first_tail),
        facts=[(depth, NEEDLE.format(key=key, value=value)) for depth, key, value in needles])
    shared = document.end_with_text(materials, first_tail, num_tokens)
    examples = []
    for (_, key, value), position in zip(needles[:len(depths)], document.positions, strict=False):
        prompt = document.close(materials, shared + tails[key])
        assert len(prompt.ids) == num_tokens, (len(prompt.ids), num_tokens)
        examples.append(Example(
            prompt=prompt, gold=Gold(answers=(value,)), question=QUESTION.format(key=key),
            positions=(position,)))
    return examples


def score_number(text: str, answer: str) -> float:
    """Give 1 if the first number in the text is the answer."""
    return float(first_number(text) == answer)


def spread_depths(count: int, rng: random.Random) -> list[float]:
    """Draw a random depth in each of `count` equal parts of the document."""
    return [(index + rng.random()) / count for index in range(count)]


def _equal_tails(materials: Materials, count: int, rng: random.Random) -> dict[str, str]:
    """Return {key: what follows the document}: keys whose questions have the same number of tokens,
    so that all prompts about one document are equally long."""
    groups: dict[int, dict[str, str]] = defaultdict(dict)
    for _ in range(MAX_KEY_DRAWS):
        key = draw_key(rng)
        tail = materials.frame.tail(f"\n\n{QUESTION.format(key=key)} {INSTRUCTION}")
        group = groups[materials.encoder.count("text" + tail)]
        group[key] = tail
        if len(group) == count:
            return group
    raise LongspanError(f"{count} questions on one document are too many; ask fewer of them")
