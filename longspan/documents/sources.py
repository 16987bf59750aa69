"""Where in the documents an answer stands: found by comparing words, not said by the model.

Small models answer rightly out of forty files and then name the wrong one. What they said can be
looked for instead: the few dozen words of a document that hold most of what an answer says, rare
words counting for more than frequent ones, words in the answer's own order for more than scattered
ones, and the question's words for a little, as they tell one file's "1962" from another's. It is a
comparison of words: an answer in other words than the document's has no source here, and that is
what is then said. And a model that mixes two files up answers with the other one's words: where the
question's words stand together in a document that is no source, that one is named beside them.
"""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from longspan.documents.gather import Document
from longspan.documents.words import words, words_at

WINDOW = 40
"""Words of a passage, at least: a long sentence looks in a passage of twice its length."""
FROM_QUESTION = 0.5
"""Weight of words that the question has too: an answer may repeat it and know nothing."""
IN_ORDER = 0.5
"""Weight of two neighbouring words besides that of each."""
MANNER = 0.25
"""Weight of words that no document has, unless they are names or numbers."""
LEAST_SHARE = 0.4
"""A passage with less than this of what a sentence says beyond the question is no source of it."""
AS_GOOD = 0.95
"""Passages of other documents that reach this share of the best one's score are sources too."""
MAX_SOURCES = 5
CLEARLY = 1.2
"""A document holds the question this many times as well as the sources do: they are about something
else."""
MAX_QUOTE = 160
"""Characters of a passage that are shown."""
_SENTENCE = re.compile(r"(?<=[.!?。！？])\s+|(?<=[。！？])|\n+")  # noqa: RUF001

Term = str | tuple[str, str]


@dataclass(frozen=True, slots=True)
class Source:
    """A passage of a document that holds what an answer says."""

    name: str
    start: int
    """First character of the passage in the document's text."""
    stop: int
    line: int
    """Line of the passage's first character, counted from 1."""
    quote: str
    """The passage on one line, cut if it is long."""
    share: float
    """How much of what the answer's sentence says beyond the question, by rare words: 0 to 1."""
    is_asked: bool = False
    """The passage holds the question's words and not the answer's; ``share`` is of the question."""


