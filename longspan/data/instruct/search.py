"""BM25 over the parts of one document (bm25s); words of any language."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from longspan.documents.words import words
from longspan.errors import MissingDependencyError


class Index:
    """Finds the parts of a document that words stand in. Raises `MissingDependencyError`."""

    def __init__(self, texts: Sequence[str]) -> None:
        try:
            import bm25s
        except ImportError:
            raise MissingDependencyError(
                "documents are searched with bm25s, which is not installed: "
                "pip install 'longspan[synth]'") from None
        self._num_texts = len(texts)
        self._ranking: Any = bm25s.BM25()
        self._known = set[str]()
        tokens = [words(text) for text in texts]
        for found in tokens:
            self._known.update(found)
        if self._known:
            self._ranking.index(tokens, show_progress=False)

    def best(self, query: str) -> list[int]:
        """Return the parts that have any word of a query, the most relevant one first."""
        asked = [word for word in words(query) if word in self._known]
        if not asked:
            return []
        scores = self._ranking.get_scores(asked)
        order = np.argsort(-scores, kind="stable")
        return [int(i) for i in order if scores[i] > 0]
