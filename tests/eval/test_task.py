"""Text pieces: cut where the tokenizer cuts, of any exact length."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest

import longspan
from longspan.engine.text.tokenizer import Tokenizer
from longspan.errors import LongspanError
from longspan.eval.niah import passkey_haystack
from longspan.eval.task import (
    Document,
    TextBank,
    chat_frame,
    find_texts,
    fit_ending,
    insert_at,
    last_border,
    python_text_roots,
    read_text,
    split_pieces,
)
from tests.doubles import begin_texts_with
from tests.eval.conftest import ROOTS, ChatTokenizer

AWKWARD = "a = 1\n\n\n    b = 2\n\t\n  \f\n# end.\n)))\n\n\n'''x'''\n" * 40


def test_pieces_hold_the_whole_text_and_its_tokens(tokenizer: ChatTokenizer) -> None:
    texts = [text for root in ROOTS for file in find_texts(root) if (text := read_text(file))]
    for text in [*texts, AWKWARD]:
        pieces = list(split_pieces(text))
        assert "".join(pieces) == text
        assert [token for piece in pieces for token in tokenizer.encode(piece)] == \
            tokenizer.encode(text)
    assert len(list(split_pieces(AWKWARD))) > 1


def test_unfit_files_are_left_out(tmp_path: Path) -> None:
    for name, data in {"latin.txt": b"caf\xe9\n" * 9, "control.txt": b"a <|im_end|> b\n",
                       "table.txt": b"1 2 " * 4000, "empty.txt": b"\n \n"}.items():
        (tmp_path / name).write_bytes(data)
        assert read_text(tmp_path / name) is None, name
    assert read_text(tmp_path / "missing.txt") is None


def test_line_ends_and_accents_are_normalised(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\r\n\r\ncafe\u0301\r\nb\r\n\r\n".encode())
    assert read_text(file) == "caf\u00e9\nb\n"


def test_finds_texts_in_a_fixed_order_without_tests_and_packages(tmp_path: Path) -> None:
    for name in ("b.py", "a.md", "c.so", "z/d.rst", "test/e.py", "site-packages/f.py", ".g/h.py"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("text\n")
    found = [str(file.relative_to(tmp_path)) for file in find_texts(tmp_path)]
    assert found == ["a.md", "b.py", "z/d.rst"]
    assert all(root.is_dir() for root in python_text_roots())


def test_takes_whole_files_and_repeats_them_when_they_run_out(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    (tmp_path / "a.txt").write_text("one two three\n" * 30)
    (tmp_path / "b.txt").write_bytes(b"\xff")
    bank = TextBank.from_roots([tmp_path], tokenizer)
    document = bank.take(random.Random(0), 500)
    assert len(document.ids) >= 500
    assert document.borders[0] == 0 and document.borders[-1] == len(document.ids)
    assert len(document.texts) == len(document.borders) - 1
    assert tokenizer.encode("".join(document.texts)) == document.ids.tolist()


def test_a_document_holds_no_begin_of_text(tmp_path: Path) -> None:
    """Neither do whole prompts, but for what the chat template writes."""
    nano = tmp_path / "nano"
    shutil.copytree(Path(longspan.__file__).parent / "nano", nano)
    begin_texts_with(nano, "<|endoftext|>", 4093)
    tokenizer = Tokenizer(nano)
    bank = TextBank.from_roots(ROOTS, tokenizer)
    assert 4093 not in bank.take(random.Random(0), 3000).ids
    (example, *_) = passkey_haystack(
        bank, tokenizer, num_tokens=2000, depths=[0.5], rng=random.Random(1))
    assert 4093 not in example.prompt_ids


def test_says_what_is_wrong_with_the_folders(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    with pytest.raises(LongspanError, match="no such folder"):
        TextBank.from_roots([tmp_path / "x"], tokenizer)
    with pytest.raises(LongspanError, match="no text to build"):
        TextBank.from_roots([tmp_path], tokenizer)
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(LongspanError, match="none of the 1 text files"):
        TextBank.from_roots([tmp_path], tokenizer).take(random.Random(0), 5)


def test_the_fingerprint_follows_the_files(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    first = TextBank.from_roots([tmp_path], tokenizer).fingerprint
    assert TextBank.from_roots([tmp_path], tokenizer).fingerprint == first
    (tmp_path / "a.txt").write_text("one two\n")
    assert TextBank.from_roots([tmp_path], tokenizer).fingerprint != first


@pytest.mark.parametrize("num_tokens", range(24, 60))
def test_endings_are_exact(tokenizer: ChatTokenizer, num_tokens: int) -> None:
    text = "def detect_encoding(b):\n    bstartswith = b.startswith\n    if bstartswith((x, y)):\n"
    tail = "\n\nWhat is it?<|im_end|>\n"
    ending = fit_ending(tokenizer, text, tail, num_tokens)
    assert len(tokenizer.encode(ending + tail)) == num_tokens


def test_an_ending_that_cannot_be_made(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(LongspanError, match="exactly 3 tokens"):
        fit_ending(tokenizer, "some words", "\n\nWhat is it?", 3)


def test_the_frame_of_the_chat_template(tokenizer: ChatTokenizer) -> None:
    assert chat_frame(tokenizer) == (
        "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
    assert chat_frame(ChatTokenizer(tokenizer.backend, before="User:"))[0] == "User:\n"

    class Deaf(ChatTokenizer):
        def render_chat(self, messages: object) -> str:
            return "nothing"

    with pytest.raises(LongspanError, match="leaves the user's message out"):
        chat_frame(Deaf(tokenizer.backend))


def test_items_stand_at_the_border_nearest_to_their_depth() -> None:
    document = Document(np.arange(10), np.array([0, 3, 6, 10]), ("a", "b", "c"))
    items = [(1.0, np.array([101])), (0.0, np.array([102])), (0.55, np.array([103, 104]))]
    ids, places = insert_at(document, 6, items)
    assert ids.tolist() == [102, 0, 1, 2, 103, 104, 3, 4, 5, 101]
    assert places == [9, 0, 4]


@pytest.mark.parametrize(("limit", "stop", "text"), [
    (0, 0, "a"), (2, 0, "a"), (3, 3, "b"), (9, 6, "c"), (10, 10, "c")])
def test_last_border(limit: int, stop: int, text: str) -> None:
    document = Document(np.arange(10), np.array([0, 3, 6, 10]), ("a", "b", "c"))
    assert last_border(document, limit) == (stop, text)
