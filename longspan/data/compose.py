r"""One training row: filler text, planted facts, questions; exact length, one seed.

Two frames. *Raw* rows are plain text with ``Question: ...\nAnswer: ...`` lines. *Chat* rows are
ChatML: the document stands in a user turn, a question follows it after a blank line, the answer
is the assistant's turn, and the document may go on in the next user turn.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from longspan.data.corpus import Corpus
from longspan.data.facts import Fact, Group, draw_group, join_list, plain_passkey, with_key
from longspan.data.haystack import draw_haystack, haystack_filler
from longspan.data.tokens import IM_END, IM_START, Kind, Part, Piece, TokenTable, concat, filler
from longspan.data.vocabulary import Words

SLACK = 512
"""Filler drawn in excess, so that the document can end at a line end."""
INTRO = (
    "Some special magic {n}s are hidden within the following text. Make sure to memorize them. "
    "I will quiz you about the {n}s afterwards.",
    "Some special magic {n}s are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {n}s afterwards.",
    "A special magic {n} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {n} afterwards.",
    "Read the following text carefully. Questions about it follow.",
    "There is important information hidden inside a lot of irrelevant text. Find it.")
SUFFIXES = (
    "Answer with the {n} only.", "Reply with the {n} only.", "Give only the {n}.",
    "Only the {n}, please.")
SUFFIX_WEIGHTS = (80, 8, 6, 6)


@dataclass(frozen=True, slots=True)
class Source:
    """What rows are made of: one corpus split and the tokenizer's table."""

    corpus: Corpus
    table: TokenTable


@dataclass(frozen=True, slots=True)
class Question:
    """A question about planted facts: text before the answer, the answer, text after it."""

    parts: tuple[Part, ...]
    after: int
    """Index of the fact it must follow; -1: it stands behind the whole document."""
    distance: float
    """Distance to that fact as a share of the log range, in [0, 1)."""


@dataclass(slots=True)
class RowPlan:
    """A row before it is laid out."""

    is_chat: bool
    haystack: str
    head: str
    facts: list[Fact] = field(default_factory=list)
    depths: list[float] = field(default_factory=list)
    """Per fact, ascending, in [0, 1)."""
    questions: list[Question] = field(default_factory=list)


def num_questions(length: int) -> int:
    """Typical number of questions in a row: 24 at 4,096 tokens, 543 at 262,144."""
    return max(2, round(24 * (length / 4096) ** 0.75))


