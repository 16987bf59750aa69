"""The log of one training run: a JSON object a line, in step with the run's saved state."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longspan.errors import LongspanError
from longspan.files.whole import replace_file

LOG_FILE = "log.jsonl"
BEFORE = "before"
"""The gate's name for the model that a run starts from."""


class RunLog:
    """Appends rows to a file and prints them.

    Args:
        is_writer: whether this process does; of several, one does.
    """

    def __init__(self, file: Path, is_writer: bool = True) -> None:
        self.file, self.is_writer = file, is_writer

    def clear(self) -> None:
        """Begin an empty log."""
        if not self.is_writer:
            return
        replace_file(self.file, lambda out: None)

    def rewind(self, num_tokens: int) -> None:
        """Drop the rows logged after the first ``num_tokens`` tokens: they will be repeated.

        A line cut short by a crash or a full disk ends what is kept.
        """
        if not self.is_writer:
            return
        kept: list[str] = []
        for line in self.file.read_text().splitlines() if self.file.is_file() else []:
            row = _parse(line)
            if row is None or row.get("num_tokens", 0) > num_tokens:
                break
            kept.append(line + "\n")
        replace_file(self.file, lambda out: out.write("".join(kept).encode()))

    def write(self, row: Mapping[str, Any]) -> None:
        """Append and print a row. Raises `LongspanError` when the disk is full."""
        if not self.is_writer:
            return
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})
        try:
            with self.file.open("a") as out:
                out.write(line + "\n")
        except OSError as error:
            raise LongspanError(f"{self.file} cannot be written ({error.strerror}): make room, "
                                "then resume the run") from error
        print(line, flush=True)


def read_log(file: Path) -> list[dict[str, Any]]:
    """Rows of a log. Raises `LongspanError` if there is none or a line is cut short."""
    if not file.is_file():
        raise LongspanError(f"no training log {file}: pass the run's {LOG_FILE}")
    rows = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        row = _parse(line)
        if row is None:
            raise LongspanError(f"{file}: line {number} is cut short: resume the run, which mends "
                                "its log, or delete the line")
        rows.append(row)
    return rows


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None
