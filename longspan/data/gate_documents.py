"""Gate documents: a chat document with facts and the questions asked directly behind it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np

from longspan.data.facts import RULER, RULER_ASKS, Fact, Group, draw_group
from longspan.data.source import Source
from longspan.data.tokens import IM_END, IM_START, Kind, TokenTable
from longspan.data.vocabulary import Words
from longspan.data.woven import draw_words, weave
from longspan.errors import LongspanError

GateDocument = tuple[list[int], list[tuple[list[int], list[int]]]]
"""(document ids, [(question ids, answer ids)])."""


def gate_documents(
    source: Source, length: int, count: int, num_needles: int, seed: int = 1,
    number_first: bool = False,
) -> Iterator[GateDocument]:
    """``count`` documents: needles, in every second one with hard keys; or, ``number_first``,
    sentences of the corpus' words that name the number before the key."""
    for i in range(count):
        rng = random.Random(repr((seed, length, i)))
        facts = (_sentences(rng, source, num_needles, length) if number_first else
                 _needles(rng, source, num_needles, hard=i % 2 == 1))
        yield gate_document(rng, source, length, facts)


def _needles(rng: random.Random, source: Source, count: int, hard: bool) -> list[Fact]:
    """Draw 7-digit RULER needles; hard keys share their words."""
    words = Words.draw(rng, source.corpus.words, count, hard)
    group = Group("ruler", "adj-noun", "7", RULER, RULER_ASKS)
    used: set[str] = set()
    return [group.make(rng, words, used) for _ in range(count)]


def _sentences(rng: random.Random, source: Source, count: int, length: int) -> list[Fact]:
    """Draw facts that are each woven into words of their own, the number first. Words that would
    fill a document of ``length`` tokens are left out: those of some scripts have many tokens."""
    words = Words.draw(rng, source.corpus.words, count, hard=False)
    used: set[str] = set()
    most = 7 * length // (16 * count)

    def draw(rng: random.Random) -> str:
        said = draw_words(rng, source)
        while len(source.table.encode([((" ".join(said), Kind.TEXT),)])[0]) > most:
            said = said[: len(said) // 2]
        return weave(rng, said, value_first=1)

    return [draw_group(rng, "woven", source.wordings, draw).make(rng, words, used)
            for _ in range(count)]


def gate_document(
    rng: random.Random, source: Source, length: int, facts: Sequence[Fact]
) -> GateDocument:
    r"""Compose a document of about ``length`` tokens (never more) that holds the facts.

    ``document + question`` is `<|im_start|>user\n{text}\n\n{question} Answer with the number
    only.<|im_end|>\n<|im_start|>assistant\n`; the answer is the number and <|im_end|>.
    """
    table = source.table
    needles = table.encode([((f.text + "\n", Kind.TEXT),) for f in facts])
    asks = table.encode([((_question(f), Kind.TEXT),) for f in facts])
    answers = table.encode([((f.value + IM_END, Kind.ANSWER),) for f in facts])
    head = table.encode([((f"{IM_START}user\n", Kind.TEXT),)])[0].ids
    room = length - len(head) - sum(map(len, needles)) - max(map(len, asks)) - 16
    if room < length // 4:
        raise LongspanError(f"{len(facts)} needles leave {room} of {length} tokens: ask for fewer")
    ids = source.corpus.stream(rng, room, table)
    lines = table.line_starts(ids)
    if len(lines) > 1:
        ids, lines = ids[lines[0] :], lines[1:] - lines[0]
        ids, blank = _close(ids, lines, table)
    else:  # text without lines: facts begin ones of their own, wherever it may be cut
        needles = table.encode([(("\n" + f.text + "\n", Kind.TEXT),) for f in facts])
        ids = ids[: room - 2 * len(facts)]
        lines = table.cut_places(ids)
        blank = table.tokenizer.encode("\n\n", add_special_tokens=False).ids
    depths = np.sort([rng.random() for _ in facts])
    spots = [_line_at(lines, int(d * len(ids)), len(ids)) for d in depths]
    pieces, at = [head], 0
    for spot, needle in zip(spots, needles, strict=True):
        pieces += [ids[at:spot], needle.ids]
        at = max(at, spot)
    pieces.append(ids[at:])
    document = [int(i) for i in np.concatenate(pieces)]
    questions = [
        ([*blank, *map(int, a.ids)], [int(i) for i in b.ids])
        for a, b in zip(asks, answers, strict=True)]
    return document, questions


def _close(ids: np.ndarray, lines: np.ndarray, table: TokenTable) -> tuple[np.ndarray, list[int]]:
    """Return the text up to its last line break, and the tokens that add a blank line.

    Where one token can stand for the end of the line and the blank one, it replaces the last.
    """
    joinable = table.blank_line_places(ids, lines)
    if len(joinable):
        end = int(joinable[-1])
        return ids[: end - 1], [int(table.with_newline[ids[end - 1]])]
    return ids[: lines[-1]], table.tokenizer.encode("\n", add_special_tokens=False).ids


def _line_at(lines: np.ndarray, spot: int, limit: int) -> int:
    """Find the first line start at or after ``spot``, else the last one before ``limit``."""
    index = min(int(np.searchsorted(lines, spot)), int(np.searchsorted(lines, limit)) - 1)
    return int(lines[max(index, 0)]) if int(lines[0]) < limit else 0


def _question(fact: Fact) -> str:
    ask = fact.asks[0][0]
    return f"{ask} Answer with the {fact.noun} only.{IM_END}\n{IM_START}assistant\n"
