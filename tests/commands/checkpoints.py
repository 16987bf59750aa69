"""A small checkpoint that is not ours, and text to train it on."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from longspan.train.tokenizer import save_tokenizer, train_tokenizer
from tests.data.conftest import make_text

VOCAB = 65_664
"""Above what 16 bits hold, as few do."""


def make_text_folder(folder: Path, count: int) -> None:
    """``count`` files of a few hundred tokens each."""
    folder.mkdir(parents=True)
    for i in range(count):
        (folder / f"{i:03}.txt").write_text(make_text(i, 12 + i % 9))


def make_checkpoint(folder: Path, *, vocab_size: int = VOCAB, max_positions: int = 256) -> Path:
    """Llama shape: untied head, biases everywhere, head_dim unlike hidden/heads, a vocabulary above
    65,536."""
    tokenizer: Tokenizer = train_tokenizer([make_text(i, 200) for i in range(4)], 700)
    tokenizer.add_tokens([f"<w{i}>" for i in range(700, vocab_size)])
    save_tokenizer(tokenizer, folder)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, attention_bias=True,
        mlp_bias=True, tie_word_embeddings=False, max_position_embeddings=max_positions,
        rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        bos_token_id=None, eos_token_id=tokenizer.token_to_id("<|im_end|>"))
    model = LlamaForCausalLM(config)
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(folder)
    return folder
