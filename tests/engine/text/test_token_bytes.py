"""Tokens as bytes: GPT-2's alphabet, SentencePiece with byte fallback, added tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

import longspan
from longspan.engine.step import RowLogprobs
from longspan.engine.text.token_bytes import BYTE_OF_CHAR, TokenBytes
from longspan.engine.text.tokenizer import Tokenizer
from tests.doubles import write_tokenizer

TEXT = 'Grüße, "Welt"\n 漢字 🙂 <end>'


def test_the_alphabet_is_that_of_the_library() -> None:
    from tokenizers import pre_tokenizers

    assert set(BYTE_OF_CHAR) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTE_OF_CHAR.values()) == list(range(256))


def test_bytes_of_a_text_add_up(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    for path in (tmp_path, Path(longspan.__file__).parent / "nano"):
        tokenizer = Tokenizer(path)
        look_up = TokenBytes(tokenizer)
        assert b"".join(map(look_up.of, tokenizer.encode(TEXT))).decode() == TEXT


@pytest.mark.parametrize(("piece", "data"), [
    ("\u2581the", b" the"), ("<0xE2>", b"\xe2"), ("ö", "ö".encode()), ("<s>", b"<s>")])
def test_sentencepiece(tmp_path: Path, piece: str, data: bytes) -> None:
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as Backend

    vocab = {"<unk>": 0, "\u2581the": 1, "<0xE2>": 2, "ö": 3}
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    backend.save(str(tmp_path / "tokenizer.json"))
    token_id = backend.token_to_id(piece)
    assert token_id is not None and TokenBytes(Tokenizer(tmp_path)).of(token_id) == data


def test_padding_of_the_vocabulary_is_nothing(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    assert TokenBytes(Tokenizer(tmp_path)).of(100_000) == b""


def test_half_a_character_is_told_by_its_bytes(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    token, other = tokenizer.encode("é")
    found = TokenBytes(tokenizer).describe(token, RowLogprobs(-0.5, (other,), (-1.0,)))
    assert (found.text, found.data) == ("\ufffd", b"\xc3")
    assert (found.logprob, found.token_id) == (-0.5, token)
    assert [(item.data, item.logprob, item.top) for item in found.top] == [(b"\xa9", -1.0, ())]
