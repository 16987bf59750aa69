"""Documents as tokens on disk: written once, read as random long spans from a memory map.

A corpus directory holds ``tokens.bin`` (uint16, uint32 for vocabularies beyond 65,536),
``offsets.npy`` (int64 [documents + 1]), ``held_out.npy`` (bool [documents]), ``words.txt`` (words
that are frequent, for keys) and ``meta.json``.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from longspan.data.documents import Document
from longspan.data.intake import KEPT, Intake
from longspan.data.tokens import TokenTable
from longspan.data.vocabulary import NOUNS
from longspan.errors import LongspanError
from longspan.files.whole import replaced

MIN_SPAN = 384
MIN_WORDS = 500
"""Corpora with fewer frequent words borrow some."""
_WORD = re.compile(r"\b[^\W\d_]{4,11}\b")
_PART_CHARS = 200_000
_BATCH_CHARS = 4_000_000


def write_corpus(
    documents: Iterable[Document], tokenizer: Tokenizer, out_dir: Path, intake: Intake,
    held_out: float = 0.02, notes: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Tokenise documents to ``out_dir``, which is there only when all are; returns its counts.

    A share ``held_out`` of the characters is set aside, as whole documents. ``notes`` go to
    ``meta.json``. Raises `LongspanError` when there is no document, or none to set aside.
    """
    with replaced(out_dir, is_folder=True) as part:
        meta, listing = _write(documents, _plain(tokenizer), part, intake, held_out)
        content = {**notes, **meta, "documents": listing}
        (part / "meta.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return meta


def _write(
    documents: Iterable[Document], tokenizer: Tokenizer, folder: Path, intake: Intake,
    held_out: float,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    names, sizes, lengths, words = [], [], [], Counter[str]()
    unknown, num_unknown = unknown_token(tokenizer), 0
    with (folder / "tokens.bin").open("wb") as out:
        for document, ids in _encoded(documents, tokenizer):
            out.write(ids.astype(dtype).tobytes())
            names.append(document.name)
            sizes.append(len(document.text))
            lengths.append(len(ids))
            num_unknown += int((ids == unknown).sum()) if unknown is not None else 0
            words.update(lower_words(document.text))
            intake.note(document.source, KEPT, document.name, document.num_bytes, len(ids),
                        document.num_files)
    if not names:
        raise LongspanError(f"no text that can be used: {intake.left_out()}")
    is_held_out = choose_held_out(names, sizes, held_out)
    np.save(folder / "offsets.npy", np.cumsum([0, *lengths]))
    np.save(folder / "held_out.npy", is_held_out)
    (folder / "words.txt").write_text("\n".join(most_frequent(words)) + "\n", encoding="utf-8")
    meta = {"dtype": np.dtype(dtype).name, "num_documents": len(names),
            "num_train_tokens": int(np.sum(lengths, where=~is_held_out)),
            "num_held_out_tokens": int(np.sum(lengths, where=is_held_out)),
            "num_unknown_tokens": num_unknown, "lengths": length_buckets(lengths),
            "table": intake.rows()}
    listing = [{"name": name, "num_tokens": length, "is_held_out": bool(out)}
               for name, length, out in zip(names, lengths, is_held_out, strict=True)]
    return meta, listing


def choose_held_out(
    names: Sequence[str], sizes: Sequence[int], share: float, way_out: str = ", or --held-out 0"
) -> np.ndarray:
    """Which documents are set aside, bool [documents]: by the hashes of their names, up to a share
    of the whole, and one at least that is not the longest.

    Raises `LongspanError` for a single document; ``way_out``: what else than more of them helps.
    """
    chosen = np.zeros(len(names), bool)
    if share == 0:
        return chosen
    if len(names) == 1:
        raise LongspanError(
            f"one document alone, and none to hold out: add documents{way_out}")
    order = sorted(range(len(names)), key=lambda i: hashlib.sha256(names[i].encode()).digest())
    room = share * sum(sizes)
    for i in order:
        if sizes[i] <= room:
            chosen[i] = True
            room -= sizes[i]
    if not chosen.any():
        longest = max(range(len(names)), key=lambda i: sizes[i])
        chosen[next(i for i in order if i != longest)] = True
    return chosen


def length_buckets(lengths: Sequence[int]) -> list[dict[str, int]]:
    """Documents and tokens by length, in buckets up to a power of two."""
    found: Counter[int] = Counter()
    tokens: Counter[int] = Counter()
    for length in lengths:
        most = 1 << max(0, length - 1).bit_length()
        found[most] += 1
        tokens[most] += length
    return [{"max_tokens": most, "num_documents": found[most], "num_tokens": tokens[most]}
            for most in sorted(found)]


def unknown_token(tokenizer: Tokenizer) -> int | None:
    """Id of what stands for text that the vocabulary cannot spell; None where there is no such."""
    name = getattr(tokenizer.model, "unk_token", None)
    return None if name is None else tokenizer.token_to_id(name)


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    """Return a copy to which a control token in a text is text like any other."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    copy.no_truncation()
    copy.no_padding()
    return copy


def _encoded(
    documents: Iterable[Document], tokenizer: Tokenizer
) -> Iterator[tuple[Document, np.ndarray]]:
    """Documents with their tokens; many are encoded at once, by as many threads as there are."""
    waiting: list[Document] = []
    num_chars = 0
    for document in documents:
        waiting.append(document)
        num_chars += len(document.text)
        if num_chars >= _BATCH_CHARS:
            yield from zip(waiting, encode_texts([d.text for d in waiting], tokenizer), strict=True)
            waiting, num_chars = [], 0
    yield from zip(waiting, encode_texts([d.text for d in waiting], tokenizer), strict=True)


def encode_texts(texts: Sequence[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Token ids of each text, uint32 [T]; encoded part by part, as a whole 4 MB text costs
    gigabytes."""
    parts = [list(_parts(text)) for text in texts]
    encodings = iter(tokenizer.encode_batch(
        [part for of_text in parts for part in of_text], add_special_tokens=False))
    return [np.concatenate([np.array(next(encodings).ids, np.uint32) for _ in of_text])
            for of_text in parts]


def _parts(text: str) -> Iterator[str]:
    """Cuts at line ends; in lines beyond the size of a part, before a space, else anywhere."""
    start = 0
    while start < len(text):
        least = start + _PART_CHARS
        stop = text.find("\n", least, least + _PART_CHARS) + 1
        while 0 < stop < len(text) and text[stop].isspace():
            stop = text.find("\n", stop, least + _PART_CHARS) + 1
        if not stop and least < len(text):
            stop = text.find(" ", least, least + _PART_CHARS)
            stop = stop if stop > 0 else least
        stop = stop or len(text)
        yield text[start:stop]
        start = stop


def lower_words(text: str) -> Iterator[str]:
    """Words of 4 to 11 letters in which no letter is a capital one."""
    return (word for word in _WORD.findall(text) if word == word.lower())


def most_frequent(words: Counter[str], limit: int = 12_000) -> list[str]:
    """Return the most frequent words, sorted; a corpus with few gets common nouns besides."""
    chosen = {word for word, _ in words.most_common(limit)}
    return sorted(chosen if len(chosen) >= MIN_WORDS else chosen | set(NOUNS))


def sample_texts(documents: Sequence[Document], seed: int = 0) -> Iterator[str]:
    """60,000 characters from each 400,000 of the documents, to train a tokenizer on."""
    rng = random.Random(seed)
    for document in documents:
        for _ in range(max(1, len(document.text) // 400_000)):
            start = rng.randrange(max(1, len(document.text) - 60_000))
            yield document.text[start : start + 60_000]


class Corpus:
    """Random access to documents of a corpus; longer ones are drawn more often.

    Args:
        tokens: all documents, one behind the other.
        spans: start and end of each document, int64 [D, 2].
    """

    def __init__(self, tokens: np.ndarray, spans: np.ndarray, words: list[str]) -> None:
        self.tokens, self.words = tokens, words
        lengths = spans[:, 1] - spans[:, 0]
        order = np.argsort(lengths, kind="stable")
        self._starts, self._lengths = spans[order, 0], lengths[order]
        self._ends = np.cumsum(self._lengths)

    @classmethod
    def load(cls, directory: Path, split: str = "train") -> Corpus:
        """Memory-map the documents of a split, ``train`` or ``held_out``."""
        path = directory / "tokens.bin"
        if not path.is_file():
            raise LongspanError(f"no corpus in {directory}: write one first")
        dtype = json.loads((directory / "meta.json").read_text())["dtype"]
        offsets = np.load(directory / "offsets.npy")
        chosen = np.load(directory / "held_out.npy") == (split == "held_out")
        if not chosen.any():
            raise LongspanError(f"{directory} has no document in split {split}")
        words = (directory / "words.txt").read_text(encoding="utf-8").split()
        tokens = np.memmap(path, dtype, "r")
        return cls(tokens, np.stack([offsets[:-1], offsets[1:]], 1)[chosen], words)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, ascending, int64 [D]."""
        return self._lengths

    def spans(self) -> list[tuple[int, int]]:
        """Start and length of each document in ``tokens``, ascending by length."""
        return list(zip(self._starts.tolist(), self._lengths.tolist(), strict=True))

    def span(self, rng: random.Random, max_tokens: int, min_tokens: int = 0) -> np.ndarray:
        """Return a random contiguous span of one document with at least ``min_tokens``, or of one
        of the longest; the whole document where it is not longer than ``max_tokens``."""
        first = int(np.searchsorted(self._lengths, min(min_tokens, self._lengths[-1])))
        before = int(self._ends[first - 1]) if first else 0
        token = before + rng.randrange(int(self._ends[-1]) - before)
        index = int(np.searchsorted(self._ends, token, side="right"))
        length = min(max_tokens, int(self._lengths[index]))
        start = int(self._starts[index]) + rng.randrange(int(self._lengths[index]) - length + 1)
        return self.tokens[start : start + length]

    def stream(self, rng: random.Random, num_tokens: int, table: TokenTable) -> np.ndarray:
        """Exactly ``num_tokens`` of text: spans of 1..n documents, joined between lines if they
        have some, [T]. Only the beginning may be inside a line."""
        pieces: list[np.ndarray] = []
        missing = num_tokens
        while missing > 0:
            low, high = np.log(MIN_SPAN), np.log(max(MIN_SPAN + 1, 2 * num_tokens))
            wanted = int(np.exp(rng.uniform(low, high)))
            piece = _cut_out(self.span(rng, min(wanted, missing + 512)), table)
            pieces.insert(0, piece[-missing:])
            missing -= len(pieces[0])
        return np.concatenate(pieces).astype(np.int64)

    def document(
        self, rng: random.Random, room: int, table: TokenTable, may_join: bool
    ) -> np.ndarray:
        """Return a whole document of at least half of ``room`` tokens, or a span of ``room`` of a
        longer one, [T]. Where none is as long: several joined if ``may_join``, else the longest
        there are."""
        if may_join and 2 * int(self._lengths[-1]) < room:
            return self.stream(rng, room, table)
        ids = self.span(rng, room, room // 2)
        return (_cut_out(ids, table) if len(ids) == room else ids).astype(np.int64)


def _cut_out(ids: np.ndarray, table: TokenTable) -> np.ndarray:
    """Drop what precedes the first and follows the last place for a cut, when there are two."""
    places = table.cut_places(ids)
    return ids[places[0] : places[-1]] if len(places) > 1 else ids
