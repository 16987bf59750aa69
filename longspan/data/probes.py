"""Gate documents: a chat document with needles and the questions asked directly behind it."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from longspan.data.compose import Source
from longspan.data.facts import RULER, RULER_ASKS, Fact, Group
from longspan.data.tokens import IM_END, IM_START, Kind
from longspan.data.vocabulary import Words

ProbeIds = tuple[list[int], list[tuple[list[int], list[int]]]]
"""(document ids, [(question ids, answer ids)])."""


def probe_haystack(
    seed: Sequence[int], source: Source, length: int, num_needles: int, hard: bool
) -> ProbeIds:
    """A document of about `length` tokens (never more) with 7-digit RULER needles.

    `document + question` is `<|im_start|>user\\n{text}\\n\\n{question} Answer with the number
    only.<|im_end|>\\n<|im_start|>assistant\\n`; the answer is the number and <|im_end|>. When
    `hard`, the keys share their words.
    """
    rng = random.Random(repr(tuple(seed)))
    table = source.table
    words = Words.draw(rng, source.corpus.words, num_needles, hard)
    group = Group("ruler", "adj-noun", "7", RULER, RULER_ASKS)
    used: set[str] = set()
    facts = [group.make(rng, words, used) for _ in range(num_needles)]
    needles = table.encode([((f.text + "\n", Kind.TEXT),) for f in facts])
    asks = table.encode([((_question(f), Kind.TEXT),) for f in facts])
    answers = table.encode([((f.value + IM_END, Kind.ANSWER),) for f in facts])
    head = table.encode([((f"{IM_START}user\n", Kind.TEXT),)])[0].ids
    room = length - len(head) - sum(map(len, needles)) - max(map(len, asks)) - 16
    if room < length // 4:
        raise ValueError(f"{num_needles} needles leave {room} of {length} tokens: ask for fewer")
    ids = source.corpus.stream(rng, room, table)
    lines = table.line_starts(ids)
    joinable = lines[table.with_newline[ids[lines - 1]] >= 0]
    end = int(joinable[-1])
    depths = np.sort([rng.random() for _ in facts])
    spots = [min(int(lines[np.searchsorted(lines[:-1], int(d * end))]), end - 1) for d in depths]
    pieces, at = [head], 0
    for spot, needle in zip(spots, needles, strict=True):
        pieces += [ids[at:spot], needle.ids]
        at = max(at, spot)
    pieces.append(ids[at : end - 1])
    joined = int(table.with_newline[ids[end - 1]])
    document = [int(i) for i in np.concatenate(pieces)]
    questions = [
        ([joined, *map(int, a.ids)], [int(i) for i in b.ids])
        for a, b in zip(asks, answers, strict=True)
    ]
    return document, questions


def _question(fact: Fact) -> str:
    ask = fact.asks[0][0]
    return f"{ask} Answer with the {fact.noun} only.{IM_END}\n{IM_START}assistant\n"
