"""Text that a person names: UTF-8, or an error that says what to mend. Standard library only."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from longspan.errors import LongspanError

STANDARD_INPUT = "standard input"


def read_text(file: Path, max_bytes: int | None = None) -> str:
    """Read a UTF-8 file. Raises `LongspanError`: missing, a folder, too long, not UTF-8.

    Args:
        max_bytes: longest file that is read; None: any.
    """
    with _reason(str(file)), file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if max_bytes is not None and size > max_bytes:
            raise LongspanError(f"{file}: {size:,} bytes, at most {max_bytes:,} are read; split it")
        return _decode(stream.read(), str(file))


def read_standard_input() -> str:
    """Read UTF-8 text from standard input. Raises `LongspanError`: not readable or not UTF-8."""
    with _reason(STANDARD_INPUT):
        return _decode(sys.stdin.buffer.read(), STANDARD_INPUT)


@contextmanager
def _reason(name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise LongspanError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise LongspanError(f"{name} is a directory; name a text file") from None
    except OSError as error:
        raise LongspanError(f"{name}: {error.strerror}") from None


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LongspanError(
            f"{name}: not UTF-8 text (byte 0x{data[error.start]:02x} at offset "
            f"{error.start}); convert it first, for example with iconv") from None
