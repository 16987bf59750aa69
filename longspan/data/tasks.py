"""The report's long-range tasks (Qwen2.5-1M section 3): FIM, keywords, position, reordering; copy.

Each task is ``f(rng, paragraphs, table) -> Sample``. ``paragraphs`` are token arrays that start at
line starts and end in a line break, so they can be joined with marker lines in any order.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from longspan.data.tokens import Kind, Piece, TokenTable, concat, filler

_WORD = re.compile(r"[A-Za-z]{5,}")
END_MARK = "### End\n"
MIN_PARAGRAPHS = 4


@dataclass(frozen=True, slots=True)
class Sample:
    """One task instance: the tokens and which task made them."""

    task: str
    piece: Piece
    answer_span: tuple[int, int]
    """Token range [start, stop) of the answer inside ``piece``, end mark excluded."""


def split_paragraphs(
    rng: random.Random, ids: np.ndarray, table: TokenTable, low: int = 24, high: int = 160
) -> list[np.ndarray]:
    """Cut ``ids`` at line starts into paragraphs of about ``low``..``high`` tokens, nothing lost
    between the first and the last line start."""
    starts = table.line_starts(ids) if len(ids) > 2 else np.zeros(0, np.int64)
    if len(starts) < 2:
        return []
    cuts = [int(starts[0])]
    while True:
        index = int(np.searchsorted(starts, cuts[-1] + rng.randrange(low, high)))
        if index >= len(starts):
            break
        cuts.append(int(starts[index]))
    return [ids[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]


def _text(table: TokenTable, text: str, kind: Kind = Kind.TEXT) -> Piece:
    return table.encode([[(text, kind)]])[0]


def _sample(task: str, before: list[Piece], answer: Piece, table: TokenTable) -> Sample:
    head = concat(before)
    body = concat([head, answer, _text(table, END_MARK, Kind.COPY)])
    return Sample(task, body, (len(head), len(head) + len(answer)))


def _natural(paragraphs: Sequence[np.ndarray]) -> list[Piece]:
    return [filler(p) for p in paragraphs]


def fill_in_the_middle(
    rng: random.Random, paragraphs: Sequence[np.ndarray], table: TokenTable
) -> Sample:
    """Take out a run of paragraphs and ask for it, given both sides (PSM or SPM order)."""
    count = rng.choice((1, 1, 1, 2))
    start = rng.randrange(1, len(paragraphs) - count)
    prefix, suffix = _natural(paragraphs[:start]), _natural(paragraphs[start + count :])
    middle = concat([filler(p, Kind.TEXT) for p in paragraphs[start : start + count]])
    prefix = [_text(table, "### Prefix\n"), *prefix]
    suffix = [_text(table, "### Suffix\n"), *suffix]
    sides = [*prefix, *suffix] if rng.random() < 0.5 else [*suffix, *prefix]
    return _sample("fim", [*sides, _text(table, "### Middle\n")], middle, table)


def keywords_to_paragraph(
    rng: random.Random, paragraphs: Sequence[np.ndarray], table: TokenTable
) -> Sample:
    """Give the document, then three keywords of one paragraph, which is the answer."""
    index = rng.randrange(len(paragraphs))
    text = table.tokenizer.decode(paragraphs[index].tolist(), skip_special_tokens=False)
    pool = sorted(set(_WORD.findall(text))) or ["text"]
    chosen = rng.sample(pool, min(3, len(pool)))
    ask = f"### Which paragraph has the keywords {', '.join(chosen)}?\n"
    answer = filler(paragraphs[index], Kind.COPY)
    return _sample("keywords", [*_natural(paragraphs), _text(table, ask)], answer, table)


def paragraph_at_position(
    rng: random.Random, paragraphs: Sequence[np.ndarray], table: TokenTable
) -> Sample:
    """Give the document, then one of its paragraphs; the one before or after is the answer."""
    index = rng.randrange(1, len(paragraphs) - 1)
    step = rng.choice((-1, 1))
    side = "before" if step < 0 else "after"
    before = [
        *_natural(paragraphs), _text(table, f"### Which paragraph comes {side} this one?\n"),
        filler(paragraphs[index], Kind.COPY), _text(table, "### Answer\n")]
    return _sample("position", before, filler(paragraphs[index + step], Kind.COPY), table)


def reorder_paragraphs(
    rng: random.Random, paragraphs: Sequence[np.ndarray], table: TokenTable
) -> Sample:
    """Shuffle and number paragraphs; the answer lists the numbers in the original order."""
    order = list(range(len(paragraphs)))
    rng.shuffle(order)
    before: list[Piece] = []
    for number, index in enumerate(order, 1):
        before += [_text(table, f"### Part {number}\n"), filler(paragraphs[index])]
    numbers = [order.index(i) + 1 for i in range(len(paragraphs))]
    answer = _text(table, " ".join(map(str, numbers)) + "\n", Kind.TEXT)
    return _sample("reorder", [*before, _text(table, "### Original order\n")], answer, table)


def copy_span(rng: random.Random, paragraphs: Sequence[np.ndarray], table: TokenTable) -> Sample:
    """Mark a run of paragraphs; other text follows, then the run again."""
    count = rng.randrange(1, min(4, len(paragraphs) - 1))
    start = rng.randrange(len(paragraphs) - count)
    name = f"{rng.randrange(100, 1000)}"
    marked = paragraphs[start : start + count]
    before = [
        *_natural(paragraphs[:start]), _text(table, f"### Begin {name}\n"), *_natural(marked),
        _text(table, f"### Stop {name}\n"), *_natural(paragraphs[start + count :]),
        _text(table, f"### Repeat {name}\n")]
    return _sample("copy", before, concat([filler(p, Kind.COPY) for p in marked]), table)


Task = Callable[[random.Random, Sequence[np.ndarray], TokenTable], Sample]
TASKS: tuple[Task, ...] = (
    fill_in_the_middle, keywords_to_paragraph, paragraph_at_position, reorder_paragraphs, copy_span)
TASK_WEIGHTS = (20, 25, 25, 5, 25)
REORDER_MAX_PARAGRAPHS = 12


def draw_task(rng: random.Random, paragraphs: Sequence[np.ndarray], table: TokenTable) -> Sample:
    """Draw a random task over the paragraphs; reordering takes only the first few of them."""
    task = rng.choices(TASKS, TASK_WEIGHTS)[0]
    if task is reorder_paragraphs:
        paragraphs = paragraphs[:REORDER_MAX_PARAGRAPHS]
    return task(rng, paragraphs, table)
