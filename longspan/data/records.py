"""Texts of records: JSONL, Parquet, data sets of the Hugging Face hub.

Every reader gives ``(text, "")``, or ``(None, why)`` for a record without a text.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from longspan.errors import LongspanError, MissingDependencyError
from longspan.files.parquet import arrow

RECORD_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".parquet")

Record = tuple[str | None, str]


def read_records(path: Path, column: str) -> Iterator[Record]:
    """Texts of a JSONL or Parquet file. Raises `LongspanError` when it cannot be read or no first
    record has the column."""
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path, column)
        else:
            yield from _json_lines(path, column)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise LongspanError(f"{path}: cannot be read; {error}") from None


def _json_lines(path: Path, column: str) -> Iterator[Record]:
    open_file = gzip.open if path.suffix == ".gz" else open
    with open_file(path, "rt", encoding="utf-8-sig") as lines:
        is_first = True
        for line in filter(str.strip, lines):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                record = None
            if is_first:
                _check_column(str(path), record, column)
            is_first = False
            yield _text(record, column)


def _parquet(path: Path, column: str) -> Iterator[Record]:
    pyarrow = arrow()
    try:
        file = pyarrow.parquet.ParquetFile(path)
        _check_column(str(path), dict.fromkeys(file.schema_arrow.names), column)
        for batch in file.iter_batches(batch_size=64, columns=[column]):
            yield from (_text({column: text}, column) for text in batch.column(0).to_pylist())
    except pyarrow.ArrowInvalid as error:
        raise LongspanError(f"{path}: no Parquet file; {error}") from None


def hub_records(name: str, split: str, column: str) -> Iterator[Record]:
    """Texts of a data set, ``NAME`` or ``NAME:CONFIG``, read while it is loaded."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise MissingDependencyError(
            "data sets of the hub need datasets, which is not installed: pip install datasets"
        ) from None
    name, _, config = name.partition(":")
    try:
        records: Iterable[Mapping[str, Any]] = load_dataset(
            name, config or None, split=split, streaming=True)
        for index, record in enumerate(records):
            if index == 0:
                _check_column(name, record, column)
            yield _text(record, column)
    except (OSError, ValueError) as error:
        if isinstance(error, LongspanError):
            raise
        raise LongspanError(f"data set {name}, split {split}: cannot be read; {error}") from None


def _check_column(name: str, record: object, column: str) -> None:
    if not isinstance(record, Mapping):
        raise LongspanError(f"{name}: the first line is no JSON object; write one a line")
    if column not in record:
        raise LongspanError(
            f"{name}: no column {column}; choose --column from {', '.join(map(str, record))}")


def _text(record: object, column: str) -> Record:
    if not isinstance(record, Mapping):
        return None, "no JSON object"
    text = record.get(column)
    if not isinstance(text, str):
        return None, f"no text in column {column}"
    try:
        text.encode()
    except UnicodeEncodeError:
        return None, "half a character"
    return text, ""
