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

from longspan.errors import LongspanError
from longspan.train.files import replaced_checkpoint

MAX_POSITIONS = 1_010_000
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TEXT_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)


def dual_chunk_config(trained_len: int) -> dict[str, int]:
    """Qwen2.5-1M's key: DCA chunk = trained length, 1/32 of it as local window."""
    return {
        "chunk_size": trained_len, "local_size": trained_len // 32,
        "original_max_position_embeddings": trained_len}


def config_json(
    model: Qwen2ForCausalLM, rope_theta: float, trained_len: int, special: dict[str, int]
) -> dict[str, Any]:
    """config.json as released Qwen2.5-1M checkpoints have it, plus transformers 5's RoPE key.

    ``use_cache`` is set: trainers leave it false, which silently makes generation quadratic.
    """
    c = model.config
    return {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
        "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers, "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads, "vocab_size": c.vocab_size,
        "rms_norm_eps": c.rms_norm_eps, "initializer_range": c.initializer_range,
        "attention_dropout": 0.0, "tie_word_embeddings": c.tie_word_embeddings,
        "use_sliding_window": False, "sliding_window": None,
        "max_position_embeddings": MAX_POSITIONS, "rope_theta": float(rope_theta),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(rope_theta)},
        "dual_chunk_attention_config": dual_chunk_config(trained_len),
        "bos_token_id": special["<|endoftext|>"], "eos_token_id": special["<|im_end|>"],
        "pad_token_id": special["<|endoftext|>"], "use_cache": True, "torch_dtype": "bfloat16"}


def export_model(
    model: Qwen2ForCausalLM, tokenizer_dir: Path, out_dir: Path, *, rope_theta: float,
    trained_len: int, max_shard_size: str = "1GB",
) -> None:
    """Write bf16 safetensors, config, generation config and tokenizer files to ``out_dir``.

    Weights that were there are replaced. Raises `LongspanError` when it cannot be written; what was
    there is then unchanged.
    """
    vocabulary = json.loads((tokenizer_dir / "tokenizer.json").read_text())["added_tokens"]
    special = {token["content"]: token["id"] for token in vocabulary}
    shipped = copy.deepcopy(model)
    torch.nn.Module.to(shipped, "cpu", torch.bfloat16)
    generation = {
        "bos_token_id": special["<|endoftext|>"], "pad_token_id": special["<|endoftext|>"],
        "eos_token_id": [special["<|im_end|>"], special["<|endoftext|>"]], "do_sample": False}
    with replaced_checkpoint(out_dir) as folder:
        shipped.save_pretrained(folder, max_shard_size=max_shard_size)
        _write_json(folder / "config.json", config_json(model, rope_theta, trained_len, special))
        _write_json(folder / "generation_config.json", generation)
        for name in TOKENIZER_FILES:
            shutil.copyfile(tokenizer_dir / name, folder / name)
        _make_readable(folder)


def join_shards(shard_dir: Path, out_dir: Path) -> None:
    """Copy an exported checkpoint with its weights in one file.

    Its config goes along, so the result says of itself what the export said. Raises
    `LongspanError` when ``shard_dir`` holds no export or an incomplete one.
    """
    index = shard_dir / INDEX_FILE
    names = [WEIGHTS_FILE]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    missing = [name for name in (*names, *TEXT_FILES) if not (shard_dir / name).is_file()]
    if missing:
        raise LongspanError(f"{shard_dir} is no whole export ({', '.join(missing)} missing): "
                            "export the model there first")
    tensors = {key: value for name in names for key, value in load_file(shard_dir / name).items()}
    with replaced_checkpoint(out_dir) as folder:
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        for name in TEXT_FILES:
            shutil.copyfile(shard_dir / name, folder / name)
        _make_readable(folder)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def _make_readable(folder: Path) -> None:
    """Give weights the mode of the other files: safetensors shuts out other users."""
    for file in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", file)
