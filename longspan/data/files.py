"""Files and folders that are whole or not there: written beside their place, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from longspan.errors import LongspanError


@contextmanager
def replaced(path: Path, is_folder: bool = False) -> Iterator[Path]:
    """Give a path to write to that becomes ``path`` at the end, a file or a folder.

    Raises `LongspanError` when it cannot be written, on a full disk for example; nothing of it then
    stays, and what was there before is unchanged.
    """
    part = path.with_name(path.name + ".part")
    try:
        if is_folder:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        yield part
        if is_folder:
            shutil.rmtree(path, ignore_errors=True)
        os.replace(part, path)
    except OSError as error:
        raise LongspanError(f"{error.filename or path} cannot be written "
                            f"({error.strerror or error}): make room, then repeat the command"
                            ) from error
    finally:
        if is_folder:
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)
