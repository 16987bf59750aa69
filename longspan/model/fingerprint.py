"""Which weights a checkpoint has, told cheaply: for plans that were measured on one model."""

from __future__ import annotations

import os
from hashlib import blake2b
from pathlib import Path

WEIGHTS = ("*.safetensors", "*.gguf")
SPAN_BYTES = 2**20


def weights_fingerprint(path: Path) -> str:
    """Digest size, first and last MiB of each weights file, in the order of their names; "" where
    there is none. Names do not count: a copy of a checkpoint is the same model."""
    files = sorted({file for pattern in WEIGHTS for file in path.glob(pattern) if file.is_file()})
    if not files:
        return ""
    digest = blake2b(digest_size=16)
    for file in files:
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with open(file, "rb") as stream:
            digest.update(stream.read(SPAN_BYTES))
            stream.seek(max(0, size - SPAN_BYTES), os.SEEK_SET)
            digest.update(stream.read(SPAN_BYTES))
    return digest.hexdigest()
