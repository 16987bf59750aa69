"""The key of KV blocks: everything that their content depends on besides token ids.

Weights and tokenizer files enter by their content, not by name or date. The tokenizer and its chat
template do not change what a token id means to the model, but whoever changes them means another
model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from longspan.attention.sparsity import SparsityPlan
from longspan.config import DcaConfig, EngineConfig, ModelConfig
from longspan.cores import num_cores
from longspan.engine.kv_file import KEY_BYTES, VERSION
from longspan.version import __version__

WEIGHTS = ("*.safetensors", "*.gguf", "config.json", "*quant*.json")
"""With what says how they are stored."""
TEXT_FILES = ("tokenizer*", "*.jinja", "vocab*", "merges.txt", "special_tokens_map.json",
              "added_tokens.json")
ROOMS = ("ops", "attention", "model")
"""Those of longspan whose code keys and values come from."""
SPAN_BYTES = 32 * 1024**2


def cache_key(
    path: Path, model: ModelConfig, config: EngineConfig, *, dca: DcaConfig | None,
    plan: SparsityPlan | None,
) -> bytes:
    """Name what an engine's blocks depend on.

    Chunks are not in it: where their length counts, their tokens are in the blocks' own hashes.
    Where nothing outlives the process, files are not read: the key is then of no use elsewhere.

    Args:
        config: resolved.
    """
    assert config.device is not None
    facts: dict[str, Any] = {
        "format": VERSION, "longspan": [__version__, code_digest()], "torch": torch.__version__,
        "device": config.device.split(":")[0], "dtype": config.dtype,
        "kv_dtype": config.kv_dtype, "weights": config.weights,
        "quantization": config.quantization, "block_size": config.block_size,
        "model": dataclasses.asdict(model), "positions": dca and dataclasses.asdict(dca),
        "plan": plan and dataclasses.asdict(plan)}
    if config.kv_dir is not None:
        patterns = TEXT_FILES if config.weights == "random" else (*WEIGHTS, *TEXT_FILES)
        facts["files"] = digest_files(sorted(
            file for pattern in patterns for file in path.glob(pattern) if file.is_file()))
    text = json.dumps(facts, sort_keys=True, default=str).encode()
    return blake2b(text, digest_size=KEY_BYTES).digest()


def code_digest() -> str:
    """Digest the code that keys and values come from: between two releases it changes more often
    than the version."""
    root, digest = Path(__file__).resolve().parents[2], blake2b(digest_size=16)
    for file in sorted(file for room in ROOMS for file in (root / room).rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def digest_files(files: list[Path]) -> dict[str, str]:
    """Digest the content of files, on all cores: as fast as they are read."""
    found = dict[str, str]()
    with ThreadPoolExecutor(num_cores()) as pool:
        for file in files:
            size = file.stat().st_size
            sums = pool.map(lambda span, file=file: _digest_span(file, *span), _spans(size))
            found[file.name] = blake2b(
                b"".join([size.to_bytes(8, "little"), *sums]), digest_size=16).hexdigest()
    return found


def _spans(size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(SPAN_BYTES, size - start)) for start in range(0, size, SPAN_BYTES))


def _digest_span(file: Path, start: int, count: int) -> bytes:
    with open(file, "rb") as stream:
        stream.seek(start)
        data = stream.read(count)
    return blake2b(data, digest_size=16).digest()
