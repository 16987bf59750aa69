"""Files and folders that are whole or not there: written beside their place, then renamed."""

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
HIDDEN_ERRORS = (RuntimeError, SafetensorError)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents. Raises `LongspanError` if it cannot be made."""
    check_is_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LongspanError(
            f"{folder} cannot be a folder ({error.strerror}): name another") from error


def check_is_folder(path: Path) -> None:
    """Raise `LongspanError` where something else than a folder is."""
    if path.exists() and not path.is_dir():
        raise LongspanError(f"{path} is a file: name a folder")


@contextmanager
def replaced(path: Path, is_folder: bool = False) -> Iterator[Path]:
    """Give a path to write to that becomes ``path`` at the end, a file or a folder. Even after a
    crash there is the old content or all of the new.

    Raises `LongspanError` when it cannot be written, on a full disk for example; nothing of it then
    stays, and what was there before is unchanged.
    """
    part = path.with_name(path.name + PART)
    try:
        if is_folder:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        yield part
        for file in filter(Path.is_file, part.rglob("*") if is_folder else [part]):
            _sync(file)
        if is_folder:
            shutil.rmtree(path, ignore_errors=True)
        os.replace(part, path)
        _sync(path.parent)
    except OSError as error:
        raise _cannot_write(Path(error.filename or path), error) from error
    finally:
        if is_folder:
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def replace_file(file: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file as `replaced` does, by a function that hides why it cannot.

    Raises `LongspanError` when it cannot be written.
    """
    try:
        with replaced(file) as part, part.open("wb") as out:
            write(out)
    except HIDDEN_ERRORS as error:
        raise _cannot_write(file, error) from error


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
    except (OSError, *HIDDEN_ERRORS) as error:
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
    reason = cause.strerror or str(cause) if isinstance(cause, OSError) \
        else str(error).splitlines()[0]
    place = next(place for place in path.absolute().parents if place.exists())
    free = shutil.disk_usage(place).free // MIB
    return LongspanError(f"{path} cannot be written ({reason}; {free:,} MiB free): make room, then "
                         "repeat the command")
