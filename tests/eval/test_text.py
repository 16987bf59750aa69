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
from longspan.eval.prompt import Frame, Materials, Prompt, fit_ending, insert_at, open_prompt
from longspan.eval.tasks.passkey import passkey_haystack
from longspan.eval.text import (
    HELD_OUT_PACKAGES,
    Encoder,
    Piece,
    TextBank,
    find_texts,
    held_out_roots,
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
    pieces = bank.take(random.Random(0), 500)
    ids = [token for piece in pieces for token in piece.ids]
    assert len(ids) >= 500
    assert tokenizer.encode("".join(piece.text for piece in pieces)) == ids


def test_a_document_holds_no_begin_of_text(tmp_path: Path) -> None:
    """Neither do whole prompts, but for what the chat template writes."""
    nano = tmp_path / "nano"
    shutil.copytree(Path(longspan.__file__).parent / "nano", nano)
    begin_texts_with(nano, "<|endoftext|>", 4093)
    tokenizer = Tokenizer(nano)
    bank = TextBank.from_roots(ROOTS, tokenizer)
    assert not any(4093 in piece.ids for piece in bank.take(random.Random(0), 3000))
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
    ending = fit_ending(Encoder(tokenizer), text, tail, num_tokens)
    assert len(tokenizer.encode(ending + tail)) == num_tokens


def test_an_ending_that_cannot_be_made(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(LongspanError, match="exactly 3 tokens"):
        fit_ending(Encoder(tokenizer), "some words", "\n\nWhat is it?", 3)


def test_the_frame_of_the_chat_template(tokenizer: ChatTokenizer) -> None:
    frame = Frame.chat(tokenizer)
    assert (frame.before, frame.after) == (
        "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
    assert Frame.chat(ChatTokenizer(tokenizer.backend, before="User:")).before == "User:\n"

    class Deaf(ChatTokenizer):
        def render_chat(self, messages: object) -> str:
            return "nothing"

    with pytest.raises(LongspanError, match="leaves the user's message out"):
        Frame.chat(Deaf(tokenizer.backend))


@pytest.mark.parametrize(("place", "tail", "message"), [
    ("assistant", "Q?</u> A:", None), ("user", "Q? A:</u>", "text Q? A:"),
    ("none", "Q?</u>", "text Q?")])
def test_where_the_beginning_of_the_answer_goes(
    tokenizer: ChatTokenizer, place: str, tail: str, message: str | None
) -> None:
    frame = Frame("<u>", "</u>", place)
    assert frame.tail("Q?", " A:") == tail
    if message is not None:
        prompt = Prompt([Encoder(tokenizer).piece("<u>text " + tail)], frame)
        assert prompt.message == message


class WithBos(ChatTokenizer):
    """Puts a token in front of plain prompts, as Llama's tokenizers do."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [7] * add_special_tokens + super().encode(text)


def test_a_beginning_of_text_token_stands_once_and_only_in_plain_prompts(
    tokenizer: ChatTokenizer
) -> None:
    bos = WithBos(tokenizer.backend)
    bank = TextBank.from_roots(ROOTS, bos)
    pieces = bank.take(random.Random(0), 200)
    for frame, count in ((Frame("", ""), 1), (Frame.chat(bos), 0)):
        materials = Materials(encoder=Encoder(bos), bank=bank, frame=frame)
        prompt = Prompt([*open_prompt(materials, "Text.\n"), *pieces], frame)
        assert list(prompt.ids)[:1] == [7] * count or not count
        assert list(prompt.ids)[count:] == tokenizer.encode(prompt.text)
        prompt.check(Encoder(bos))


def test_tokens_that_are_not_those_of_the_text_are_told(tokenizer: ChatTokenizer) -> None:
    encoder = Encoder(tokenizer)
    with pytest.raises(LongspanError, match="joins what the prompts are put together from"):
        Prompt([encoder.piece("retu"), encoder.piece("rn self")], Frame("", "")).check(encoder)


def piece(text: str, *ids: int) -> Piece:
    return Piece(text, np.array(ids))


def test_items_stand_at_the_border_nearest_to_their_depth() -> None:
    document = [piece("a", 0, 1, 2), piece("b", 3, 4, 5)]
    items = [(1.0, piece("x", 101)), (0.0, piece("y", 102)), (0.55, piece("z", 103, 104))]
    pieces, places = insert_at(document, items)
    assert [int(token) for part in pieces for token in part.ids] == [
        102, 0, 1, 2, 103, 104, 3, 4, 5, 101]
    assert places == [9, 0, 4]


def test_default_haystacks_are_not_what_nano_read() -> None:
    roots = held_out_roots()
    assert {root.name for root in roots} <= set(HELD_OUT_PACKAGES) and len(roots) > 3
    # what nano/README.md names as training text
    assert not {"networkx", "sympy", "transformers", "torch", "numpy", "pydantic", "fsspec",
                "huggingface_hub", "accelerate"} & set(HELD_OUT_PACKAGES)
    size = sum(file.stat().st_size for root in roots for file in find_texts(root))
    assert size > 4_000_000, "a million tokens without repeating"