def compose_retrieval(rng: random.Random, source: Source, length: int) -> Piece:
    """Compose a retrieval row of exactly ``length`` tokens."""
    wanted = max(2, round(num_questions(length) * rng.uniform(0.4, 1.4)))
    for _ in range(8):
        plan = draw_plan(rng, source, wanted, length)
        piece = lay_out(rng, source, plan, length)
        if piece is not None:
            return piece
        wanted = max(1, wanted // 2)
    return filler(source.corpus.stream(rng, length, source.table))


def draw_plan(rng: random.Random, source: Source, wanted: int, length: int) -> RowPlan:
    """Facts with depths and about ``wanted`` questions for a row of ``length`` tokens."""
    is_chat = rng.random() < 0.65
    haystack = draw_haystack(rng)
    plan = RowPlan(is_chat, haystack, "")
    count = max(1, round(wanted * rng.uniform(0.8, 1.3)))
    if haystack == "needles":
        count = max(wanted, int(length / 34))
    groups, words = _draw_groups(rng, source, count, haystack)
    used: set[str] = set()
    facts = [rng.choice(groups).make(rng, words, used) for _ in range(count)]
    if haystack != "needles" and rng.random() < 0.15:
        facts[0] = plain_passkey(rng)
    plan.facts = facts
    plan.depths = sorted(rng.random() for _ in facts)
    rng.shuffle(plan.facts)
    plan.head = _draw_head(rng, plan.facts[0])
    merged = _merge_values(rng, plan) if rng.random() < 0.12 else []
    free = sorted(set(range(count)) - set(merged))
    order = rng.sample(free, min(wanted, len(free)))
    plan.questions = [_ask_one(rng, plan, i, rng.random() < 0.5) for i in order]
    if merged:
        plan.questions.append(_ask_values(rng, plan, merged))
    if rng.random() < 0.25:
        plan.questions += _ask_lists(rng, plan, max(1, wanted // 12))
    return plan


def _draw_groups(
    rng: random.Random, source: Source, count: int, haystack: str
) -> tuple[list[Group], Words]:
    hard = rng.random() < 0.4
    words = Words.draw(rng, source.corpus.words, count, hard)
    if haystack == "needles":
        family = rng.choice(("ruler", "ruler", "ruler", "record"))
        return [draw_group(rng, family)], words
    return [draw_group(rng) for _ in range(rng.choice((1, 1, 2, 3, 4, 6)))], words


def _draw_head(rng: random.Random, fact: Fact) -> str:
    if rng.random() > 0.3:
        return ""
    end = rng.choice(("\n", "\n", "\n\n"))
    return rng.choice(INTRO).replace("{n}", fact.noun) + end


def _ask_one(rng: random.Random, plan: RowPlan, index: int, at_end: bool) -> Question:
    fact = plan.facts[index]
    question, prefix = rng.choice(fact.asks)
    parts = _render(rng, plan.is_chat, (question, prefix), fact.value, fact.noun)
    return Question(parts, -1 if at_end else index, rng.random())


def _merge_values(rng: random.Random, plan: RowPlan) -> list[int]:
    """Multi-value: gives 2 to 4 RULER facts one key; their indices in document order."""
    pool = [i for i, f in enumerate(plan.facts) if f.family == "ruler"]
    pool = [i for i in pool if plan.facts[i].noun == plan.facts[pool[0]].noun]
    if len(pool) < 8:
        return []
    chosen = sorted(rng.sample(pool, rng.choice((2, 3, 4))))
    first = plan.facts[chosen[0]]
    for i in chosen[1:]:
        plan.facts[i] = with_key(plan.facts[i], first)
    return chosen


def _ask_values(rng: random.Random, plan: RowPlan, indices: list[int]) -> Question:
    first = plan.facts[indices[0]]
    values = join_list([plan.facts[i].value for i in indices])
    parts = _render(rng, plan.is_chat, _plural(first.noun, first.key), values, first.noun + "s")
    return Question(parts, -1, 0.0)


def _plural(noun: str, keys: str) -> tuple[str, str]:
    """RULER's plural question and the beginning of its answer."""
    what = f"special magic {noun}s for {keys} mentioned in the provided text"
    return f"What are all the {what}?", f"The {what} are"


def _ask_lists(rng: random.Random, plan: RowPlan, count: int) -> list[Question]:
    """Multi-query questions: several RULER keys of one noun asked at once."""
    keys = [f.key for f in plan.facts]
    pool = [f for f in plan.facts if f.family == "ruler" and keys.count(f.key) == 1]
    if len(pool) < 4:
        return []
    questions = []
    for _ in range(count):
        noun = rng.choice(pool).noun
        same = [f for f in pool if f.noun == noun]
        chosen = rng.sample(same, min(len(same), rng.choice((2, 3, 4))))
        ask = _plural(noun, join_list([f.key for f in chosen]))
        values = join_list([f.value for f in chosen])
        parts = _render(rng, plan.is_chat, ask, values, noun + "s")
        questions.append(Question(parts, -1, 0.0))
    return questions


def _render(
    rng: random.Random, is_chat: bool, ask: tuple[str, str], value: str, noun: str
) -> tuple[Part, ...]:
    """Render a question and its answer in the row's frame."""
    question, prefix = ask
    if is_chat:
        return _render_chat(rng, ask, value, noun)
    style = rng.random()
    if style < 0.6:
        return ((f"Question: {question}\nAnswer:", Kind.TEXT), (f" {value}\n", Kind.ANSWER))
    if style < 0.8:
        return ((f"{question} {prefix}", Kind.TEXT), (f" {value}.\n", Kind.ANSWER))
    return ((prefix, Kind.TEXT), (f" {value}.\n", Kind.ANSWER))


def _render_chat(
    rng: random.Random, ask: tuple[str, str], value: str, noun: str
) -> tuple[Part, ...]:
    question, prefix = ask
    start = f"{IM_END}\n{IM_START}assistant\n"
    if rng.random() < 0.7:
        suffix = rng.choices(SUFFIXES, SUFFIX_WEIGHTS)[0].replace("{n}", noun)
        return ((f"{question} {suffix}{start}", Kind.TEXT), (f"{value}{IM_END}", Kind.ANSWER))
    space = " " if rng.random() < 0.15 else ""
    return (
        (f"{question}{start}", Kind.TEXT), (f"{space}{prefix} ", Kind.COPY),
        (f"{value}.{IM_END}", Kind.ANSWER))


def lay_out(rng: random.Random, source: Source, plan: RowPlan, length: int) -> Piece | None:
    """Plan to tokens; None when the texts leave less than a tenth of the row for filler."""
    table = source.table
    inline = [f.is_inline and rng.random() < 0.35 for f in plan.facts]
    if plan.haystack in ("noise", "words", "needles"):
        inline = [False] * len(inline)
    texts: list[Sequence[Part]] = [(("<|im_end|>\n<|im_start|>user\n", Kind.TEXT),)]
    texts += [_fact_parts(f, i) for f, i in zip(plan.facts, inline, strict=True)]
    texts += [q.parts for q in plan.questions]
    head = f"{IM_START}user\n{plan.head}" if plan.is_chat else plan.head
    texts.append(((head, Kind.TEXT),))
    encoded = table.encode(texts)
    turn, tail = encoded[0], encoded[-1]
    facts = encoded[1 : 1 + len(plan.facts)]
    questions = encoded[1 + len(plan.facts) : -1]
    fixed = sum(map(len, encoded[1:-1])) + len(tail)
    fixed += (len(turn) - 1) * len(questions) if plan.is_chat else 0
    if fixed > 0.9 * length and plan.haystack != "needles":
        return None
    if plan.haystack == "needles":
        facts, inline, fixed = _fit_needles(plan, facts, inline, fixed, length)
    if fixed > length - 2:
        return None
    ids = haystack_filler(rng, plan.haystack, source.corpus, table, length - fixed + SLACK)
    layout = _Layout(table, ids, plan.is_chat, turn, tail)
    layout.place(plan, facts, questions, inline, length - fixed)
    return layout.render(length)


def _fact_parts(fact: Fact, is_inline: bool) -> tuple[Part, ...]:
    if is_inline:
        return ((" ", Kind.TEXT), *fact.parts)
    return (*fact.parts, ("\n", Kind.TEXT))


def _fit_needles(
    plan: RowPlan, facts: list[Piece], inline: list[bool], fixed: int, length: int
) -> tuple[list[Piece], list[bool], int]:
    """Empty facts that no question needs, from the last one, until the row fits."""
    asked = {q.after for q in plan.questions} | _asked_at_end(plan)
    empty = Piece(np.zeros(0, np.uint32), np.zeros(0, np.uint8))
    for i in range(len(facts) - 1, -1, -1):
        if fixed <= length - 64:
            break
        if i not in asked:
            fixed -= len(facts[i])
            facts[i] = empty
    return facts, inline, fixed


def _asked_at_end(plan: RowPlan) -> set[int]:
    texts = ["".join(t for t, _ in q.parts) for q in plan.questions if q.after < 0]
    joined = "\n".join(texts)
    return {i for i, f in enumerate(plan.facts) if f.value in joined}


class _Layout:
    """Places facts and questions in a filler array and emits the row."""

    def __init__(
        self, table: TokenTable, ids: np.ndarray, is_chat: bool, turn: Piece, head: Piece
    ) -> None:
        self.table, self.ids, self.is_chat, self.turn, self.head = table, ids, is_chat, turn, head
        self.lines = table.line_starts(ids)
        self.sentences = table.sentence_starts(ids)
        self.joinable = table.blank_line_places(ids, self.lines)
        self.events: list[tuple[int, int, int, Piece]] = []
        self.end = len(ids)

    def place(
        self, plan: RowPlan, facts: list[Piece], questions: list[Piece], inline: list[bool],
        num_filler: int,
    ) -> None:
        """Fill ``events`` with (position, 0 fact / 1 question, order, piece), sorted."""
        self.end = _snap_up(self.joinable, num_filler, self.end)
        spots = []
        for i, (piece, depth) in enumerate(zip(facts, plan.depths, strict=True)):
            grid = self.sentences if inline[i] else self.lines
            spots.append(min(_snap(grid, int(depth * num_filler), self.lines), self.end))
            if len(piece):
                self.events.append((spots[-1], 0, i, piece))
        grid = self.joinable if self.is_chat else self.lines
        for i, (piece, question) in enumerate(zip(questions, plan.questions, strict=True)):
            spot = self.end
            if question.after >= 0:
                gap = max(2.0, float(self.end - spots[question.after]))
                reach = math.exp(question.distance * math.log(gap))
                spot = _snap_up(grid, spots[question.after] + int(reach), self.end)
            elif self.is_chat and question.distance > 0.6:
                spot = _snap_up(grid, self.end - int(200 * question.distance), self.end)
                spot = max(spot, max(spots, default=0))
                spot = min(_snap_up(grid, spot, self.end), self.end)
            self.events.append((min(spot, self.end), 1, i, piece))
        self.events.sort(key=lambda e: e[:3])

    def render(self, length: int) -> Piece:
        """Render head, filler and events in order; surplus filler is cut from the front."""
        pieces: list[Piece] = []
        total = sum(len(e[3]) for e in self.events) + len(self.head) + self.end
        turns = sum(e[1] for e in self.events) if self.is_chat else 0
        total += max(0, turns - 1) * (len(self.turn) - 1) + (1 if turns else 0)
        at = max(0, total - length)
        after_turn = False
        for spot, is_question, _, piece in [*self.events, (self.end, 0, 0, None)]:
            spot = max(spot, at)
            if after_turn and (spot > at or piece is not None):
                pieces.append(Piece(self.turn.ids[1:], self.turn.kinds[1:]))
                after_turn = False
                fresh = spot == at
            else:
                fresh = False
            if spot > at:
                pieces.append(filler(self.ids[at:spot]))
                at = spot
            if piece is None:
                continue
            if is_question and self.is_chat:
                if not fresh and pieces:
                    self._blank_line(pieces)
                after_turn = True
            pieces.append(piece)
        return self._finish(pieces, length, after_turn)

    def _blank_line(self, pieces: list[Piece]) -> None:
        """Make the text before a chat question end in a blank line."""
        last = pieces[-1]
        joined = int(self.table.with_newline[last.ids[-1]])
        if joined >= 0:
            ids, kinds = last.ids.copy(), last.kinds.copy()
            ids[-1], kinds[-1] = joined, Kind.TEXT
            pieces[-1] = Piece(ids, kinds)

    def _finish(self, pieces: list[Piece], length: int, after_turn: bool) -> Piece:
        body = concat(pieces)
        if after_turn:
            body = concat([body, Piece(self.turn.ids[1:2], self.turn.kinds[1:2])])
        room = length - len(self.head)
        if len(body) < room:
            extra = self.ids[: room - len(body)]
            body = concat([filler(extra), body])
        return concat([self.head, Piece(body.ids[-room:], body.kinds[-room:])])


def _snap(grid: np.ndarray, spot: int, fallback: np.ndarray) -> int:
    """Find the first allowed position at or after ``spot``; else the last one."""
    grid = grid if len(grid) else fallback
    if not len(grid):
        return spot
    return int(grid[min(int(np.searchsorted(grid, spot)), len(grid) - 1)])


def _snap_up(grid: np.ndarray, spot: int, limit: int) -> int:
    """Find the first allowed position at or after ``spot``, at most ``limit``."""
    index = int(np.searchsorted(grid, spot))
    return min(int(grid[index]), limit) if index < len(grid) else min(spot, limit)


def template_texts(words: list[str], count: int = 300, seed: int = 5) -> list[str]:
    """Planted facts with their questions as plain text, to train a tokenizer that knows them."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        pools, group, used = Words.draw(rng, words, 30, False), draw_group(rng), set[str]()
        lines = [rng.choice(INTRO)]
        for _ in range(30):
            fact = group.make(rng, pools, used)
            parts = _render(rng, False, rng.choice(fact.asks), fact.value, fact.noun)
            suffix = rng.choice(SUFFIXES).replace("{n}", fact.noun)
            lines += [fact.text, "".join(text for text, _ in parts) + suffix]
        texts.append("\n".join(lines) + "\n")
    return texts
