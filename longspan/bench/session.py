"""One run of a benchmark: rows are written as soon as they are measured, time is limited, and what
fails becomes a row that says so."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longspan.commands.console import note
from longspan.commands.results import (
    KEY_FIELDS,
    describe_run,
    read_file,
    result_file,
    row_identity,
    write_rows,
)
from longspan.engine.resolve import resolve_device
from longspan.errors import LongspanError


class CheckFailed(Exception):
    """An op is wrong, so it is not timed."""


class Unavailable(Exception):
    """Something to compare with is not there on this device; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchOptions:
    """What all GPU benchmarks are told."""

    device: str
    """``cpu`` or ``cuda``."""
    out: Path
    """Folder of result files."""
    commit: str | None = None
    """Where the source is a copy without git."""
    budget_s: float | None = None
    """No measurement starts after this."""
    resume: bool = False
    """Rows that the result file has are kept, not measured again."""

    @classmethod
    def make(cls, device: str | None, out: Path, commit: str | None,
             budget_s: float | None, *, resume: bool = False) -> BenchOptions:
        """Make the options, with the device decided. Raises `LongspanError` for one that is not
        there."""
        device = resolve_device(device, has_cuda=torch.cuda.is_available())
        if budget_s is not None and not budget_s > 0:  # nan too
            raise LongspanError(f"--budget-s must be positive, not {budget_s}")
        return cls(device=device, out=out, commit=commit, budget_s=budget_s, resume=resume)


class BenchSession:
    """Where measurements hand in their rows."""

    def __init__(self, bench: str, options: BenchOptions) -> None:
        self.bench, self.options, self.device = bench, options, options.device
        self.rows: list[dict[str, Any]] = []
        self.has_failed = False
        """One of our own measurements failed: the command's status is 1."""
        self._is_broken = False
        self._about = describe_run(options.device, options.commit)
        self._started_s = time.monotonic()
        self._skipped: list[str] = []
        self._kept = self._rows_before() if options.resume else {}

    def attempt(
        self, key: Mapping[str, Any], work: Callable[[], Mapping[str, Any]], *, ours: bool = True,
    ) -> dict[str, Any] | None:
        """Measure one row: ``key`` and what ``work`` returns. None: it failed, or time is over.

        Args:
            ours: a failure counts; baselines may be missing.
        """
        label = _label(key)
        if (kept := self._kept.get(self._identity(key))) is not None:
            self.rows.append(kept)
            note(f"{label}: measured before, kept")
            return kept
        if self._is_broken or self._is_over:
            self._skipped.append(label)
            return None
        try:
            row = {**key, **work()}
        # Whatever a baseline or a kernel raises, the rows after it are still worth having.
        except Exception as error:
            self._fail(key, label, error, ours)
            return None
        self._add(row)
        note(f"[{time.monotonic() - self._started_s:6.1f} s] {label}: {_figures(row)}")
        return row

    def finish(self) -> int:
        """Say what was left out. Returns the exit status: 1 when something of ours failed."""
        if self._skipped:
            reason = "the device is in error" if self._is_broken else (
                f"the budget of {self.options.budget_s:g} s was over")
            note(f"{len(self._skipped)} not measured, {reason}: {'; '.join(self._skipped)}")
        return int(self.has_failed or self._is_broken)

    def _rows_before(self) -> dict[tuple[str, ...], dict[str, Any]]:
        """Return what an earlier run measured, by key; failures are tried again."""
        file = result_file(self.options.out, self.bench, self._about)
        rows = read_file(file)["rows"] if file.is_file() else []
        return {self._identity(row): row for row in rows if "error" not in row}

    def _identity(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return row_identity(row, KEY_FIELDS[self.bench])

    @property
    def _is_over(self) -> bool:
        budget_s = self.options.budget_s
        return budget_s is not None and time.monotonic() - self._started_s > budget_s

    def _add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        write_rows(self.options.out, self.bench, [row], self.device, about=self._about)

    def _fail(self, key: Mapping[str, Any], label: str, error: Exception, ours: bool) -> None:
        kind = "" if isinstance(error, CheckFailed | Unavailable | LongspanError) else (
            f"{type(error).__name__}: ")
        lines = str(error).strip().splitlines() or [""]
        message = kind + " ".join(lines[0].split())[:300]
        self.has_failed |= ours
        self._add({**key, "error": message})
        note(f"{label}: {'error' if ours else 'not measured'}: {message}")
        if self.device.startswith("cuda"):
            self._recover()

    def _recover(self) -> None:
        """Free what a failed measurement held; an error that stays ends the run."""
        try:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
        except RuntimeError as error:
            self._is_broken = True
            note(f"the device is in error, nothing more is measured: {str(error).splitlines()[0]}")


def _label(key: Mapping[str, Any]) -> str:
    values: list[Any] = []
    for value in key.values():
        values += value.values() if isinstance(value, Mapping) else [value]
    return " ".join(f"{value:,}" if isinstance(value, int) and value > 9999 else str(value)
                    for value in values if value is not None)


def _figures(row: Mapping[str, Any]) -> str:
    names = ("time_ms", "tflops", "tb_per_s", "density", "ttft_s", "step_ms", "floor_ms",
             "kv_tb_per_s", "peak_memory_gib", "workspace_mib", "rel_error", "ratio", "score",
             "slowdown_percent")
    return ", ".join(f"{name} {row[name]:.4g}" for name in names if row.get(name) is not None)
