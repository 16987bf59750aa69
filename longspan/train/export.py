"""A trained model as a Hugging Face checkpoint that transformers 4.5x and 5.x both load."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2ForCausalLM

MAX_POSITIONS = 1_010_000
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def dual_chunk_config(trained_len: int) -> dict[str, int]:
    """Qwen2.5-1M's key: DCA chunk = trained length, 1/32 of it as local window."""
    return {
        "chunk_size": trained_len,
        "local_size": trained_len // 32,
        "original_max_position_embeddings": trained_len,
    }


def config_json(
    model: Qwen2ForCausalLM, rope_theta: float, trained_len: int, special: dict[str, int]
) -> dict[str, Any]:
    """config.json as released Qwen2.5-1M checkpoints have it, plus transformers 5's RoPE key.

    `use_cache` is set: trainers leave it false, which silently makes generation quadratic.
    """
    c = model.config
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "vocab_size": c.vocab_size,
        "rms_norm_eps": c.rms_norm_eps,
        "initializer_range": c.initializer_range,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_position_embeddings": MAX_POSITIONS,
        "rope_theta": float(rope_theta),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(rope_theta)},
        "dual_chunk_attention_config": dual_chunk_config(trained_len),
        "bos_token_id": special["<|endoftext|>"],
        "eos_token_id": special["<|im_end|>"],
        "pad_token_id": special["<|endoftext|>"],
        "use_cache": True,
        "torch_dtype": "bfloat16",
    }


def export_model(
    model: Qwen2ForCausalLM,
    tokenizer_dir: Path,
    out_dir: Path,
    *,
    rope_theta: float,
    trained_len: int,
    max_shard_size: str = "1GB",
) -> None:
    """Writes bf16 safetensors, config, generation config and tokenizer files to `out_dir`."""
    out_dir.mkdir(parents=True, exist_ok=True)
    vocabulary = json.loads((tokenizer_dir / "tokenizer.json").read_text())["added_tokens"]
    special = {token["content"]: token["id"] for token in vocabulary}
    config = config_json(model, rope_theta, trained_len, special)
    shipped = copy.deepcopy(model)
    torch.nn.Module.to(shipped, "cpu", torch.bfloat16)
    shipped.save_pretrained(out_dir, max_shard_size=max_shard_size)
    generation = {
        "bos_token_id": special["<|endoftext|>"],
        "pad_token_id": special["<|endoftext|>"],
        "eos_token_id": [special["<|im_end|>"], special["<|endoftext|>"]],
        "do_sample": False,
    }
    (out_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out_dir / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer_dir / name, out_dir / name)


def merge_shards(shard_dir: Path, out_file: Path) -> int:
    """Joins all safetensors of a directory into one file; returns the number of tensors."""
    files = sorted(shard_dir.glob("*.safetensors"))
    if not files:
        raise ValueError(f"no .safetensors file in {shard_dir}: export the model there first")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors.update(load_file(file))
    save_file(tensors, out_file, metadata={"format": "pt"})
    return len(tensors)
