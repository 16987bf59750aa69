"""Tensors of safetensors files: where they are, whether the files are whole, and their bytes.

Format: 8 bytes of header length, a JSON header, then the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from longspan.config import read_json
from longspan.errors import CheckpointError
from longspan.model.linear import Cut

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOAT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OTHER_TYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
               "I32": torch.int32, "I64": torch.int64}
"""Types of quantised weights and of their scales."""
TYPES = FLOAT_TYPES | OTHER_TYPES
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file, as the file's header states it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """Name in the format, such as ``BF16``."""
    start: int
    """First byte in the file."""
    stop: int
    """Byte behind the last one."""


class SafetensorsReader:
    """Reads tensors on the CPU. Each file is opened once, and not mapped: mapped pages, though
    already copied, would count as this process's memory."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._files: dict[Path, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self._stack.close()

    def read(self, entry: StoredTensor, cut: Cut | None = None) -> Tensor:
        """Read one, or a part of it alone. Raises `CheckpointError` where the file is shorter than
        it was."""
        if entry.file not in self._files:
            self._files[entry.file] = self._stack.enter_context(entry.file.open("rb"))
        stream = self._files[entry.file]
        tensor = torch.empty(cut_shape(entry.shape, cut), dtype=TYPES[entry.dtype])
        place = tensor.flatten().view(torch.uint8).numpy()
        for start, size in _runs(entry, cut):
            stream.seek(entry.start + start)
            if stream.readinto(place[:size]) < size:
                raise truncated(entry.file, stream.tell(), entry.stop)
            place = place[size:]
        return tensor


def cut_shape(shape: tuple[int, ...], cut: Cut | None) -> tuple[int, ...]:
    """Return the shape of a tensor's part."""
    if cut is None or not shape:
        return shape
    rows = shape[0] if cut.rows is None else sum(stop - start for start, stop in cut.rows)
    if cut.columns is None:
        return rows, *shape[1:]
    return rows, sum(stop - start for start, stop in cut.columns)


def _runs(entry: StoredTensor, cut: Cut | None) -> Iterator[tuple[int, int]]:
    """List the bytes of a tensor's part: where each run begins in the tensor, and its length."""
    if cut is None or not entry.shape:
        yield 0, entry.stop - entry.start
        return
    width = (entry.stop - entry.start) // max(1, entry.shape[0])
    element = TYPES[entry.dtype].itemsize
    for start, stop in cut.rows or ((0, entry.shape[0]),):
        if cut.columns is None:
            yield start * width, (stop - start) * width
            continue
        for row in range(start, stop):
            for first, last in cut.columns:
                yield row * width + first * element, (last - first) * element


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return name and place of every tensor of a checkpoint, from the headers of its files."""
    if (path / SINGLE_FILE).is_file():
        return _read_header(path / SINGLE_FILE)
    if (path / INDEX_FILE).is_file():
        return _indexed_tensors(path)
    others = sorted(path.glob("*.safetensors"))
    if others:
        raise CheckpointError(
            f"{path}: {len(others)} safetensors files ({others[0].name}, ...) but neither "
            f"{SINGLE_FILE} nor {INDEX_FILE}; fetch the index too"
        )
    old = sorted(path.glob("*.bin"))
    found = f" ({old[0].name} found; convert it with transformers' save_pretrained)" if old else ""
    raise CheckpointError(f"{path}: no safetensors file there{found}")


def _indexed_tensors(path: Path) -> dict[str, StoredTensor]:
    index = read_json(path / INDEX_FILE)
    places = index.get("weight_map") if isinstance(index, dict) else None
    sound = isinstance(places, dict) and all(isinstance(name, str) for name in places.values())
    if not places or not sound:
        raise CheckpointError(f"{path / INDEX_FILE}: no weight_map in it; fetch the file again")
    shards = sorted(set(places.values()))
    absent = [name for name in shards if not (path / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{path}: {len(absent)} of {len(shards)} shards are missing, the first is {absent[0]}; "
            "fetch them"
        )
    stored: dict[str, StoredTensor] = {}
    for shard in shards:
        found = _read_header(path / shard)
        twice = next((name for name in found if name in stored), None)
        if twice is not None:
            raise CheckpointError(f"{path / shard}: {twice} is in {stored[twice].file.name} too; "
                                  "these shards do not belong together, fetch them again")
        stored |= found
    lost = [name for name, shard in places.items()
            if name not in stored or stored[name].file != path / shard]
    if lost:
        raise CheckpointError(
            f"{path / places[lost[0]]}: {len(lost)} tensors named in {INDEX_FILE} are missing, the "
            f"first is {lost[0]}; fetch the file again"
        )
    return stored


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """Parse a safetensors header and compare the file's size with it."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        header_len = int.from_bytes(prefix, "little")
        if prefix == b"version ":
            raise CheckpointError(f"{file}: a git-lfs pointer, not the weights; run `git lfs pull`")
        if size < 8 or header_len > MAX_HEADER_BYTES:
            raise corrupt(file)
        text = stream.read(header_len)
    first = 8 + header_len
    if len(text) < header_len:
        raise truncated(file, size, first)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        stored = {name: _stored(file, entry, first) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise corrupt(file) from None
    places = sorted((entry.start, entry.stop) for entry in stored.values())
    end = max((stop for _, stop in places), default=first)
    if size < end:
        raise truncated(file, size, end)
    # The format leaves no gap, so that no byte is read twice or not at all.
    edges = [(first, first), *places, (size, size)]
    if any(start > stop for start, stop in places) or any(
            one[1] != other[0] for one, other in pairwise(edges)):
        raise corrupt(file)
    return stored


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; raises `ValueError` where a key stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def corrupt(file: Path) -> CheckpointError:
    """Make the error of a header that cannot be."""
    return CheckpointError(f"{file}: corrupt safetensors header; fetch the file again")


def truncated(file: Path, size: int, expected: int) -> CheckpointError:
    """Make the error of a file that ends too early."""
    return CheckpointError(
        f"{file}: truncated, {size:,} of {expected:,} bytes; fetch the file again")


def _stored(file: Path, entry: Mapping[str, Any], first: int) -> StoredTensor:
    """``first``: where the file's data begins."""
    start, stop = (first + int(n) for n in entry["data_offsets"])
    return StoredTensor(file=file, shape=tuple(int(n) for n in entry["shape"]),
                        dtype=str(entry["dtype"]), start=start, stop=stop)
