"""What rows are made of: one split of a corpus and the tokenizer's table."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from longspan.data.corpus import Corpus
from longspan.data.tokens import TokenTable

Option = TypeVar("Option")


@dataclass(frozen=True, slots=True)
class Source:
    """One split of a corpus, with the tokenizer's table."""

    corpus: Corpus
    table: TokenTable
    is_held_out: bool = False
    """Held-out rows are worded as no training row is."""
    may_join: bool = True
    """Whether a task may read several documents as one where each is too short."""

    def document(self, rng: random.Random, room: int) -> np.ndarray:
        """Return a document of about ``room`` tokens, at most as many, [T]."""
        return self.corpus.document(rng, room, self.table, self.may_join)

    def wordings(self, options: Sequence[Option]) -> Sequence[Option]:
        """Return the wordings of this split: of five and more every fifth is only for held-out
        rows."""
        if len(options) < 5:
            return options
        return [option for i, option in enumerate(options) if (i % 5 == 4) == self.is_held_out]


def load_source(data_dir: Path, split: str = "train") -> Source:
    """Corpus split and token table of a folder that has ``corpus`` and ``tokenizer``."""
    table = TokenTable.load(data_dir / "tokenizer")
    return Source(Corpus.load(data_dir / "corpus", split), table, split == "held_out")
