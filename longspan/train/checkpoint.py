"""Hugging Face checkpoints of any Qwen2, Qwen3 or Llama shape: read, and written when trained."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from longspan.config import ModelConfig, read_json
from longspan.errors import CheckpointError, LongspanError
from longspan.files.whole import replaced_checkpoint
from longspan.train.attention import ATTENTION_NAME
from longspan.train.export import context_facts, make_readable, write_json
from longspan.train.model import CausalLM
from longspan.train.phases import Phase
from longspan.train.state import digest

COPIED = ("*.json", "*.jinja", "*.txt", "*.model")
"""Files that stand beside weights: tokenizer, template, generation settings."""
NOT_COPIED = ("config.json", "model.safetensors.index.json", "sparse_attention_config.json")
"""What is written anew, or was measured on the weights before."""

SCALINGS = ("linear", "llama3")
"""Scaled frequencies that a checkpoint was trained with, so that training goes on with them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """A checkpoint that training starts from."""

    folder: Path
    config: ModelConfig
    raw: dict[str, Any]
    """Its config.json."""

    @property
    def trained_len(self) -> int:
        """Tokens of the longest rows that it was trained on, as far as it says."""
        dca = self.config.dca
        known = dca.original_max_position_embeddings if dca else 0
        return known or self.config.max_position_embeddings

    @property
    def identity(self) -> dict[str, str]:
        """Digests of the weights and the tokenizer."""
        weights = " ".join(digest(file) for file in sorted(self.folder.glob("*.safetensors")))
        return {"checkpoint": weights, "tokenizer": digest(self.folder / "tokenizer.json")}


def open_base(folder: Path) -> Base:
    """Read what a checkpoint says of itself. Raises `CheckpointError` when it cannot be trained."""
    config = ModelConfig.from_dir(folder)
    if config.rope_scaling is not None and config.rope_scaling.kind not in SCALINGS:
        raise CheckpointError(
            f"{folder}: rope scaling of type {config.rope_scaling.kind} stretches what the weights "
            "were trained on; remove it from config.json, and train to the length instead")
    if not list(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder}: no safetensors there; fetch the weights")
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder}: no tokenizer.json there; fetch it, or convert the "
                              "tokenizer by transformers' save_pretrained")
    return Base(folder=folder, config=config, raw=read_json(folder / "config.json"))


def load_model(base: Base) -> CausalLM:
    """Load a checkpoint's weights in fp32, to be run by our training attention.

    Raises `CheckpointError` when weights are missing, unreadable or of other shapes.
    """
    loaded: Any
    logging.disable_progress_bar()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            base.folder, dtype=torch.float32, attn_implementation=ATTENTION_NAME,
            output_loading_info=True)
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        reason = (str(error).splitlines() or ["unreadable"])[0]
        raise CheckpointError(f"{base.folder}: the weights cannot be loaded ({reason[:200]}): "
                              "fetch the checkpoint again") from error
    model, report = loaded
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        names = sorted(map(str, report.get(what) or ()))
        if names:
            raise CheckpointError(f"{base.folder}: {len(names)} weights are {what.split('_')[0]} "
                                  f"({names[0]}, …): fetch the checkpoint again")
    model.config.use_cache = False
    trained: CausalLM = model
    return trained


def save_trained(
    model: CausalLM, weights: dict[str, torch.Tensor], base: Base, out_dir: Path,
    extended: Phase | None = None, max_shard_size: str = "5GB",
) -> None:
    """Write a trained checkpoint as bf16: the base's config with what training changed, its
    tokenizer and its other files. ``extended`` is the phase that made its context longer.

    ``use_cache`` is set, because trainers leave it false, which makes generation quadratic. Weights
    that were there are replaced. Raises `LongspanError` when it cannot be written; what was there
    is then unchanged.
    """
    if out_dir.resolve() == base.folder.resolve():
        raise LongspanError(f"{out_dir} is the checkpoint that training starts from: name another")
    config = {key: value for key, value in base.raw.items() if key != "dtype"}
    if extended is not None:
        config.pop("rope_scaling", None)
        config |= context_facts(extended.rope_theta, extended.seq_len)
        config["rope_parameters"] = {
            **(model.config.rope_parameters or {}), "rope_theta": extended.rope_theta}
    config |= {"torch_dtype": "bfloat16", "use_cache": True}
    low = {id(value): value.to(torch.bfloat16) for value in weights.values()}
    with replaced_checkpoint(out_dir) as folder:
        model.save_pretrained(
            folder, state_dict={name: low[id(value)] for name, value in weights.items()},
            max_shard_size=max_shard_size)
        for pattern in COPIED:
            for file in base.folder.glob(pattern):
                if file.name not in NOT_COPIED:
                    shutil.copyfile(file, folder / file.name)
        write_json(folder / "config.json", config)
        make_readable(folder)


def tokenizer_text(folder: Path) -> str:
    """Return a tokenizer.json in one spelling, to compare with another."""
    return json.dumps(read_json(folder / "tokenizer.json"), sort_keys=True)
