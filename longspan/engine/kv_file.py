"""Files of KV blocks: safetensors with a header that is checked before anything is used. No torch.

``FOLDER/<key>-<last hash>.safetensors`` holds a run of n consecutive blocks of one hash chain. Its
tensors, in this order, are those of the runner's cache, layer by layer (docs/kv-cache.md): ``k``
and ``v`` [n, L, P, K, D], and ``k_mean`` and ``v_mean`` [n, L, K, D] where the plan has tile means.
The metadata names the format and its version, the model, the key (what the blocks depend on besides
tokens, `longspan.engine.setup.cache_key`), each block's chain hash and CRC-32, the hash of the
block before them, and a digest of all that. A file that differs from its header in any way is no
file of ours.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from math import prod
from pathlib import Path
from typing import Any

from longspan.errors import LongspanError

FORMAT, VERSION = "longspan-kv", "1"
SUFFIX, PART_SUFFIX = ".safetensors", ".part"
KEY_BYTES = HASH_BYTES = 16
NAME = re.compile(r"([0-9a-f]{32})-([0-9a-f]{32})\.safetensors")
PART_NAME = re.compile(NAME.pattern + r"\.part")
"""A file that is being written. A directory may hold other people's unfinished downloads."""
ANY_NAME = re.compile(r".*\.safetensors", re.DOTALL)
LOCK = "longspan.lock"
MAX_NAME = 100
"""Characters of a model's name that a file has."""
MAX_HEADER_BYTES = 64 * 1024**2
PAGE_BYTES = 4_096
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1, "I8": 1}


class BadFileError(ValueError):
    """A file that cannot be used; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredRun:
    """One file, as its header states it."""

    name: str
    key: bytes
    """What its blocks depend on besides their tokens."""
    model: str = ""
    """The model's name, for people."""
    hashes: tuple[bytes, ...]
    """Chain hash of each block; () where an index only counts the file's bytes."""
    parent: bytes = b""
    """Hash of the block before the first one; empty for a chain's beginning."""
    num_bytes: int = 0
    """Size of the whole file."""
    used_s: float = 0.0
    """Time of its last use, seconds since the epoch."""
    data_start: int = 0
    """First byte of the data."""
    checksums: tuple[int, ...] = ()
    """CRC-32 of each block's bytes, in the order of the tensors."""
    tensors: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    """Dtype and shape [n, ...] by name, in the file's order."""

    def part_bytes(self) -> list[int]:
        """Bytes of one block in each tensor."""
        return [ITEM_BYTES[dtype] * prod(shape[1:]) for dtype, shape in self.tensors.values()]


class KvFolder:
    """A directory of KV files that belongs to this process until it is closed.

    Args:
        model: name of the model whose KV is written, for people.

    Raises `LongspanError` when it cannot be made or written, or belongs to another process.
    """

    def __init__(self, path: Path, model: str = "") -> None:
        self.path, self.model = path, model[:MAX_NAME]
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise LongspanError(f"kv_dir {path} cannot be used: {error.strerror}; name a directory "
                                "that this user may write") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.pread(self._lock, 20, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._lock)
            raise LongspanError(f"kv_dir {path} is in use by process {owner}; give each engine its "
                                "own, or end that one") from None
        os.truncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
        for part in list_files(path, PART_NAME):  # left by a process that was killed
            (path / part).unlink(missing_ok=True)

    def close(self) -> None:
        """Let others use the directory."""
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1


def list_files(folder: Path, name: re.Pattern[str] = NAME) -> list[str]:
    """List the files in a folder that are named so, in the order of their names. Folders, pipes and
    links that lead nowhere are no files, whatever they are named. Raises `OSError`."""
    return sorted(file.name for file in folder.iterdir()
                  if name.fullmatch(file.name) and file.is_file())


def file_name(key: bytes, last_hash: bytes) -> str:
    """Name the file of a run."""
    return f"{key.hex()}-{last_hash.hex()}{SUFFIX}"


def make_header(
    key: bytes, hashes: Sequence[bytes], parent: bytes, checksums: Sequence[int],
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], model: str = "",
) -> bytes:
    """Make the bytes before the data.

    Args:
        tensors: dtype and shape of one block's part, by name.
        model: its name, for people.
    """
    meta = {"format": FORMAT, "version": VERSION, "model": model, "key": key.hex(),
            "parent": parent.hex(),
            "hashes": b"".join(hashes).hex(),
            "checksums": "".join(f"{value:08x}" for value in checksums)}
    header: dict[str, Any] = {"__metadata__": meta}
    start = 0
    for name, (dtype, shape) in tensors.items():
        stop = start + len(hashes) * ITEM_BYTES[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": [len(hashes), *shape],
                        "data_offsets": [start, stop]}
        start = stop
    meta["digest"] = _digest(header)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % PAGE_BYTES)  # the data begins where disks can read it apart
    return len(text).to_bytes(8, "little") + text


