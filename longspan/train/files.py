"""Files that are whole or not there: written beside their place, then renamed into it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from longspan.errors import LongspanError

PART = ".part"
"""End of the name of an unfinished file or folder; a later run removes it."""
MIB = 2**20

# torch.save hides the reason of a failed write in a RuntimeError, safetensors in its own error.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents. Raises `LongspanError` if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LongspanError(
            f"{folder} cannot be a folder ({error.strerror}): name another") from error


def replace_file(file: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that even after a crash it has its old content or all of the new.

    Raises `LongspanError` when it cannot be written, on a full disk for example. The old file is
    then unchanged and no part of the new one takes up room.
    """
    part = file.with_name(file.name + PART)
    try:
        with part.open("wb") as out:
            write(out)
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, file)
        _sync(file.parent)
    except WRITE_ERRORS as error:
        raise _cannot_write(file, error) from error
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def replaced_checkpoint(folder: Path) -> Iterator[Path]:
    """Yield a folder to write a checkpoint to; its files go to ``folder`` once all are written.

    Whatever weights ``folder`` had are replaced. While files move, ``folder`` has no config.json,
    without which nothing takes it for a checkpoint. Raises `LongspanError` when it cannot be
    written; ``folder`` is then unchanged.
    """
    part = folder / PART
    make_folder(folder)
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        yield part
        for file in part.iterdir():
            _sync(file)
        (folder / "config.json").unlink(missing_ok=True)
        for old in (*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")):
            old.unlink()
        _sync(folder)
        for file in sorted(part.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, folder / file.name)
        _sync(folder)
    except WRITE_ERRORS as error:
        if isinstance(error, LongspanError):
            raise
        raise _cannot_write(folder, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cannot_write(path: Path, error: Exception) -> LongspanError:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    reason = cause.strerror if isinstance(cause, OSError) else str(error).splitlines()[0]
    free = shutil.disk_usage(path.parent).free // MIB
    return LongspanError(f"{path} cannot be written ({reason}; {free:,} MiB free): make room, then "
                         "repeat the command")
