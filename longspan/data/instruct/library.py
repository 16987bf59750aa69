"""Documents of a corpus by their place, as tokens; parts of them at whole lines."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longspan.data.tokens import TokenTable
from longspan.errors import LongspanError


@dataclass(frozen=True, slots=True)
class Text:
    """A document or a span of one."""

    name: str
    ids: np.ndarray
    """[T]."""
    start: int
    """Tokens of the document before it."""
    is_whole: bool


class Library:
    """The training documents of a folder that has ``corpus`` and ``tokenizer``."""

    def __init__(self, folder: Path) -> None:
        corpus = folder / "corpus"
        meta = json.loads((corpus / "meta.json").read_text(encoding="utf-8"))
        self.table = TokenTable.load(folder / "tokenizer")
        self._tokens = np.memmap(corpus / "tokens.bin", meta["dtype"], "r")
        self._offsets = np.load(corpus / "offsets.npy")
        self._names = [document["name"] for document in meta["documents"]]
        self.train = np.flatnonzero(~np.load(corpus / "held_out.npy"))
        """Places of the documents that are not held out."""

    def long_enough(self, min_tokens: int) -> list[int]:
        """Places of documents of so many tokens. Raises `LongspanError` when there are none."""
        lengths = np.diff(self._offsets)[self.train]
        found = [int(i) for i in self.train[lengths >= min_tokens]]
        if not found:
            raise LongspanError(f"no document has {min_tokens:,} tokens, the longest has "
                                f"{int(lengths.max()):,}: ask for shorter ones by --min-tokens")
        return found

    def text(self, rng: random.Random, index: int, max_tokens: int) -> Text:
        """Return a document; of one that is longer a random span, between whole lines."""
        start, stop = int(self._offsets[index]), int(self._offsets[index + 1])
        ids = np.asarray(self._tokens[start:stop]).astype(np.int64)
        if len(ids) <= max_tokens:
            return Text(self._names[index], ids, 0, True)
        first = rng.randrange(len(ids) - max_tokens + 1)
        span = ids[first : first + max_tokens]
        places = self.table.cut_places(span)
        begin, end = (int(places[0]), int(places[-1])) if len(places) > 1 else (0, len(span))
        return Text(self._names[index], span[begin:end], first + begin, False)


def split(ids: np.ndarray, table: TokenTable, size: int) -> list[tuple[int, int]]:
    """Cut tokens into parts [start, stop) of at most ``size``, at whole lines where there are."""
    places = table.cut_places(ids)
    parts, start = [], 0
    while len(ids) - start > size:
        index = int(np.searchsorted(places, start + size, side="right")) - 1
        stop = int(places[index]) if index >= 0 and places[index] > start else start + size
        parts.append((start, stop))
        start = stop
    return [*parts, (start, len(ids))]
