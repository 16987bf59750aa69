"""Work on text that a front end does on its helper threads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from longspan.engine.intake import as_token_ids, default_sampling
from longspan.engine.text.tokenizer import Tokenizer, load_tokenizer


def load_text(path: Path, vocab_size: int) -> tuple[Tokenizer, dict[str, float]]:
    """Load a checkpoint's tokenizer, and the sampling fields that it recommends."""
    tokenizer = load_tokenizer(path, vocab_size)
    tokenizer.prepare_chat()
    return tokenizer, default_sampling(path)


def decode(tokenizer: Tokenizer, token_ids: Sequence[int], with_special: bool) -> str:
    """Decode token ids, which are checked."""
    checked = as_token_ids(token_ids, tokenizer.vocab_size) if len(token_ids) else ()
    return tokenizer.decode(checked, with_special=with_special)
