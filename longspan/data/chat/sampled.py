"""A model's own wrong answers, found out by rule: the pairs that it can learn most from."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from longspan.data.calls import Calls
from longspan.data.chat.rows import WEIGHTS, ChatPlanner, draw_exercise, pair_of
from longspan.data.chat.verify import find_mistake
from longspan.data.source import Source


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a model is asked."""

    num_tries: int = 4
    """Answers to a question, at most, until one is wrong; the first one is greedy."""
    temperature: float = 1.0
    max_tokens: int = 192


def sample_pair(
    planner: ChatPlanner, source: Source, calls: Calls, sampling: Sampling, seed: tuple[int, int]
) -> dict[str, Any]:
    """Return a pair of the right answer and the model's first wrong one; where all were right, a
    line that says so.

    Args:
        seed: longest length and index of the row.
    """
    length, index = seed
    salt = "held_out" if source.is_held_out else "train"
    rng = random.Random(repr((planner.seed, planner.form, salt, length, index)))
    weights = planner.weights or WEIGHTS[planner.form]
    exercise, num_tokens = draw_exercise(rng, source, weights, length, many=False)
    job = job_name(salt, seed)
    messages = exercise.messages(last_reply=False)
    for attempt in range(sampling.num_tries):
        temperature = sampling.temperature if attempt else 0.0
        _, reply = calls.reply(job, messages, sampling.max_tokens, temperature,
                               planner.seed + attempt)
        text = reply.text.strip()
        why = find_mistake(text, exercise.turns[-1].gold) if text else None
        if why is not None:
            return {**pair_of(exercise, text, why, num_tokens), "job": job, "attempt": attempt}
    return {"right": sampling.num_tries, "task": exercise.task, "job": job}


def job_name(split: str, seed: tuple[int, int]) -> str:
    """Return the name of a row's calls."""
    return f"{split}/{seed[0]}/{seed[1]}"
