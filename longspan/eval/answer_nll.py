"""How surprised a model is by the right answer: nats a token of it, given the prompt.

An answer that was not given may have been nearly given. Exact scores do not show that, least of
all where a small model is at the floor; the log-probability of the right answer does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from longspan.eval.prompt import Prompt
from longspan.eval.task import Answer, Example, Score, Task
from longspan.eval.text import Encoder


def answer_nlls(
    task: Task, examples: Sequence[Example], score: Score, encoder: Encoder
) -> list[float | None]:
    """Score the right answer to each example, forced behind its prompt.

    Returns nats a token; None where there is no right answer in one form, where it is longer than
    the task lets an answer be (the model could not have given it), or where the model failed.
    """
    asked = {place: with_answer(task, example, encoder) for place, example in enumerate(examples)}
    wanted = {place: prompt for place, prompt in asked.items() if prompt is not None}
    firsts = [len(examples[place].prompt.ids) for place in wanted]
    answers = score(list(wanted.values()), firsts) if wanted else ()
    found: list[float | None] = [None] * len(examples)
    for place, first, answer in zip(wanted, firsts, answers, strict=True):
        found[place] = _mean_nats(answer, first)
    return found


def with_answer(task: Task, example: Example, encoder: Encoder) -> Prompt | None:
    """Return the prompt with the right answer behind it; None where that is no answer of the
    task's length. A space stands between them unless the prompt ends in white space, as in the
    text that a model would write."""
    text = task.reference(example.gold)
    if not text:
        return None
    prompt = example.prompt
    ends_open = prompt.pieces[-1].text[-1:].isspace()
    answer = encoder.piece(text if ends_open else f" {text}")
    if not 0 < len(answer.ids) <= task.max_tokens:
        return None
    return Prompt([*prompt.pieces, answer], prompt.frame)


def _mean_nats(answer: Answer, first: int) -> float | None:
    """Return the mean over the tokens from ``first`` on."""
    if answer.logprobs is None:
        return None
    # The first token of a prompt has no log-probability, so the array begins with the second.
    return round(float(-np.asarray(answer.logprobs[first - 1:], np.float64).mean()), 5)
