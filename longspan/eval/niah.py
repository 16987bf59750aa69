"""Passkey retrieval: numbers hidden in a long document, each asked for on its own.

All questions of a haystack share the document, so that an engine with a prefix cache computes it
once. Every fact is a distractor for the questions about the others.
The needle sentence and the question are RULER's (NVIDIA/RULER, Apache-2.0).
"""

from __future__ import annotations

import random
import re
from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longspan.errors import LongspanError
from longspan.eval.task import (
    Example,
    TextBank,
    TextTokenizer,
    chat_frame,
    encode_array,
    fit_ending,
    insert_at,
    last_border,
)
from longspan.eval.words import ADJECTIVES, NOUNS, draw_key

NEEDLE = "One of the special magic numbers for {key} is: {value}.\n"
QUESTION = "What is the special magic number for {key} mentioned in the provided text?"
INSTRUCTION = "Answer with the number only."
NUM_DIGITS = 7
MAX_ANSWER_TOKENS = 24
MIN_ENDING_TOKENS = 16
MIN_FILLER_TOKENS = 256
"""Fewer tokens of real text than this are no haystack."""
MAX_KEY_DRAWS = 4096


@dataclass(frozen=True, slots=True)
class Needle:
    """A hidden fact."""

    key: str
    value: str
    depth: float

    @property
    def line(self) -> str:
        """The line that hides it."""
        return NEEDLE.format(key=self.key, value=self.value)

    @property
    def question(self) -> str:
        """What asks for it."""
        return QUESTION.format(key=self.key)


def passkey_haystack(
    bank: TextBank, tokenizer: TextTokenizer, *, num_tokens: int, depths: Sequence[float],
    rng: random.Random, num_distractors: int = 0,
) -> list[Example]:
    """A document with a fact at each depth, and the question about each, in order.

    Every prompt is exactly `num_tokens` long, chat template included.

    Args:
        depths: of the facts asked for, 0 to 1, in the document.
        num_distractors: further facts that nobody asks for.

    Raises `LongspanError` when that many facts do not fit.
    """
    before, after = chat_frame(tokenizer)
    tails = _equal_tails(tokenizer, after, len(depths), rng)
    needles = [Needle(key, _draw_value(rng), depth)
               for key, depth in zip(tails, depths, strict=True)]
    needles += [Needle(key, _draw_value(rng), rng.random())
                for key in _fresh_keys(rng, num_distractors, set(tails))]
    head = encode_array(tokenizer, before)
    lines = [encode_array(tokenizer, needle.line) for needle in needles]
    first_tail = next(iter(tails.values()))
    fixed = len(head) + sum(map(len, lines)) + len(tokenizer.encode(first_tail))
    room = num_tokens - fixed - MIN_ENDING_TOKENS
    if room < MIN_FILLER_TOKENS:
        raise LongspanError(
            f"a prompt of {num_tokens} tokens is too short for {len(needles)} facts; at least "
            f"{num_tokens - room + MIN_FILLER_TOKENS} tokens are needed, or fewer questions")
    document = bank.take(rng, room)
    stop, text = last_border(document, room)
    items = [(needle.depth, line) for needle, line in zip(needles, lines, strict=True)]
    body, places = insert_at(document, stop, items)
    shared = np.concatenate([head, body])
    ending = fit_ending(tokenizer, text, first_tail, num_tokens - len(shared))
    examples = []
    for needle, place in zip(needles[:len(depths)], places, strict=False):
        tail = encode_array(tokenizer, ending + tails[needle.key])
        ids = array("i", np.concatenate([shared, tail]).tobytes())
        assert len(ids) == num_tokens, (len(ids), num_tokens)
        position = len(head) + place
        examples.append(Example(prompt_ids=ids, question=needle.question, answer=needle.value,
                                depth=position / num_tokens, position=position))
    return examples


def score_number(text: str, answer: str) -> float:
    """1 if the first number in the text is the answer."""
    found = re.search(r"\d+", text)
    return float(found is not None and found.group() == answer)


def spread_depths(count: int, rng: random.Random) -> list[float]:
    """A random depth in each of `count` equal parts of the document."""
    return [(index + rng.random()) / count for index in range(count)]


def _equal_tails(
    tokenizer: TextTokenizer, after: str, count: int, rng: random.Random
) -> dict[str, str]:
    """{key: what follows the document}: keys whose questions have the same number of tokens, so
    that all prompts about one document are equally long."""
    groups: dict[int, dict[str, str]] = defaultdict(dict)
    for _ in range(MAX_KEY_DRAWS):
        key = draw_key(rng)
        tail = f"\n\n{QUESTION.format(key=key)} {INSTRUCTION}{after}"
        group = groups[len(tokenizer.encode("text" + tail))]
        group[key] = tail
        if len(group) == count:
            return group
    raise LongspanError(f"{count} questions on one document are too many; ask fewer of them")


def _fresh_keys(rng: random.Random, count: int, used: set[str]) -> list[str]:
    assert count + len(used) < len(ADJECTIVES) * len(NOUNS) // 2
    keys: dict[str, None] = {}
    while len(keys) < count:
        key = draw_key(rng)
        if key not in used:
            keys[key] = None
    return list(keys)


def _draw_value(rng: random.Random) -> str:
    return str(rng.randrange(10 ** (NUM_DIGITS - 1), 10**NUM_DIGITS))
