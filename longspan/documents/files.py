"""Files below a folder, and the text of those that are text."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

HEAD = 8192
"""Bytes that are looked at before a file is read whole."""


def list_files(
    folder: Path, on_error: Callable[[OSError], None] = lambda error: None
) -> list[str]:
    """Paths of all files and links below a folder, relative to it; the files of a folder stand
    together. ``on_error`` is told of folders that cannot be read."""
    names = []
    for directory, subfolders, files in os.walk(folder, onerror=on_error):
        subfolders.sort()
        links = [name for name in subfolders if os.path.islink(os.path.join(directory, name))]
        inside = Path(directory).relative_to(folder)
        names += [str(inside / name) for name in sorted(files + links)]
    return names


def printable(name: str) -> str:
    """Return a file's name without the bytes that are not UTF-8."""
    return name.encode("utf-8", "replace").decode()


def decode(data: bytes) -> str:
    """Text of a file in UTF-8, or in UTF-16 with its mark. Raises `UnicodeDecodeError`."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16")
    refuse_binary(data)
    return data.decode("utf-8-sig")


def refuse_binary(data: bytes, suffix: str = "") -> None:
    """Raise `UnicodeDecodeError` for data that is no text; its beginning is enough."""
    is_wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    if b"\0" in data and not is_wide and suffix != ".gz":
        raise UnicodeDecodeError("utf-8", data, data.index(b"\0"), data.index(b"\0") + 1, "binary")


def unreadable(error: Exception) -> str:
    """Why a file is no text, in words."""
    if isinstance(error, UnicodeDecodeError):
        return "binary" if error.reason == "binary" else "not UTF-8"
    return "cannot be read"