class _Words:
    """A document's words: where each stands, counted in words, and their characters."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.starts, self.stops = array("I"), array("I")
        self.places: dict[str, array[int]] = {}
        for place, (word, start, stop) in enumerate(words_at(document.text)):
            self.starts.append(start)
            self.stops.append(stop)
            self.places.setdefault(word, array("I")).append(place)

    def hits(self, weights: Mapping[Term, float]) -> list[tuple[int, int, Term]]:
        """Return which terms stand in it, in order: first and last word, and the term."""
        single = sorted((place, word) for word in weights if isinstance(word, str)
                        for place in self.places.get(word, ()))
        found, before = list[tuple[int, int, Term]](), (-2, "")
        for place, word in single:
            found.append((place, place, word))
            if place == before[0] + 1 and (before[1], word) in weights:
                found.append((before[0], place, (before[1], word)))
            before = place, word
        return found


@dataclass(frozen=True, slots=True)
class _Passage:
    document: Document
    score: float
    start: int
    stop: int
    share: float


class SourceIndex:
    """Looks for sources in some documents, whose words are counted once."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self._documents = [_Words(one) for one in documents]
        self._counts = Counter[str]()
        for one in self._documents:
            self._counts.update({word: len(places) for word, places in one.places.items()})
        self._total = sum(self._counts.values())

    def find(self, answer: str, question: str = "") -> list[Source]:
        """Find the passages that an answer's sentences stand in, those that hold most first; none
        where the documents do not say it. The last one may be what was asked about instead."""
        found = list[_Passage]()
        asked = set(words(question))
        for sentence in filter(None, map(str.strip, _SENTENCE.split(answer))):
            found += self._passages(sentence, asked)
        found.sort(key=lambda passage: -passage.score)
        apart = list[_Passage]()
        for passage in found:
            if not any(other.document is passage.document and other.start < passage.stop
                       and passage.start < other.stop for other in apart):
                apart.append(passage)
        sources = [_source(passage) for passage in apart[:MAX_SOURCES]]
        other = self._asked_about(question, {one.name for one in sources}) if sources else None
        return [*sources, *([_source(other, is_asked=True)] if other else [])]

    def _asked_about(self, question: str, named: set[str]) -> _Passage | None:
        """Find the document that holds the question clearly better than those that are named."""
        asked = words(question)
        weights, told = self._weights(asked, set()), {w: self._information(w) for w in asked}
        held = [passage for one in self._documents if (passage := _best(
            one, weights, told, sum(told.values()), max(WINDOW, 2 * len(asked))))]
        best = max(held, key=lambda passage: passage.score, default=None)
        if best is None or best.share < LEAST_SHARE or best.document.name in named:
            return None
        known = max((one.score for one in held if one.document.name in named), default=0.0)
        return best if best.score > CLEARLY * known else None

    def _passages(self, sentence: str, asked: set[str]) -> list[_Passage]:
        """Find the best passage for one sentence, and those of other documents that are as good."""
        said = words(sentence)
        weights = self._weights(said, asked)
        told = self._told(sentence, asked) or self._told(sentence, set())  # it repeats the question
        whole, rare = sum(told.values()), self._information("") / 2
        told = told if any(bits >= rare for bits in told.values()) else {}
        best = [passage for one in self._documents
                if (passage := _best(one, weights, told, whole, max(WINDOW, 2 * len(said))))]
        good = [passage for passage in best if passage.share >= LEAST_SHARE]
        top = max((passage.score for passage in good), default=0.0)
        return [passage for passage in good if passage.score >= AS_GOOD * top]

    def _told(self, sentence: str, asked: set[str]) -> dict[str, float]:
        """Weigh the words of a sentence that are not in the question. Of words that no document has
        names and numbers are the answer's own, and others mostly its manner of speaking."""
        told = dict[str, float]()
        for number, (word, start, stop) in enumerate(words_at(sentence)):
            is_name = any(map(str.isdigit, sentence[start:stop])) or (
                number > 0 and sentence[start].isupper())
            known = 1.0 if self._counts[word] or is_name else MANNER
            if word not in asked:
                told[word] = max(told.get(word, 0.0), known * self._information(word))
        return told

    def _weights(self, said: Sequence[str], asked: set[str]) -> dict[Term, float]:
        weights: dict[Term, float] = {
            word: FROM_QUESTION * self._information(word) for word in asked}
        weights |= {word: self._information(word) for word in said if word not in asked}
        for pair in zip(said, said[1:], strict=False):
            weights[pair] = IN_ORDER * (weights[pair[0]] + weights[pair[1]])
        return weights

    def _information(self, word: str) -> float:
        """Bits that a word tells: the fewer there are of it, the more."""
        return math.log2((self._total + 2) / (max(1, self._counts[word]) + 0.5))


def describe_sources(found: Sequence[Source]) -> str:
    """Return lines for a person: each source with its place and its words."""
    lines = [f'{"Asked about" if one.is_asked else "Source"}: {one.name}, line {one.line:,} '
             f'(characters {one.start:,}-{one.stop:,}): "{one.quote}"\n' for one in found]
    return "".join(lines) or "Source: none; the documents do not say it in these words\n"


def _best(
    found: _Words, weights: Mapping[Term, float], told: Mapping[str, float], whole: float,
    window: int,
) -> _Passage | None:
    """Find the passage of a document whose different terms weigh most together; the shortest of
    several."""
    if not whole or found.places.keys().isdisjoint(told):
        return None
    hits = found.hits(weights)
    inside = Counter[Term]()
    best = (0.0, 0, 0, 0)
    score, first = 0.0, 0
    for number, (_, last, term) in enumerate(hits):
        inside[term] += 1
        score += weights[term] if inside[term] == 1 else 0.0
        while hits[first][1] <= last - window or inside[hits[first][2]] > 1:
            gone = hits[first][2]
            inside[gone] -= 1
            score -= 0.0 if inside[gone] else weights[gone]
            first += 1
        best = max(best, (score, hits[first][0] - last, first, number))
    chosen = hits[best[2] : best[3] + 1]
    held = sum(told.get(term, 0.0) for term in {hit[2] for hit in chosen} if isinstance(term, str))
    return _Passage(found.document, best[0], found.starts[min(hit[0] for hit in chosen)],
                    found.stops[max(hit[1] for hit in chosen)], held / whole)


def _source(passage: _Passage, *, is_asked: bool = False) -> Source:
    text = passage.document.text
    quote = " ".join(text[passage.start : passage.stop].split())
    if len(quote) > MAX_QUOTE:
        quote = quote[: MAX_QUOTE - 2].rsplit(" ", 1)[0] + " …"
    return Source(passage.document.name, passage.start, passage.stop,
                  text.count("\n", 0, passage.start) + 1, quote, round(passage.share, 3), is_asked)
