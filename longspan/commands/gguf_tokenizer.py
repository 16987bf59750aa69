"""The tokenizer of a GGUF file as Hugging Face files, through transformers' own conversion.

That conversion takes GPT-2's way of splitting text where it does not know the file's, leaves out
what llama.cpp has in its code instead of in the file, and says neither: both are put right here.
"""

from __future__ import annotations

from typing import Any

from tokenizers import normalizers, pre_tokenizers

from longspan.errors import CheckpointError
from longspan.model.gguf import GgufModel

CONTROL = 3
"""Token type in the file."""
LLAMA3_SPLITS = ("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "dbrx")
QWEN_SPLITS = ("qwen2", "deepseek-r1-qwen")
GPT2_SPLITS = ("gpt-2", "default")
SPLITS = (*LLAMA3_SPLITS, *QWEN_SPLITS, *GPT2_SPLITS, "tekken", "smollm")
"""Ways of splitting text (``tokenizer.ggml.pre``) that come out as the original's."""
WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3", "tekken")
"""A word that is a token is that token, whatever its merges; texts begin with a BOS."""
END_TEXTS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "</s>")
"""Control tokens that end an answer; the file names only one of them."""


def build_tokenizer(gguf: GgufModel) -> Any:
    """Build a transformers tokenizer. Raises `CheckpointError` for kinds that would not come out as
    the original."""
    from transformers import AutoTokenizer

    kind, split = (gguf.fields.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(f"{gguf.path}: tokenizer.ggml.model is {kind!r}, and only gpt2 (byte "
                              "pairs) and llama (SentencePiece) are supported")
    if kind == "gpt2" and split not in SPLITS:
        raise CheckpointError(f"{gguf.path}: tokenizer.ggml.pre is {split!r}, which is not "
                              f"supported; supported: {', '.join(SPLITS)}")
    begins = {} if "tokenizer.ggml.add_bos_token" in gguf.fields else {
        "add_bos_token": kind == "llama" or split in WHOLE_WORDS_FIRST}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(gguf.path.parent), gguf_file=gguf.path.name, local_files_only=True, **begins)
    except (ValueError, KeyError, IndexError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{gguf.path}: its tokenizer cannot be rebuilt ({reason})") from None
    if kind == "gpt2":
        _complete(tokenizer.backend_tokenizer, split)
    return tokenizer


def end_ids(gguf: GgufModel) -> list[int]:
    """Tokens that end an answer, the file's own first."""
    texts = gguf.fields.get("tokenizer.ggml.tokens") or []
    types = gguf.fields.get("tokenizer.ggml.token_type") or []
    named = [gguf.fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    known = [idx for idx, (text, kind) in enumerate(zip(texts, types, strict=False))
             if kind == CONTROL and text in END_TEXTS]
    return list(dict.fromkeys(idx for idx in (*named, *known) if idx is not None))


def _complete(backend: Any, split: Any) -> None:
    if split == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    if split == "qwen2":
        backend.normalizer = normalizers.NFC()
    if split in WHOLE_WORDS_FIRST:
        backend.model.ignore_merges = True
