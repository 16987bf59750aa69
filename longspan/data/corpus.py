"""Token shards on disk: write documents once, read random long spans from a memory map.

A shard directory holds, for each split in (``train``, ``held_out``), ``<split>.tokens.npy`` (uint16
[T], uint32 for vocabularies beyond 65,536) and ``<split>.offsets.npy`` (int64 [documents + 1]), and
``words.txt`` (words of the training split).
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from longspan.data.sources import Document
from longspan.data.tokens import TokenTable
from longspan.errors import LongspanError

SPLITS = ("train", "held_out")
MIN_SPAN = 384
_WORD = re.compile(r"\b[a-z]{4,11}\b")
_PART_CHARS = 200_000


def write_shards(
    documents: Sequence[Document], tokenizer: Tokenizer, out_dir: Path,
    max_train_tokens: int = 19_300_000,
) -> dict[str, int]:
    """Tokenise documents into both splits below ``out_dir``; returns counts per split.

    A training split above ``max_train_tokens`` loses the same share of every document's end.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    for split in SPLITS:
        chosen = [d for d in documents if d.is_held_out == (split == "held_out")]
        arrays = [_encode_document(d.text, tokenizer) for d in chosen]
        if not arrays:
            raise LongspanError(f"split {split} has no document: add corpus roots")
        if split == "train":
            before = sum(map(len, arrays))
            arrays = trim(arrays, max_train_tokens)
            counts["num_cut_tokens"] = before - sum(map(len, arrays))
        offsets = np.cumsum([0, *map(len, arrays)])
        np.save(out_dir / f"{split}.tokens.npy", np.concatenate(arrays))
        np.save(out_dir / f"{split}.offsets.npy", offsets)
        counts[f"num_{split}_tokens"] = int(offsets[-1])
    (out_dir / "words.txt").write_text("\n".join(frequent_words(documents)) + "\n")
    names = [{"name": d.name, "held_out": d.is_held_out} for d in documents]
    (out_dir / "meta.json").write_text(json.dumps({**counts, "documents": names}, indent=1))
    return counts


def trim(arrays: list[np.ndarray], max_tokens: int) -> list[np.ndarray]:
    """Cut the same share off every array so that the total is at most ``max_tokens``."""
    share = min(1.0, max_tokens / sum(map(len, arrays)))
    return [a[: int(len(a) * share)] for a in arrays]


def _encode_document(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """Token ids, encoded line-aligned part by part (a whole 4 MB text costs gigabytes)."""
    encodings = tokenizer.encode_batch(list(_parts(text)), add_special_tokens=False)
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    return np.concatenate([np.array(e.ids, dtype) for e in encodings])


def _parts(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        stop = text.find("\n", start + _PART_CHARS) + 1 or len(text)
        while stop < len(text) and text[stop].isspace():
            stop = text.find("\n", stop) + 1 or len(text)
        yield text[start:stop]
        start = stop


def frequent_words(documents: Sequence[Document], limit: int = 12_000) -> list[str]:
    """Find the most frequent lower-case words of the training documents, sorted."""
    counter: Counter[str] = Counter()
    for document in documents:
        if not document.is_held_out:
            counter.update(_WORD.findall(document.text))
    return sorted(word for word, _ in counter.most_common(limit))


def sample_texts(documents: Sequence[Document], seed: int = 0) -> Iterator[str]:
    """60,000 characters from each 400,000 of the training documents, to train a tokenizer on."""
    rng = random.Random(seed)
    for document in documents:
        for _ in range(0 if document.is_held_out else max(1, len(document.text) // 400_000)):
            start = rng.randrange(max(1, len(document.text) - 60_000))
            yield document.text[start : start + 60_000]


class Corpus:
    """Random access to one split of a shard directory."""

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray, words: list[str]) -> None:
        self.tokens, self.offsets, self.words = tokens, offsets, words
        self._starts = offsets[:-1].tolist()
        self._lengths = np.diff(offsets).tolist()

    @classmethod
    def load(cls, directory: Path, split: str = "train") -> Corpus:
        """Memory-map one split."""
        path = directory / f"{split}.tokens.npy"
        if not path.is_file():
            raise LongspanError(f"no token shard {path}: write it first with write_shards")
        offsets = np.load(directory / f"{split}.offsets.npy")
        words = (directory / "words.txt").read_text().split()
        return cls(np.load(path, mmap_mode="r"), offsets, words)

    def span(self, rng: random.Random, max_tokens: int) -> np.ndarray:
        """Draw a random contiguous span of one document; documents weighted by length."""
        index = rng.choices(range(len(self._starts)), weights=self._lengths)[0]
        length = min(max_tokens, self._lengths[index])
        start = self._starts[index] + rng.randrange(self._lengths[index] - length + 1)
        return self.tokens[start : start + length]

    def stream(self, rng: random.Random, num_tokens: int, table: TokenTable) -> np.ndarray:
        """Exactly ``num_tokens`` of text: spans of 1..n documents joined at line starts, [T]."""
        pieces: list[np.ndarray] = []
        missing = num_tokens
        while missing > 0:
            low, high = np.log(MIN_SPAN), np.log(max(MIN_SPAN + 1, 2 * num_tokens))
            wanted = int(np.exp(rng.uniform(low, high)))
            piece = _cut_to_lines(self.span(rng, min(wanted, missing + 512)), table)
            pieces.append(piece[:missing])
            missing -= len(pieces[-1])
        return np.concatenate(pieces).astype(np.int64)


def _cut_to_lines(ids: np.ndarray, table: TokenTable) -> np.ndarray:
    """Drop what precedes the first and follows the last line start, when there are two."""
    starts = table.line_starts(ids) if len(ids) > 2 else np.zeros(0, np.int64)
    return ids[starts[0] : starts[-1]] if len(starts) > 1 else ids
