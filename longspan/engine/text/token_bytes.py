"""Single tokens as bytes: log-probabilities name tokens one by one, and a token may be half a
character. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from longspan.engine.request import PromptLogprobs, TokenLogprob
from longspan.engine.step import RowLogprobs
from longspan.engine.text.tokenizer import Tokenizer

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
WORD_START = "\u2581"
"""Character for a space in SentencePiece vocabularies."""


class TokenBytes:
    """Looks tokens up in a tokenizer's vocabulary.

    Two kinds of vocabulary are known: bytes written as printable characters (GPT-2's, Qwen's), and
    SentencePiece's with byte fallback (Llama's, Mistral's). Tokens of any other are their own text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._is_byte_level = "ByteLevel" in tokenizer.decoder_kinds

    def of(self, token_id: int) -> bytes:
        """Return a token's bytes; none for ids without a token (padding of the vocabulary)."""
        piece = self._tokenizer.piece(token_id)
        if piece is None:
            return b""
        if token_id in self._tokenizer.added_tokens:
            return piece.encode()
        if self._is_byte_level and all(char in BYTE_OF_CHAR for char in piece):
            return bytes(BYTE_OF_CHAR[char] for char in piece)
        byte = BYTE_TOKEN.fullmatch(piece)
        if byte is not None:
            return bytes([int(byte[1], 16)])
        return piece.replace(WORD_START, " ").encode()

    def describe(self, token_id: int, found: RowLogprobs) -> TokenLogprob:
        """Describe a sampled token for callers."""
        top = zip(found.top_ids, found.top_logprobs, strict=True)
        return self._describe(token_id, found.logprob, [
            self._describe(other, logprob) for other, logprob in top])

    def describe_all(
        self, token_ids: Sequence[int], found: PromptLogprobs
    ) -> list[TokenLogprob]:
        """Return what callers get of a prompt's tokens."""
        rows = zip(token_ids, found.logprobs.tolist(), found.top_ids.tolist(),
                   found.top_logprobs.tolist(), strict=True)
        return [self.describe(token, RowLogprobs(logprob, tuple(ids), tuple(top)))
                if logprob == logprob else self._describe(token, logprob)  # NaN: none
                for token, logprob, ids, top in rows]

    def _describe(
        self, token_id: int, logprob: float, top: Sequence[TokenLogprob] = ()
    ) -> TokenLogprob:
        data = self.of(token_id)
        return TokenLogprob(token_id=token_id, text=data.decode(errors="replace"), data=data,
                            logprob=logprob, top=tuple(top))


def _byte_of_char() -> dict[str, int]:
    """Return GPT-2's alphabet: printable bytes as themselves, the others from character 256."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)}


BYTE_OF_CHAR = _byte_of_char()
