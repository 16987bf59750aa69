"""A small corpus and tokenizer shared by the data tests."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from longspan.data.corpus import write_corpus
from longspan.data.documents import Document
from longspan.data.intake import Intake
from longspan.data.source import Source, load_source
from longspan.data.templates import template_texts
from longspan.data.vocabulary import ADJECTIVES, NOUNS
from longspan.train.tokenizer import save_tokenizer, train_tokenizer


def make_text(seed: int, num_lines: int) -> str:
    """Code-like and prose-like lines with blank lines and indentation."""
    rng = random.Random(seed)
    lines = []
    for _ in range(num_lines):
        words = [rng.choice(ADJECTIVES + NOUNS) for _ in range(rng.randrange(3, 9))]
        style = rng.randrange(4)
        if style == 0:
            lines.append(f"def {'_'.join(words[:2])}({words[2]}):\n    return {len(words)}\n")
        elif style == 1:
            lines.append(f"The {' '.join(words)}. A {words[0]} {words[1]}.")
        elif style == 2:
            lines.append("")
        else:
            lines.append("    " + ", ".join(words))
    return "\n".join(lines).strip() + "\n"


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory: ``corpus`` shards and ``tokenizer``."""
    directory = tmp_path_factory.mktemp("data")
    documents = [Document(name=f"d{i}", text=make_text(i, 700)) for i in range(5)]
    texts = [d.text for d in documents] + template_texts(list(NOUNS), 40)
    tokenizer = train_tokenizer(texts, 1024)
    save_tokenizer(tokenizer, directory / "tokenizer")
    write_corpus(documents, tokenizer, directory / "corpus", Intake())
    return directory


@pytest.fixture(scope="session")
def source(data_dir: Path) -> Source:
    """The training split."""
    return load_source(data_dir)
