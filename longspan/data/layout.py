"""A planned row as tokens: filler, facts at their depths, questions behind them, exact length."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np

from longspan.data.draft import Answer, Sample
from longspan.data.facts import Fact
from longspan.data.haystack import haystack_filler
from longspan.data.plan import RowPlan
from longspan.data.source import Source
from longspan.data.tokens import IM_START, Kind, Part, Piece, TokenTable, concat, filler

SLACK = 512
"""Filler drawn beyond the need, so that the document can end at a line end."""
_FACT, _QUESTION = 0, 1


def lay_out(
    rng: random.Random, source: Source, plan: RowPlan, length: int, task: str = "needle"
) -> Sample | None:
    """Plan to exactly ``length`` tokens; None when the texts leave less than a tenth of the row for
    filler."""
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
        fixed = _fit_needles(plan, facts, fixed, length)
    if fixed > length - 2:
        return None
    ids = haystack_filler(rng, plan.haystack, source.corpus, table, length - fixed + SLACK)
    ids = ids[next(iter(table.cut_places(ids[: SLACK // 2])), 0) :]
    layout = _Layout(table, ids, plan, turn, tail)
    facts, questions, more = layout.on_lines(facts, questions)
    if fixed + more > length - 2:
        return None
    layout.place(facts, questions, inline, length - fixed - more)
    return layout.render(length, task)


def _fact_parts(fact: Fact, is_inline: bool) -> tuple[Part, ...]:
    if is_inline:
        return ((" ", Kind.TEXT), *fact.parts)
    return (*fact.parts, ("\n", Kind.TEXT))


def _fit_needles(plan: RowPlan, facts: list[Piece], fixed: int, length: int) -> int:
    """Empty facts nobody asks for, from the last one, until the row fits."""
    asked = {i for question in plan.questions for i in question.facts}
    empty = Piece(np.zeros(0, np.uint32), np.zeros(0, np.uint8))
    for i in range(len(facts) - 1, -1, -1):
        if fixed <= length - 64:
            break
        if i not in asked:
            fixed -= len(facts[i])
            facts[i] = empty
    return fixed


class _Layout:
    """Places facts and questions in a filler array and emits the row."""

    def __init__(
        self, table: TokenTable, ids: np.ndarray, plan: RowPlan, turn: Piece, head: Piece
    ) -> None:
        self.table, self.ids, self.plan, self.turn, self.head = table, ids, plan, turn, head
        self.lines = table.line_starts(ids)
        self.has_lines = len(self.lines) > 0
        if not self.has_lines:
            self.lines = table.cut_places(ids)
        self.sentences = table.sentence_starts(ids)
        self.joinable = table.blank_line_places(ids, self.lines)
        self.events: list[tuple[int, int, int, Piece]] = []
        self.end = len(ids)
        self.starts: dict[tuple[int, int], int] = {}
        """Where each fact and question begins, in the body."""

    def on_lines(
        self, facts: list[Piece], questions: list[Piece]
    ) -> tuple[list[Piece], list[Piece], int]:
        """Facts and questions with the line ends that must stand before them in text without lines,
        or without places for a blank line; and how many tokens that adds."""
        if len(self.joinable) or (self.has_lines and not self.plan.is_chat):
            return facts, questions, 0
        line = self.table.encode([(("\n", Kind.TEXT),)])[0]
        blank = self.table.encode([(("\n\n", Kind.TEXT),)])[0]
        before = blank if self.plan.is_chat and not self.has_lines else line
        more = len(before) * len(questions)
        if not self.has_lines:
            more += len(line) * sum(len(fact) > 0 for fact in facts)
            facts = [concat([line, fact]) if len(fact) else fact for fact in facts]
        return facts, [concat([before, question]) for question in questions], more

    def place(
        self, facts: list[Piece], questions: list[Piece], inline: list[bool], num_filler: int
    ) -> None:
        """Fill ``events`` with (position, fact or question, order, piece), sorted."""
        ends = self.joinable if len(self.joinable) else self.lines
        self.end = _snap_up(ends, num_filler, self.end)
        spots = []
        for i, (piece, depth) in enumerate(zip(facts, self.plan.depths, strict=True)):
            grid = self.sentences if inline[i] else self.lines
            spots.append(min(_snap(grid, int(depth * num_filler), self.lines), self.end))
            if len(piece):
                self.events.append((spots[-1], _FACT, i, piece))
        grid = ends if self.plan.is_chat else self.lines
        for i, (piece, question) in enumerate(zip(questions, self.plan.questions, strict=True)):
            spot = self.end
            if question.after >= 0:
                gap = max(2.0, float(self.end - spots[question.after]))
                reach = math.exp(question.distance * math.log(gap))
                spot = _snap_up(grid, spots[question.after] + int(reach), self.end)
            elif self.plan.is_chat and question.distance > 0.6:
                spot = _snap_up(grid, self.end - int(200 * question.distance), self.end)
                spot = max(spot, max(spots, default=0))
                spot = min(_snap_up(grid, spot, self.end), self.end)
            self.events.append((min(spot, self.end), _QUESTION, i, piece))
        self.events.sort(key=lambda e: e[:3])

    def render(self, length: int, task: str) -> Sample:
        """Return the row: head, filler and events in order; surplus filler is cut from the
        front."""
        pieces: list[Piece] = []
        is_chat, total = self.plan.is_chat, len(self.head) + self.end
        total += sum(len(e[3]) for e in self.events)
        turns = sum(e[1] for e in self.events) if is_chat else 0
        total += max(0, turns - 1) * (len(self.turn) - 1) + (1 if turns else 0)
        at, num_tokens = max(0, total - length), 0
        after_turn = False
        for spot, kind, order, piece in [*self.events, (self.end, _FACT, -1, None)]:
            spot = max(spot, at)
            fresh = False
            if after_turn and (spot > at or piece is not None):
                pieces.append(Piece(self.turn.ids[1:], self.turn.kinds[1:]))
                num_tokens += len(pieces[-1])
                after_turn = False
                fresh = spot == at
            if spot > at:
                pieces.append(filler(self.ids[at:spot]))
                num_tokens += len(pieces[-1])
                at = spot
            if piece is None:
                continue
            if kind == _QUESTION and is_chat:
                if not fresh and pieces:
                    self._blank_line(pieces)
                after_turn = True
            self.starts[kind, order] = num_tokens
            pieces.append(piece)
            num_tokens += len(piece)
        return self._finish(pieces, length, after_turn, task)

    def _blank_line(self, pieces: list[Piece]) -> None:
        """Make the text before a chat question end in a blank line."""
        last = pieces[-1]
        joined = int(self.table.with_newline[last.ids[-1]])
        if joined >= 0:
            ids, kinds = last.ids.copy(), last.kinds.copy()
            ids[-1], kinds[-1] = joined, Kind.TEXT
            pieces[-1] = Piece(ids, kinds)

    def _finish(self, pieces: list[Piece], length: int, after_turn: bool, task: str) -> Sample:
        body = concat(pieces)
        if after_turn:
            body = concat([body, Piece(self.turn.ids[1:2], self.turn.kinds[1:2])])
        room = length - len(self.head)
        # The row has its last tokens; a body that is too short has more filler before it.
        shift = len(self.head) + room - len(body)
        if len(body) < room:
            body = concat([filler(self._extra(room - len(body))), body])
        row = concat([self.head, Piece(body.ids[-room:], body.kinds[-room:])])
        return Sample(task, row, self._answers(row, shift))

    def _extra(self, num_tokens: int) -> np.ndarray:
        """Filler that ends a line, from behind the document if there is as much."""
        last = int(self.lines[-1]) if len(self.lines) else 0
        end = last if last - num_tokens >= self.end else self.end
        return self.ids[end - num_tokens : end]

    def _answers(self, row: Piece, shift: int) -> tuple[Answer, ...]:
        """Where the answers stand in the row, in order."""
        found = []
        questions = {i: piece for _, kind, i, piece in self.events if kind == _QUESTION}
        for i, question in enumerate(self.plan.questions):
            places = np.flatnonzero(questions[i].kinds == Kind.ANSWER)
            begin = self.starts[_QUESTION, i] + shift
            first = begin + int(places[0])
            facts = [self.starts[_FACT, f] + shift for f in question.facts]
            distance = first - max(0, min(facts)) if facts else 0
            found.append(Answer(first, begin + int(places[-1]) + 1, distance))
        return tuple(sorted(found, key=lambda a: a.start))


def _snap(grid: np.ndarray, spot: int, fallback: np.ndarray) -> int:
    """Return the first allowed position at or after ``spot``; the last one when there is none."""
    grid = grid if len(grid) else fallback
    if not len(grid):
        return spot
    return int(grid[min(int(np.searchsorted(grid, spot)), len(grid) - 1)])


def _snap_up(grid: np.ndarray, spot: int, limit: int) -> int:
    """Return the first allowed position at or after ``spot``, at most ``limit``."""
    index = int(np.searchsorted(grid, spot))
    return min(int(grid[index]), limit) if index < len(grid) else min(spot, limit)
