"""A trained model as a Hugging Face checkpoint that transformers 4.5x and 5.x both load."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

from longspan.errors import LongspanError
from longspan.files.whole import replaced_checkpoint
from longspan.train.model import CausalLM

TRAINED_LEN, MAX_POSITIONS = 262_144, 1_010_000
"""What Qwen2.5-1M was trained on and what it claims, tokens; others claim in proportion."""
LOCAL_MULTIPLE = 128
"""Sparse attention needs DCA chunks of whole blocks."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TEXT_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)


def dual_chunk_config(trained_len: int) -> dict[str, int]:
    """Qwen2.5-1M's key: DCA chunk = trained length, 1/32 of it as local window, in whole blocks."""
    local = max(LOCAL_MULTIPLE, trained_len // 32 // LOCAL_MULTIPLE * LOCAL_MULTIPLE)
    return {
        "chunk_size": trained_len, "local_size": min(local, trained_len // 2),
        "original_max_position_embeddings": trained_len}


def context_facts(rope_theta: float, trained_len: int) -> dict[str, Any]:
    """Return the keys of config.json that say how long prompts may be."""
    return {
        "max_position_embeddings": MAX_POSITIONS * trained_len // TRAINED_LEN,
        "rope_theta": float(rope_theta),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(rope_theta)},
        "dual_chunk_attention_config": dual_chunk_config(trained_len)}


def config_json(
    model: CausalLM, rope_theta: float, trained_len: int, special: dict[str, int]
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
        **context_facts(rope_theta, trained_len),
        "bos_token_id": special["<|endoftext|>"], "eos_token_id": special["<|im_end|>"],
        "pad_token_id": special["<|endoftext|>"], "use_cache": True, "torch_dtype": "bfloat16"}


def export_model(
    model: CausalLM, tokenizer_dir: Path, out_dir: Path, *, rope_theta: float,
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
        write_json(folder / "config.json", config_json(model, rope_theta, trained_len, special))
        write_json(folder / "generation_config.json", generation)
        for name in TOKENIZER_FILES:
            shutil.copyfile(tokenizer_dir / name, folder / name)
        make_readable(folder)


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
        make_readable(folder)


def split_shards(checkpoint: Path, out_dir: Path, max_shard_size: str) -> None:
    """Copy a checkpoint with its weights in files of a size, what `join_shards` joins again."""
    tensors = load_file(checkpoint / WEIGHTS_FILE)
    with replaced_checkpoint(out_dir) as folder:
        save_torch_state_dict(tensors, folder, max_shard_size=max_shard_size)
        for name in TEXT_FILES:
            shutil.copyfile(checkpoint / name, folder / name)
        make_readable(folder)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON object, indented."""
    file.write_text(json.dumps(content, indent=2) + "\n")


def make_readable(folder: Path) -> None:
    """Give weights the mode of the other files: safetensors shuts out other users."""
    for file in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", file)
