"""The bodies of `longspan cache`. No torch: a directory may hold hundreds of gigabytes."""

from __future__ import annotations

import os
import zlib
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path

from longspan.commands.console import note, show_table
from longspan.engine.kv_file import NAME, KvFolder, StoredRun, list_files, scan
from longspan.errors import LongspanError
from longspan.units import in_gib


def show(folder: Path) -> None:
    """Print one row for each engine that wrote there, and the files that cannot be used."""
    with _readable(folder):
        runs, bad = scan(folder)
    by_key = defaultdict[bytes, list[StoredRun]](list)
    for run in runs:
        by_key[run.key].append(run)
    rows = []
    for key, files in by_key.items():
        latest = datetime.fromtimestamp(max(run.used_s for run in files))
        dtype, shape = files[0].tensors["k"]
        rows.append((
            key.hex()[:12], files[-1].model, f"{len(files)}",
            f"{sum(_num_tokens(run) for run in files):,}",
            in_gib(sum(run.num_bytes for run in files)), dtype, f"{shape[1]}",
            f"{latest:%Y-%m-%d %H:%M}"))
    if rows:
        show_table(str(folder), ("engine's key", "model", "files", "tokens", "size", "dtype",
                                 "layers", "last used"), rows)
    else:
        print(f"no KV files in {folder}")
    _tell(bad)


def drop(folder: Path, key: str | None) -> None:
    """Delete all KV files, or one engine's. Raises `LongspanError` while an engine uses them."""
    if key is not None and not key.strip():
        raise LongspanError("--key is empty; give the start of a key, or leave it out for all")
    with _readable(folder):
        names = list_files(folder)
    chosen = [folder / name for name in names if name.startswith((key or "").lower())]
    if key and not chosen:
        raise LongspanError(f"--key {key}: no file in {folder} has it; see longspan cache list")
    if not chosen:
        print(f"no KV files in {folder}")
        return
    owned = KvFolder(folder)
    try:
        num_bytes = sum(file.stat().st_size for file in chosen)
        for file in chosen:
            file.unlink()
    finally:
        owned.close()
    print(f"{len(chosen)} files deleted, {in_gib(num_bytes)}")


def verify(folder: Path) -> bool:
    """Read everything; tell what is damaged. True: nothing is."""
    with _readable(folder):
        runs, bad = scan(folder)
    bad = {name: reason for name, reason in bad.items() if NAME.fullmatch(name)}
    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
        for run, reason in zip(runs, pool.map(partial(_damage, folder), runs), strict=True):
            if reason:
                bad[run.name] = reason
    _tell(bad)
    print(f"{len(runs)} files with {in_gib(sum(run.num_bytes for run in runs))} read, "
          f"{len(bad)} damaged")
    return not bad


def _damage(folder: Path, run: StoredRun) -> str:
    """Say what is wrong with a file's data; empty: nothing."""
    sums, sizes = [0] * len(run.hashes), run.part_bytes()
    try:
        with open(folder / run.name, "rb") as stream:
            stream.seek(run.data_start)
            for size in sizes:
                for index in range(len(sums)):
                    sums[index] = zlib.crc32(stream.read(size), sums[index])
    except FileNotFoundError:
        return ""  # the engine whose folder it is has deleted it meanwhile
    except OSError as error:
        return error.strerror or str(error)
    wrong = [index for index, value in enumerate(sums) if value != run.checksums[index]]
    return f"block {wrong[0]} is damaged" if wrong else ""


def _num_tokens(run: StoredRun) -> int:
    return len(run.hashes) * run.tensors["k"][1][2]


def _tell(bad: dict[str, str]) -> None:
    for name, reason in bad.items():
        note(f"{name}: {reason}")


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LongspanError(f"{folder} cannot be read: {error.strerror}; name the --kv-dir of an "
                            "engine") from None
