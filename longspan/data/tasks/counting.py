"""Counting: which words of a long list are the most frequent.

*Common words*: some words stand in the list a fixed number of times more often than all others
(RULER's CWE). *Frequent words*: frequencies fall like a power of the rank (RULER's FWE), the three
first are asked for. Also: how often is a word there? Distance: from the list's beginning.
"""

from __future__ import annotations

import random
from collections import Counter

import numpy as np

from longspan.data.draft import Answer, Draft, Sample
from longspan.data.facts import join_list
from longspan.data.questions import Ask, render
from longspan.data.source import Source
from longspan.data.tasks.paragraphs import log_uniform
from longspan.data.tokens import IM_START, Kind, Piece
from longspan.data.vocabulary import pseudo_word

COMMON_ASKS = (
    ("What are the {n} most common words in the above list?",
     "Answer: The top {n} words that appear most often in the list are:"),
    ("Which {n} words occur most often in the list?", "The {n} most common words are:"),
    ("Name the {n} words that the list repeats most.", "The list repeats most:"),
    ("Find the top {n} words by count.", "The top {n} are:"),
    ("Count the words. Which {n} lead?", "These {n} lead:"),
    ("Give the {n} words with the highest counts.", "The highest counts belong to:"))
COUNT_ASKS = (
    ("How many times does {w} appear in the list?", "The number of times {w} appears is"),
    ("How often does the list say {w}?", "The list says it this often:"),
    ("Count {w}.", "The count is"), ("What is the count of {w}?", "The count of it is"),
    ("Number of occurrences of {w}?", "The number is"))
_LINE = 12
"""Words of a line."""


def count_words(rng: random.Random, source: Source, length: int) -> Sample | None:
    """Return a list of words of up to ``length`` tokens, then questions about counts."""
    draw = draw_common_words if rng.random() < 0.5 else draw_frequent_words
    num_words = length // 3
    for _ in range(6):
        if num_words < 4 * _LINE:
            return None
        words, top = draw(rng, source, num_words)
        rng.shuffle(words)
        lines = [words[i : i + _LINE] for i in range(0, len(words), _LINE)]
        text = "\n".join(" ".join(line) for line in lines)
        listed = source.table.encode([((text, Kind.FILLER),)])[0]
        sample = _write(rng, source, listed, Counter(words), top)
        if sample is not None and len(sample.piece) <= length:
            return sample
        room = length - (len(sample.piece) - len(listed) if sample else 0)
        num_words = int(num_words * min(1.0, 0.97 * room / len(listed)))
    return None


def draw_common_words(
    rng: random.Random, source: Source, num_words: int
) -> tuple[list[str], int]:
    """Draw words of the corpus: the first few 4 to 10 times as often as each of the others."""
    pool = source.corpus.words
    rare = max(rng.randrange(1, 4), -(-num_words // (len(pool) * 3 // 4)))
    often, top = rare * rng.randrange(4, 11), rng.randrange(1, 6)
    top = max(1, min(top, num_words // (2 * often)))
    others = max(1, (num_words - top * often) // rare)
    chosen = rng.sample(pool, min(len(pool), top + others))
    return chosen[:top] * often + chosen[top:] * rare, top


def draw_frequent_words(
    rng: random.Random, source: Source, num_words: int
) -> tuple[list[str], int]:
    """Draw invented words whose frequencies fall with a power of the rank."""
    power = rng.uniform(1.2, 2.5)
    most = log_uniform(rng, 8, max(9, min(2000, num_words // 3)))
    names = sorted({pseudo_word(rng, 2) for _ in range(most)})
    rng.shuffle(names)
    shares = np.arange(1.0, len(names) + 1) ** -power
    counts = np.maximum(1, (num_words * shares / shares.sum()).astype(int))
    return [name for name, n in zip(names, counts, strict=True) for _ in range(n)], 3


def _write(
    rng: random.Random, source: Source, listed: Piece, counts: Counter[str], top: int
) -> Sample | None:
    """Return the list and its questions; None where words tie for the last place asked for."""
    best = counts.most_common(top + 1)
    if len(best) <= top or best[top - 1][1] == best[top][1]:
        return None
    is_chat = source.table.has_chat and rng.random() < 0.65
    draft = Draft(source.table)
    if is_chat:
        draft.text((f"{IM_START}user\n", Kind.TEXT))
    begin = draft.add(listed)
    asks = [_ask_top(rng, source, [word for word, _ in best[:top]]),
            _ask_count(rng, source, *rng.choice(best))]
    for number, ask in enumerate(asks):
        if is_chat:
            turn = f"{IM_START}user\n" if number else "\n"
            draft.text((turn, Kind.TEXT), *render(rng, True, ask))
        else:
            draft.text(*render(rng, False, ask))
    return with_answers(draft.sample("counting"), begin)


def with_answers(sample: Sample, evidence: int) -> Sample:
    """Return the sample with all runs of answer tokens as answers about what begins at
    ``evidence``."""
    is_answer = np.concatenate([[False], sample.piece.kinds == Kind.ANSWER, [False]])
    edges = np.flatnonzero(np.diff(is_answer))
    answers = tuple(Answer(int(a), int(b), int(a) - evidence)
                    for a, b in zip(edges[::2], edges[1::2], strict=True))
    return Sample(sample.task, sample.piece, answers)


def _ask_top(rng: random.Random, source: Source, words: list[str]) -> Ask:
    question, prefix = (text.replace("{n}", str(len(words)))
                        for text in rng.choice(source.wordings(COMMON_ASKS)))
    return Ask(question, prefix, join_list(words), "words")


def _ask_count(rng: random.Random, source: Source, word: str, count: int) -> Ask:
    question, prefix = (text.replace("{w}", word)
                        for text in rng.choice(source.wordings(COUNT_ASKS)))
    return Ask(question, prefix, str(count), "number")
