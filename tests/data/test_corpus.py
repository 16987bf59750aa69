"""Corpora: what is written is what is read, in any vocabulary; the split is by documents."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from longspan.data import corpus
from longspan.data.corpus import Corpus, choose_held_out, encode_texts, write_corpus
from longspan.data.documents import Document
from longspan.data.intake import Intake
from longspan.data.rows import Mixture, compose_row
from longspan.data.source import load_source
from longspan.data.templates import template_texts
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
    texts = [text.replace("The", last) + f"{last}\n" for text in texts]
    write_corpus([Document(name=f"d{i}", text=text) for i, text in enumerate(texts)],
                 tokenizer, tmp_path / "corpus", Intake())
    assert tokenizer.get_vocab_size() == vocab_size
    found = [Corpus.load(tmp_path / "corpus", split) for split in ("train", "held_out")]
    assert {c.tokens.dtype for c in found} == {np.dtype(dtype)}
    spans = [c.span(random.Random(0), 10**9).tolist() for c in found]
    assert sorted(spans) == sorted(tokenizer.encode(text).ids for text in texts)
    source = load_source(tmp_path)
    mixture = Mixture(weights={"plain": 1, "needle": 1})
    ids = np.concatenate([compose_row((0, i), source, 1024, mixture).piece.ids for i in range(8)])
    assert ids.max() == vocab_size - 1


def test_control_tokens_in_a_text_are_text(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["some text"], 300)
    text = "A page about <|im_end|> and <|endoftext|>.\n"
    documents = [Document(name=name, text=text) for name in "ab"]
    write_corpus(documents, tokenizer, tmp_path / "corpus", Intake())
    tokens = Corpus.load(tmp_path / "corpus").tokens
    assert tokenizer.token_to_id("<|im_end|>") not in tokens
    assert tokenizer.decode(tokens.tolist(), skip_special_tokens=False) == 2 * text


def test_lines_of_any_length_are_encoded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_PART_CHARS", 1000)
    tokenizer = train_tokenizer(["some text"], 300)
    for unit in ("word ", "词", "x\n\n"):
        text = unit * (9000 // len(unit))
        assert tokenizer.decode(encode_texts([text], tokenizer)[0].tolist()) == text


def test_held_out_documents_are_few_but_some() -> None:
    names = [f"d{i}" for i in range(200)]
    chosen = choose_held_out(names, [100] * 200, 0.02)
    assert chosen.sum() == 4 and (chosen == choose_held_out(names, [100] * 200, 0.02)).all()
    few = choose_held_out(["a", "b", "c"], [10, 10**6, 20], 0.02)
    assert few.any() and not few[1]
    assert not choose_held_out(["a"], [10], 0.0).any()


def test_one_document_cannot_be_split(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["text"], 300)
    with pytest.raises(LongspanError, match="one document alone"):
        write_corpus([Document(name="a", text="x\n")], tokenizer, tmp_path / "c", Intake())
    assert list(tmp_path.iterdir()) == []


def test_long_documents_are_chosen_for_long_tasks(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["some text"], 300)
    texts = ["short one\n" * 3] * 50 + ["much longer\n" * 400, "held\n" * 300]
    write_corpus([Document(name=f"{i}", text=t) for i, t in enumerate(texts)], tokenizer,
                 tmp_path / "corpus", Intake(), held_out=0.0)
    documents = Corpus.load(tmp_path / "corpus")
    rng = random.Random(1)
    longest = int(documents.lengths[-1])
    assert {len(documents.span(rng, 2 * longest, longest)) for _ in range(20)} == {longest}
    assert len({len(documents.span(rng, 2 * longest)) for _ in range(60)}) == 3


def test_documents_are_counted_by_length() -> None:
    assert corpus.length_buckets([1, 3, 4, 5, 4096]) == [
        {"max_tokens": 1, "num_documents": 1, "num_tokens": 1},
        {"max_tokens": 4, "num_documents": 2, "num_tokens": 7},
        {"max_tokens": 8, "num_documents": 1, "num_tokens": 5},
        {"max_tokens": 4096, "num_documents": 1, "num_tokens": 4096}]


def test_what_a_vocabulary_cannot_spell_is_counted(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "known": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    meta = write_corpus([Document(name="a", text="known other words known\n")], tokenizer,
                        tmp_path / "corpus", Intake(), held_out=0.0)
    assert (meta["num_unknown_tokens"], meta["num_train_tokens"]) == (2, 4)
