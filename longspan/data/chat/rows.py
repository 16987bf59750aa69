"""Chat rows and preference pairs by seed, at most as long as asked for.

A chat row is ``{"messages", "task", "num_tokens"}``, a pair ``{"messages", "chosen", "rejected",
"task", "why", "num_tokens"}``: messages end in the user's question, ``chosen`` and ``rejected`` are
replies, ``why`` is the mistake of the latter. Tokens are those of all texts and
`TURN_LEN` around each message.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from longspan.data.chat.compose import TURN_LEN, count_tokens
from longspan.data.chat.gold import Exercise
from longspan.data.chat.reasoning import counting, variables
from longspan.data.chat.retrieval import TURNS, needle
from longspan.data.chat.ruler import ruler_niah, ruler_variables, ruler_words
from longspan.data.chat.sentences import sentences
from longspan.data.chat.wrong import wrong_reply
from longspan.data.source import Source
from longspan.data.tasks.paragraphs import log_uniform
from longspan.errors import LongspanError

CHAT, PAIRS = "chat", "pairs"
MIN_LENGTH = 512
MAX_PAIR_LENGTH = 8192
"""The report's longest pair (section 4)."""
MAX_TURNS = 3
_ATTEMPTS = 24

EXERCISES: dict[str, Callable[[random.Random, Source, int, int], Exercise | None]] = {
    **{name: partial(needle, task=name) for name in (*TURNS, "mixed")},
    "sentences": sentences, "variables": variables, "counting": counting,
    "ruler_niah": ruler_niah, "ruler_variables": ruler_variables, "ruler_words": ruler_words}
WEIGHTS: Mapping[str, Mapping[str, float]] = {
    CHAT: {"needle": 10, "key_value": 8, "multi_query": 8, "multi_value": 8, "absent": 6,
           "mixed": 8, "ordering": 3, "variables": 4, "counting": 2, "sentences": 20,
           "ruler_niah": 18, "ruler_variables": 10, "ruler_words": 3},
    PAIRS: {"needle": 8, "key_value": 5, "multi_query": 14, "multi_value": 14, "absent": 14,
            "ordering": 4, "variables": 5, "counting": 4, "sentences": 18, "ruler_niah": 6,
            "ruler_variables": 8}}
"""Shares of tasks, unless others are asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatPlanner:
    """Which rows there shall be."""

    form: str
    """`CHAT` or `PAIRS`."""
    num_rows: Mapping[int, int]
    """Training rows by their longest length, tokens."""
    seed: int
    held_out: float = 0.02
    """Held-out rows for each training row, one at least; 0: none."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Shares of tasks; none: those of `WEIGHTS`."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.weights) - set(EXERCISES))
        if unknown:
            raise LongspanError(f"no task named {unknown[0]}: choose from {', '.join(EXERCISES)}")
        for length in self.num_rows:
            if length < MIN_LENGTH:
                raise LongspanError(f"row length {length} is below {MIN_LENGTH}: use longer rows")
            if self.form == PAIRS and length > MAX_PAIR_LENGTH:
                raise LongspanError(f"pairs of {length:,} tokens: at most {MAX_PAIR_LENGTH:,}, the "
                                    "report's limit; long answers are learned from chat rows")

    def seeds(self, split: str, num_held_out_tokens: int) -> list[tuple[int, int]]:
        """Return (length, index) of each row of a split, in the order of the file: lengths mixed.

        No held-out row is longer than all held-out text.
        """
        counts = dict(self.num_rows)
        if split != "train":
            counts = {length: max(1, round(count * self.held_out))
                      for length, count in counts.items()
                      if self.held_out and length <= num_held_out_tokens}
        found = [(length, i) for length in sorted(counts) for i in range(counts[length])]
        random.Random(repr((self.seed, split))).shuffle(found)
        return found


def compose(planner: ChatPlanner, source: Source, length: int, index: int) -> dict[str, Any]:
    """Return the row of a seed, at most ``length`` tokens. Raises `LongspanError` where the text
    allows none."""
    salt = "held_out" if source.is_held_out else "train"
    rng = random.Random(repr((planner.seed, planner.form, salt, length, index)))
    weights = planner.weights or WEIGHTS[planner.form]
    exercise, num_tokens = draw_exercise(rng, source, weights, length, planner.form == CHAT)
    if planner.form == CHAT:
        return {"messages": exercise.messages(), "task": exercise.task, "num_tokens": num_tokens}
    rejected, why = wrong_reply(rng, exercise.turns[-1].gold)
    return pair_of(exercise, rejected, why, num_tokens)


def pair_of(exercise: Exercise, rejected: str, why: str, num_tokens: int) -> dict[str, Any]:
    """Return a pair about the exercise's last question."""
    return {"messages": exercise.messages(last_reply=False),
            "chosen": exercise.turns[-1].gold.right, "rejected": rejected, "task": exercise.task,
            "why": why, "num_tokens": num_tokens}


def draw_exercise(
    rng: random.Random, source: Source, weights: Mapping[str, float], length: int, many: bool
) -> tuple[Exercise, int]:
    """Return an exercise and its tokens: about ``length`` in half of the draws, else evenly (on a
    logarithmic scale) from a half of that. A task that needs more than this length gives way to
    the others.

    Args:
        many: whether several questions may be asked.
    """
    left = {name: weight for name, weight in weights.items() if weight}
    while left:
        name = rng.choices(list(left), list(left.values()))[0]
        found = _draw_task(rng, source, name, length, many)
        if found is not None:
            return found
        del left[name]
    raise LongspanError(f"no {', '.join(weights)} row of {length:,} tokens could be made of this "
                        "text: ask for longer rows, or for other tasks by --task")


def _draw_task(
    rng: random.Random, source: Source, name: str, length: int, many: bool
) -> tuple[Exercise, int] | None:
    wanted = length if rng.random() < 0.5 else log_uniform(rng, length // 2, length)
    num_turns = rng.randrange(1, MAX_TURNS + 1) if many and wanted >= 2 * MIN_LENGTH else 1
    for _ in range(_ATTEMPTS):
        exercise = EXERCISES[name](rng, source, wanted, num_turns)
        if exercise is not None:
            num_tokens = _num_tokens(source, exercise.messages())
            # A wrong reply may be longer than the right one, by one value.
            if num_tokens + 64 <= length:
                return exercise, num_tokens
        wanted = max(MIN_LENGTH - 64, int(0.94 * wanted))
        num_turns = max(1, num_turns - 1)
    return None


def _num_tokens(source: Source, messages: Sequence[Mapping[str, str]]) -> int:
    return sum(count_tokens(source.table, message["content"]) + TURN_LEN for message in messages)
