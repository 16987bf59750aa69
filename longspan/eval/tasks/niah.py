"""RULER's eight needle tasks: keys and values of three types in three kinds of haystack."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from longspan.eval.prompt import Haystack, Materials, bury_in_lines, bury_in_prose
from longspan.eval.task import Example, Gold
from longspan.eval.tasks.ruler import NIAH, NOISE, RulerTask, Template
from longspan.eval.text import Piece
from longspan.eval.words import draw_key, draw_number, draw_uuid

NEEDLE = "One of the special magic {type} for {key} is: {value}."
MAX_TOKENS = 128
NUM_DEPTHS = 40
"""Places of needles in prose: so many equal steps from the beginning to the end."""
DRAW: dict[str, Callable[[random.Random], str]] = {
    "numbers": draw_number, "words": draw_key, "uuids": draw_uuid}


@dataclass(frozen=True, kw_only=True)
class NiahTask(RulerTask):
    """Needles with keys; one key or several are asked for, with all of their values."""

    name: str
    haystack: str = "prose"
    """``noise``: one sentence again and again; ``prose``: real text (RULER's is essays);
    ``needles``: needles that nobody asks for."""
    key_type: str = "words"
    value_type: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1
    max_tokens: int = MAX_TOKENS
    group: ClassVar[str] = "retrieval"

    @property
    def is_binary(self) -> bool:
        """One answer is right or wrong, several are a share."""
        return self.num_values * self.num_queries == 1

    @property
    def by_depth(self) -> bool:
        """A single answer has a place."""
        return self.is_binary

    def build(
        self, materials: Materials, num_tokens: int, index: int, rng: random.Random
    ) -> list[Example]:
        """Build one prompt."""
        facts = self._draw_facts(rng)
        asked = rng.sample(list(facts), self.num_queries)
        needles = [(key, value) for key, values in facts.items() for value in values]
        rng.shuffle(needles)
        head, tail, prefix = self._strings(asked)
        budget, end = num_tokens - self.max_tokens, materials.frame.tail(tail, prefix)
        lines = [self._line(key, value) for key, value in needles]
        if self.haystack == "prose":
            document = self._in_prose(materials, head, lines, end, budget, rng)
            prompt = document.finish(materials, end, budget)
        else:
            end = end.removeprefix("\n")  # the last line has one
            document = bury_in_lines(
                materials, head=head, facts=lines, num_tokens=budget, rng=rng,
                num_tail_tokens=materials.encoder.count(end),
                next_line=self._filler(materials, rng, set(facts)))
            prompt = document.close(materials, end)
        positions = tuple(position for (key, _), position in
                          zip(needles, document.positions, strict=True) if key in asked)
        answers = tuple(value for key in asked for value in facts[key])
        return [Example(prompt=prompt, gold=Gold(answers=answers), question=tail.strip(),
                        positions=positions)]

    def _strings(self, asked: Sequence[str]) -> tuple[str, str, str]:
        """Return head, question and beginning of the answer; of a single answer in the singular."""
        template, value_type = NIAH, self.value_type
        if self.is_binary:
            template, value_type = singular(NIAH), value_type[:-1]
        return template.fill(type=value_type, query=join_keys(asked))

    def _line(self, key: str, value: str) -> str:
        return NEEDLE.format(type=self.value_type, key=key, value=value) + "\n"

    def _in_prose(
        self, materials: Materials, head: str, lines: Sequence[str], end: str, budget: int,
        rng: random.Random,
    ) -> Haystack:
        depths = sorted(rng.sample(range(NUM_DEPTHS), len(lines)))
        return bury_in_prose(
            materials, head=head, num_tokens=budget, rng=rng,
            num_tail_tokens=materials.encoder.count(end),
            facts=[(depth / (NUM_DEPTHS - 1), line)
                   for depth, line in zip(depths, lines, strict=True)])

    def _filler(
        self, materials: Materials, rng: random.Random, keys: Collection[str]
    ) -> Callable[[], Piece]:
        """Give one line of the haystack after the other; never about a key of the facts."""
        noise = materials.encoder.cached(NOISE + "\n")

        def next_needle() -> Piece:
            while (key := DRAW[self.key_type](rng)) in keys:
                pass
            return materials.encoder.piece(self._line(key, DRAW[self.value_type](rng)))

        return next_needle if self.haystack == "needles" else lambda: noise

    def _draw_facts(self, rng: random.Random) -> dict[str, list[str]]:
        """Draw {key: values}, all different."""
        keys = _different(self.key_type, max(self.num_keys, self.num_queries), rng)
        values = _different(self.value_type, len(keys) * self.num_values, rng)
        return {key: values[i * self.num_values:(i + 1) * self.num_values]
                for i, key in enumerate(keys)}


def singular(template: Template) -> Template:
    """Return the template for one answer, by RULER's replacements."""
    text, prefix = template.text, template.prefix
    for old, new in (("Some", "A"), ("are all", "is"), ("are", "is")):
        text, prefix = text.replace(old, new), prefix.replace(old, new)
    return Template(text, prefix)


def join_keys(keys: Sequence[str]) -> str:
    """Join keys as RULER lists them: ``a``, or ``a, and b``, or ``a, b, and c``."""
    return keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + ", and " + keys[-1]


def _different(kind: str, count: int, rng: random.Random) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[DRAW[kind](rng)] = None
    return list(found)
