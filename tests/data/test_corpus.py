"""Shards: what is written is what is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from longspan.data.compose import template_texts
from longspan.data.corpus import Corpus, write_shards
from longspan.data.rows import compose_row, load_source
from longspan.data.sources import Document
from longspan.data.vocabulary import NOUNS
from longspan.errors import LongspanError
from longspan.train.tokenizer import save_tokenizer, train_tokenizer
from tests.data.conftest import make_text


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1024, np.uint16), (70_000, np.uint32)])
def test_tokens_survive_in_any_vocabulary(
    tmp_path: Path, vocab_size: int, dtype: type[np.generic]
) -> None:
    texts = [make_text(i, 700) for i in range(2)]
    tokenizer = train_tokenizer([*texts, *template_texts(list(NOUNS), 20)], 1024)
    tokenizer.add_tokens([f"<w{i}>" for i in range(1024, vocab_size)])
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    last = f"<w{vocab_size - 1}>"
    texts = [text.replace("apple", last) + f"{last}\n" for text in texts]
    write_shards([Document(name="a", text=texts[0], is_held_out=False),
                  Document(name="b", text=texts[1], is_held_out=True)],
                 tokenizer, tmp_path / "corpus")
    assert tokenizer.get_vocab_size() == vocab_size
    for split, text in zip(("train", "held_out"), texts, strict=True):
        corpus = Corpus.load(tmp_path / "corpus", split)
        assert corpus.tokens.dtype == dtype
        assert corpus.tokens.tolist() == tokenizer.encode(text).ids
    source = load_source(tmp_path)
    ids = np.concatenate([compose_row((0, i), source, 1024).ids for i in range(8)])
    assert ids.max() == vocab_size - 1


def test_a_split_without_documents_is_named(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["text"], 300)
    with pytest.raises(LongspanError, match="split held_out has no document"):
        write_shards([Document(name="a", text="x\n", is_held_out=False)], tokenizer, tmp_path)
