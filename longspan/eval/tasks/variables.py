"""RULER's variable tracking: a chain of assignments scattered over noise, all names asked for."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from typing import Any, ClassVar

from longspan.eval.prompt import Materials, bury_in_lines
from longspan.eval.task import Example, Gold
from longspan.eval.tasks.ruler import NOISE, VARIABLES, RulerTask

NUM_HOPS = 4
NAME_LEN = 5
EXAMPLE_NAME_LEN = 3
EXAMPLE_TOKENS = 500
"""The solved example in front is at most so long, without its answer."""
MAX_TOKENS = 30
NO_SPACE = "no trailing space"
WITH_SPACE = "trailing space"


@dataclass(frozen=True, kw_only=True)
class VariableTask(RulerTask):
    """One chain of four hops, behind a solved example.

    RULER's beginning of the answer ends in a space. Many tokenizers write a word together with the
    space before it, so that no training text holds the space as a token of its own in front of a
    name. `keeps_space` False leaves it out; both forms are tasks of their own.
    """

    name: str = "vt"
    keeps_space: bool = True
    max_tokens: int = MAX_TOKENS
    group: ClassVar[str] = "tracking"

    @property
    def is_binary(self) -> bool:
        """Five names are asked for."""
        return False

    def build(
        self, materials: Materials, num_tokens: int, index: int, rng: random.Random
    ) -> list[Example]:
        """Build one prompt."""
        names, value = _draw_chain(NAME_LEN, rng)
        head, tail, prefix = self._strings(value)
        end = materials.frame.tail(tail, prefix)
        document = bury_in_lines(
            materials, head=self._solved(materials, rng) + "\n" + head,
            facts=_statements(names, value), num_tokens=num_tokens - self.max_tokens, rng=rng,
            num_tail_tokens=materials.encoder.count(end),
            next_line=lambda: materials.encoder.cached(NOISE + "\n"))
        return [Example(
            prompt=document.close(materials, end), gold=Gold(answers=tuple(names)),
            question=tail.strip(), positions=tuple(document.positions),
            form=WITH_SPACE if self.keeps_space else NO_SPACE)]

    def options(self) -> dict[str, Any]:
        """Return whether the space at the end is kept."""
        return {"keeps_space": self.keeps_space}

    def _strings(self, value: str) -> tuple[str, str, str]:
        head, tail, prefix = VARIABLES.fill(query=value, num_v=NUM_HOPS + 1)
        return head, tail.removeprefix("\n"), prefix if self.keeps_space else prefix.rstrip()

    def _solved(self, materials: Materials, rng: random.Random) -> str:
        """Build the example: as much noise as fits, another chain with shorter names, its
        answer."""
        names, value = _draw_chain(EXAMPLE_NAME_LEN, rng)
        statements = _statements(names, value)
        head, tail, prefix = self._strings(value)
        count = materials.encoder.count
        room = EXAMPLE_TOKENS - count(head + "".join(statements) + tail + prefix)
        num_lines = max(len(statements), room // count(NOISE + "\n"))
        lines = [NOISE + "\n"] * num_lines
        places = sorted(rng.sample(range(num_lines), len(statements)))
        for added, (place, statement) in enumerate(zip(places, statements, strict=True)):
            lines.insert(place + added, statement)
        return head + "".join(lines) + tail + prefix + " " + " ".join(names) + "\n"


def _draw_chain(name_len: int, rng: random.Random) -> tuple[list[str], str]:
    """Draw different names, and the value of the first one."""
    names: dict[str, None] = {}
    while len(names) < NUM_HOPS + 1:
        names["".join(rng.choices(string.ascii_uppercase, k=name_len))] = None
    return list(names), str(rng.randrange(10_000, 99_999))


def _statements(names: list[str], value: str) -> list[str]:
    """Return the lines of the chain, in its order."""
    hops = [f"VAR {new} = VAR {old} \n" for old, new in zip(names, names[1:], strict=False)]
    return [f"VAR {names[0]} = {value}\n", *hops]
