"""Checkpoints written tensor by tensor: memory for one piece of a tensor, whatever the model.

The safetensors library wants a whole file's tensors at once. Format: `longspan.model.weights`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from longspan.model.safetensors_files import INDEX_FILE, SINGLE_FILE

MAX_SHARD_BYTES = 5 * 10**9
"""As transformers saves them; a larger tensor has a file of its own."""


class Source(Protocol):
    """A tensor that comes in pieces."""

    @property
    def name(self) -> str:
        """Name in the checkpoint."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole."""

    def pieces(self) -> Iterator[Tensor]:
        """Its numbers in order, bf16."""


def num_bytes(source: Source) -> int:
    """Size in a file."""
    return prod(source.shape) * torch.bfloat16.itemsize


def write_tensors(
    folder: Path, sources: Sequence[Source], on_progress: Callable[[int], object]
) -> None:
    """Write one file, or shards and their index.

    Args:
        on_progress: called with the bytes that were written since the last call.
    """
    shards = _shards(sources)
    names = [SINGLE_FILE] if len(shards) == 1 else [
        f"model-{idx + 1:05}-of-{len(shards):05}.safetensors" for idx in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, on_progress)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(map(num_bytes, sources))},
                 "weight_map": {source.name: name for name, shard in zip(names, shards, strict=True)
                                for source in shard}}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _shards(sources: Sequence[Source]) -> list[list[Source]]:
    shards: list[list[Source]] = [[]]
    for source in sources:
        if shards[-1] and sum(map(num_bytes, [*shards[-1], source])) > MAX_SHARD_BYTES:
            shards.append([])
        shards[-1].append(source)
    return shards


def _write_file(
    file: Path, sources: Sequence[Source], on_progress: Callable[[int], object]
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for source in sources:
        stop = start + num_bytes(source)
        header[source.name] = {
            "dtype": "BF16", "shape": source.shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data is aligned
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for source in sources:
            for piece in source.pieces():
                on_progress(stream.write(piece.flatten().view(torch.uint8).numpy().data))
        assert stream.tell() == 8 + len(text) + start, "pieces are not the whole of their tensors"
