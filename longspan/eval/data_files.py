"""Files of benchmarks that somebody downloaded: read once, one clear line for what is wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from longspan.errors import LongspanError


def find_file(folder: Path | None, names: Sequence[str], what: str) -> Path:
    """Find the first of these files that there is. Raises `LongspanError` when there is none."""
    if folder is None:
        raise LongspanError(f"{what} needs its data files; name their folder with --data "
                            f"(it must hold {' or '.join(names)})")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise LongspanError(f"{folder}: no {' or '.join(names)} there, which {what} needs")


@lru_cache(maxsize=64)
def read_lines(file: Path, fields: tuple[str, ...]) -> tuple[dict[str, Any], ...]:
    """Read the objects of a JSONL file. Raises `LongspanError` for a line that is cut short, that
    is no object, or that lacks a field."""
    found = []
    for number, line in enumerate(_read(file).split("\n"), 1):
        if line.strip():
            found.append(_checked(_parse(line, f"{file}, line {number}"), fields,
                                  f"{file}, line {number}"))
    if not found:
        raise LongspanError(f"{file}: the file is empty; fetch it again")
    return tuple(found)


@lru_cache(maxsize=8)
def read_json(file: Path) -> Any:
    """Read a JSON file. Raises `LongspanError` when it is cut short or none."""
    return _parse(_read(file), str(file))


def items(content: Any, place: str, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return a list of objects that have these fields. Raises `LongspanError` for anything else."""
    if not isinstance(content, list) or not content:
        raise LongspanError(f"{place}: a list of objects is expected; this is another file")
    return [_checked(item, fields, f"{place}, item {number}")
            for number, item in enumerate(content, 1)]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LongspanError(f"{file}: not UTF-8 text ({error}); fetch it again") from None
    except OSError as error:
        raise LongspanError(f"{file}: cannot be read ({error.strerror})") from None


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise LongspanError(f"{place}: no JSON, or cut short ({error.msg} at character "
                            f"{error.pos}); fetch it again") from None


def _checked(item: Any, fields: tuple[str, ...], place: str) -> dict[str, Any]:
    missing = [name for name in fields if not isinstance(item, dict) or name not in item]
    if missing:
        raise LongspanError(f"{place}: {', '.join(missing)} is missing; this is another file, or "
                            "an incomplete one")
    assert isinstance(item, dict)
    return item
