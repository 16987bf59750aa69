"""A small BPE tokenizer with Qwen2's pre-tokenizer, and a bank of texts of this machine."""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from longspan.eval.prompt import Frame, Materials
from longspan.eval.text import Encoder, TextBank

STDLIB = Path(sysconfig.get_paths()["stdlib"])
ROOTS = (STDLIB / "json", STDLIB / "email", STDLIB / "logging")
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class ChatTokenizer:
    """What the evaluation asks of a tokenizer, on a `tokenizers` object."""

    def __init__(self, backend: Tokenizer, before: str = "<|im_start|>user\n") -> None:
        self.backend, self.before = backend, before

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(self.backend.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.backend.decode(list(ids), skip_special_tokens=False))

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        return f"{self.before}{messages[0]['content']}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="session")
def tokenizer() -> ChatTokenizer:
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    texts = [file.read_text() for file in sorted(ROOTS[0].glob("*.py"))]
    backend.train_from_iterator(texts, BpeTrainer(
        vocab_size=1200, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    backend.add_special_tokens([AddedToken(text, special=True)
                                for text in ("<|im_start|>", "<|im_end|>")])
    return ChatTokenizer(backend)


@pytest.fixture(scope="session")
def bank(tokenizer: ChatTokenizer) -> TextBank:
    return TextBank.from_roots(ROOTS, tokenizer)


@pytest.fixture(scope="session")
def materials(tokenizer: ChatTokenizer, bank: TextBank) -> Materials:
    """The bank in the tokenizer's chat template."""
    return Materials(encoder=Encoder(tokenizer), bank=bank, frame=Frame.chat(tokenizer))
