"""Text without lines, in characters of several tokens each: nothing is cut inside a character."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from longspan.data.corpus import write_corpus
from longspan.data.documents import Document
from longspan.data.gate_documents import gate_documents
from longspan.data.intake import Intake
from longspan.data.rows import Mixture, compose_row
from longspan.data.source import Source, load_source
from longspan.data.tasks import TASKS
from longspan.data.tasks.needles import FOCI
from longspan.data.tokens import TokenTable, begins_character
from longspan.train.tokenizer import save_tokenizer, train_tokenizer

CHARACTERS = [chr(code) for code in range(0x4E00, 0x5400)]


@pytest.fixture(scope="module")
def chinese(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Documents of one line each, and a tokenizer that spells them byte by byte."""
    folder = tmp_path_factory.mktemp("chinese")
    tokenizer = train_tokenizer(["some English text"], 300)
    save_tokenizer(tokenizer, folder / "tokenizer")
    rng = random.Random(1)
    texts = ["".join("".join(rng.choices(CHARACTERS, k=rng.randrange(4, 12))) + rng.choice("，。！")
                     for _ in range(900)) + "\n" for _ in range(3)]
    write_corpus([Document(name=str(i), text=text) for i, text in enumerate(texts)], tokenizer,
                 folder / "corpus", Intake())
    return load_source(folder)


@pytest.mark.parametrize("name", sorted(set(TASKS) - {"plain"}))
def test_no_character_is_cut(chinese: Source, name: str) -> None:
    """But for the first one of a sample, where surplus text is cut off."""
    for seed in range(4):
        row = compose_row((seed,), chinese, 3000, Mixture(weights={name: 1}, packed=0.0))
        assert row.task == name
        text = chinese.table.text(row.piece.ids)
        assert not re.search(r"(?<!<\|endoftext\|>)(?<!\n)(?<!\ufffd)(?<!^)\ufffd", text)
        for answer in row.answers:
            assert "\ufffd" not in chinese.table.text(row.piece.ids[answer.start : answer.stop])


@pytest.mark.parametrize("name", sorted(FOCI))
def test_facts_and_questions_have_lines_of_their_own(chinese: Source, name: str) -> None:
    for seed in range(4):
        row = compose_row((seed,), chinese, 3000, Mixture(weights={name: 1}, packed=0.0))
        text = chinese.table.text(row.piece.ids)
        for line in text.split("\n")[1:]:
            for begin in ("Question:", "One of the special magic", "A secret "):
                assert begin not in line or line.lstrip().startswith(begin)


@pytest.mark.parametrize("number_first", [False, True])
def test_gates_have_room_for_words_of_many_tokens(
    tmp_path: Path, number_first: bool
) -> None:
    """A gate that has none would end a run behind its first phase, whenever it is resumed."""
    rng = random.Random(2)
    tokenizer = train_tokenizer(["some English text"], 300)
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    texts = ["".join("".join(rng.choices(CHARACTERS, k=rng.randrange(4, 12))) + "。\n"
                     for _ in range(1000)) for _ in range(2)]
    write_corpus([Document(name=str(i), text=text) for i, text in enumerate(texts)], tokenizer,
                 tmp_path / "corpus", Intake())
    documents = list(gate_documents(
        load_source(tmp_path), 4096, 4, 24, number_first=number_first))
    assert [len(questions) for _, questions in documents] == [24] * 4
    assert all(len(document) <= 4096 for document, _ in documents)


def test_where_characters_begin() -> None:
    tokenizer = train_tokenizer(["text"], 300)
    ids = tokenizer.encode("a国é").ids
    found = [begins_character(tokenizer.id_to_token(i), tokenizer.decode([i])) for i in ids]
    assert found == [True, True, False, False, True, False]
    assert [begins_character(f"<0x{byte:02X}>", "\ufffd") for byte in (0xE4, 0xBD, 0xC3)] == [
        True, False, True]


def test_blank_lines_before_chat_questions_where_line_ends_stay_apart(source: Source) -> None:
    """A vocabulary that spells a blank line with two tokens."""
    table = TokenTable(source.table.tokenizer)
    assert (table.with_newline >= 0).any()
    table.with_newline[:] = -1
    own = replace(source, table=table)
    num_asked = 0
    for seed in range(6):
        row = compose_row((seed,), own, 1500, Mixture(weights={"needle": 1}, packed=0.0))
        text = own.table.text(row.piece.ids)
        parts = text.split("<|im_end|>\n<|im_start|>assistant\n")[:-1]
        asked = [part for part in parts if "<|im_start|>user\n" not in part[-400:]]
        num_asked += len(asked)
        assert all("\n\n" in part[-400:] for part in asked)
    assert num_asked > 0