def read_header(file: Path) -> StoredRun:
    """Read and check a header. Raises `BadFileError` for anything else than a whole file of ours,
    `OSError` when it cannot be read."""
    named = NAME.fullmatch(file.name)
    if named is None:
        raise BadFileError("its name is not one of longspan's")
    with open(file, "rb") as stream:
        status = os.fstat(stream.fileno())
        size = int.from_bytes(stream.read(8), "little")
        if not 0 < size <= min(MAX_HEADER_BYTES, status.st_size - 8):
            raise BadFileError("it has no header")
        text = stream.read(size)
    try:
        run = _parse(file.name, json.loads(text), 8 + size)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadFileError(f"its header is damaged ({type(error).__name__}: {error})") from None
    expected = run.data_start + len(run.hashes) * sum(run.part_bytes())
    if expected != status.st_size:
        raise BadFileError(f"it has {status.st_size} bytes, and its header speaks of {expected}")
    if (named[1], named[2]) != (run.key.hex(), run.hashes[-1].hex()):
        raise BadFileError("its name is another file's")
    return StoredRun(
        name=run.name, key=run.key, model=run.model, hashes=run.hashes, parent=run.parent,
        tensors=run.tensors, num_bytes=status.st_size, used_s=status.st_mtime,
        data_start=run.data_start, checksums=run.checksums)


def scan(folder: Path) -> tuple[list[StoredRun], dict[str, str]]:
    """Read the headers of all files in a folder.

    Returns those that are whole, in the order of their last use, and why others with our suffix
    are not. Files of other kinds are left alone, and not listed; nor are those that the folder's
    engine deletes meanwhile.
    """
    runs, bad = list[StoredRun](), dict[str, str]()
    for name in list_files(folder, ANY_NAME):
        try:
            runs.append(read_header(folder / name))
        except BadFileError as error:
            bad[name] = str(error)
        except FileNotFoundError:
            continue
        except OSError as error:
            bad[name] = error.strerror or str(error)
    return sorted(runs, key=lambda run: run.used_s), bad


def index_of(folder: Path, key: bytes) -> list[StoredRun]:
    """List the files in a folder as an index needs them, those used longest ago first. Other
    engines' files and damaged ones have no hashes: they take room, and are deleted in their turn.
    """
    found = list[StoredRun]()
    runs, bad = scan(folder) if folder.is_dir() else ([], {})
    for run in runs:
        hashes = run.hashes if run.key == key else ()
        found.append(replace(run, hashes=hashes, tensors={}, checksums=()))
    for name in filter(NAME.fullmatch, bad):
        with suppress(OSError):
            status = (folder / name).stat()
            found.append(StoredRun(name=name, key=b"", hashes=(), num_bytes=status.st_size,
                                   used_s=status.st_mtime))
    return sorted(found, key=lambda run: run.used_s)


def max_file_bytes(num_blocks: int, block_bytes: int) -> int:
    """Bound the size of a file of blocks, its header included."""
    return 2_048 + 12 * MAX_NAME + PAGE_BYTES + num_blocks * (2 * HASH_BYTES + 8 + block_bytes)


def _parse(name: str, header: Any, data_start: int) -> StoredRun:
    meta = header["__metadata__"]
    if (meta["format"], meta["version"]) != (FORMAT, VERSION):
        raise ValueError(f"format {meta['format']} {meta['version']}, not {FORMAT} {VERSION}")
    digest = meta.pop("digest")
    if _digest(header) != digest:
        raise ValueError("its digest is another one")
    hashes, sums = bytes.fromhex(meta["hashes"]), meta["checksums"]
    count, start = len(hashes) // HASH_BYTES, 0
    tensors = dict[str, tuple[str, tuple[int, ...]]]()
    for key, item in header.items():
        if key == "__metadata__":
            continue
        shape = tuple(map(int, item["shape"]))
        tensors[key] = str(item["dtype"]), shape
        stop = start + ITEM_BYTES[item["dtype"]] * prod(shape)
        if item["data_offsets"] != [start, stop] or shape[0] != count:
            raise ValueError(f"tensor {key} is not where it should be")
        start = stop
    if not count or len(hashes) != count * HASH_BYTES or len(sums) != 8 * count:
        raise ValueError("it names no blocks")
    return StoredRun(
        name=name, key=bytes.fromhex(meta["key"]), model=str(meta.get("model", "")),
        parent=bytes.fromhex(meta["parent"]),
        hashes=tuple(hashes[i:i + HASH_BYTES] for i in range(0, len(hashes), HASH_BYTES)),
        checksums=tuple(int(sums[i:i + 8], 16) for i in range(0, len(sums), 8)),
        tensors=tensors, data_start=data_start)


def _digest(header: Mapping[str, Any]) -> str:
    text = json.dumps(header, sort_keys=True).encode()
    return blake2b(text, digest_size=16).hexdigest()
