"""A task: it builds examples and scores answers. The runner knows no task, a task no model."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np

from longspan.eval.prompt import Materials, Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a model said to one prompt, or why it said nothing."""

    text: str = ""
    status: str = "ok"
    """``ok``; else ``error``, ``timeout`` or ``oom``: there is no answer, and the prompt is asked
    again by the next run."""
    error: str = ""
    num_cached_tokens: int = 0
    """Prompt tokens that did not have to be computed again."""
    density: float | None = None
    ttft_s: float | None = None
    finish_reason: str = ""
    """``stop``, or ``length``: the answer was cut at its longest; empty where nobody says."""
    logprobs: np.ndarray | None = None
    """[T - 1] natural logarithms: of each prompt token but the first, given those before it. Only
    where a task asks for them."""


class Generate(Protocol):
    """A model under test: greedy answers to prompts that may share a long beginning."""

    def __call__(self, prompts: Sequence[Prompt], max_tokens: int) -> Sequence[Answer]:
        """Return one answer for each prompt, in order; one without an answer says so in its
        status."""


class Score(Protocol):
    """A model that can say how probable it finds each token of a prompt."""

    def __call__(self, prompts: Sequence[Prompt], firsts: Sequence[int] = ()) -> Sequence[Answer]:
        """One answer without text for each prompt, in order, with `Answer.logprobs`.

        Args:
            firsts: each prompt's first token whose log-probability is wanted; those before it may
                be NaN and need not be computed. None given: all tokens are wanted.
        """


@dataclass(frozen=True, slots=True)
class Model:
    """What can be asked of a model; `score` is None where it offers no log-probabilities."""

    generate: Generate
    score: Score | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Gold:
    """What an answer is scored against; it is stored with the sample, so that answers can be
    scored again without their prompts."""

    answers: tuple[str, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else the scorer needs: plain JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One prompt and what is expected of the answer."""

    prompt: Prompt
    gold: Gold
    question: str = ""
    positions: tuple[int, ...] = ()
    """Tokens before each fact that is asked for."""
    form: str = ""
    """Where a prompt departs from what is usual for the task: for the result row."""

    @property
    def prompt_ids(self) -> array[int]:
        """Token ids of the prompt."""
        return self.prompt.ids

    @property
    def answer(self) -> str:
        """The first right answer."""
        return self.gold.answers[0]

    @property
    def position(self) -> int:
        """Tokens before the first fact that is asked for."""
        return self.positions[0]

    @property
    def depth(self) -> float:
        """Where that fact stands: 0 is the beginning of the prompt, 1 its end."""
        return self.position / len(self.prompt.ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """How good an answer is."""

    score: float | None
    """0 to 1 (perplexity: nats a token); None: a judge has yet to say."""
    hits: tuple[bool, ...] = ()
    """Which of the right answers were given."""
    label: str = ""
    """The kind of failure, where a task tells several apart: rows count them."""
    values: Mapping[str, float] = field(default_factory=dict)
    """Further figures, which rows average by name."""


class Task(ABC):
    """A kind of question. Instances hold their options as fields."""

    name: str
    max_tokens: int
    """Longest answer."""
    group: ClassVar[str] = ""
    """``retrieval``, ``tracking`` or ``counting`` for macro scores; empty: in none."""
    is_sized: ClassVar[bool] = True
    """Prompts come in any length; else lengths are those of the data."""
    scores_text: ClassVar[bool] = True
    """A verdict depends on the text of the answer alone."""
    num_questions: int = 1
    """Examples that share a document."""

    @property
    def is_binary(self) -> bool:
        """Scores are 0 or 1."""
        return True

    @property
    def by_depth(self) -> bool:
        """One fact is asked for, so that its place in the prompt says something."""
        return False

    @abstractmethod
    def build(
        self, materials: Materials, num_tokens: int, index: int, rng: random.Random
    ) -> list[Example]:
        """Build the `num_questions` examples of one document.

        Args:
            num_tokens: of the longest prompt together with its answer; 0 where `is_sized` is not.
            index: counts the documents of a length.
            rng: seeded by task, length, seed and index: same arguments, same examples.

        Raises `LongspanError` when the length does not suffice or data is missing.
        """

    @abstractmethod
    def score(self, gold: Gold, answer: Answer) -> Verdict:
        """Return the verdict on an answer."""

    def reference(self, gold: Gold) -> str:
        """Return a right answer as a model would write it; empty where there is none to write."""
        return gold.answers[0] if gold.answers else ""

    def ask(self, model: Model, examples: Sequence[Example]) -> Sequence[Answer]:
        """Return the model's answers to examples that share a document."""
        return model.generate([example.prompt for example in examples], self.max_tokens)

    def options(self) -> dict[str, Any]:
        """Return what prompts depend on beside length, seed and index: plain JSON."""
        return {}

    def num_documents(self, num_samples: int, materials: Materials) -> int:
        """Return how many documents hold that many examples, all of them full."""
        return -(-num_samples // self.num_questions)


def rng_for(task: Task, num_tokens: int, seed: int, index: int) -> random.Random:
    """Return the random numbers of one document. They depend on nothing else, so that any subset
    gives the same prompts."""
    return random.Random(f"{task.name}:{num_tokens}:{seed}:{index}")
