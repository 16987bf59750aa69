"""Result files: every figure that the documentation quotes is a row of one.

``<bench>.<device>.json`` holds what was run, when, on what, and rows; a new run replaces the rows
with the same key and keeps the others.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from longspan.cores import num_cores
from longspan.errors import LongspanError
from longspan.units import GIB

KEY_FIELDS: dict[str, tuple[str, ...]] = {
    "cpu": ("model", "impl", "num_tokens", "threads"),
    "beside": ("model", "impl", "num_tokens", "attention", "threads", "weights"),
    "ops": ("op", "impl", "params"),
    "ttft": ("shape", "num_tokens", "attention", "plan", "layers", "gpus", "chunk_len",
             "quantization"),
    "cache": ("shape", "place", "num_tokens", "attention", "plan"),
    "decode": ("shape", "context_len", "batch_size", "layers", "rows", "kv_dtype",
               "quantization"),
    "quality": ("model", "num_tokens", "num_questions", "place", "attention", "chunk_len", "seed"),
    "serve": ("model", "scenario", "metric"),
    "pipeline": ("shape", "num_tokens", "attention", "cp", "pp", "tp", "plan", "limit", "source"),
    "eval": ("model", "task", "num_tokens", "depth", "attention"),
    "documents": ("model", "documents", "metric", "attention"),
    "fidelity": ("model", "task", "num_tokens", "attention"),
    "train": ("model", "phase"),
    "effects": ("effect", "task", "num_tokens"),
}
"""What identifies a row of each bench."""
ORIGIN = ("command", "date", "commit", "versions")
"""Facts of a run that its rows repeat; the device is the file's."""
PACKAGES = ("torch", "triton", "transformers", "numpy")


def write_rows(
    directory: Path, bench: str, rows: Sequence[Mapping[str, Any]], device: str = "cpu",
    summary: Mapping[str, Any] | None = None, about: Mapping[str, Any] | None = None,
) -> Path:
    """Merge rows into the bench's file for this device. Returns the file.

    What the head says holds for all rows but those of earlier runs, which say it themselves.

    Args:
        device: ``cpu`` or ``cuda``: what the rows were measured on.
        summary: figures derived from several rows, merged by name.
        about: a kept `describe_run`, for frequent writers: asking git and the driver takes time.
    """
    about = about or describe_run(device)
    file = result_file(directory, bench, about)
    old = read_file(file) if file.is_file() else {}
    kept = [_with_origin(row, old, about) for row in old.get("rows", [])]
    content = {"bench": bench, **about, "rows": merge_rows(kept, rows, KEY_FIELDS[bench])}
    if summary or old.get("summary"):
        content["summary"] = {**old.get("summary", {}), **(summary or {})}
    make_folder(directory)
    # Renaming is atomic: a run that is cut off leaves the old file or the new one.
    part = file.with_suffix(".part")
    try:
        part.write_text(_dump(content), encoding="utf-8")
        os.replace(part, file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise LongspanError(f"{file}: cannot be written ({error.strerror}); its old rows are kept: "
                            "make room or choose another folder with --out") from None
    return file


def result_file(directory: Path, bench: str, about: Mapping[str, Any]) -> Path:
    """Return where the bench's rows of a device are; ``about`` is that of `describe_run`."""
    return directory / f"{bench}.{_slug(about['device']['name'])}.json"


def row_identity(row: Mapping[str, Any], key: Sequence[str]) -> tuple[str, ...]:
    """Return what tells a row from others."""
    return tuple(json.dumps(row.get(name), sort_keys=True) for name in key)


def _with_origin(
    row: Mapping[str, Any], old: Mapping[str, Any], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a row of an earlier run, with what the file's head will say of another run."""
    origin = {name: old[name] for name in ORIGIN if name in old and old[name] != about[name]}
    return {**row, **{name: value for name, value in origin.items() if name not in row}}


def describe_run(device: str, commit_id: str | None = None) -> dict[str, Any]:
    """Return what a result file says about its run: command, date, commit, device, versions.

    Args:
        commit_id: where the source is a copy without git; default: asked of git.
    """
    return {
        "command": shlex.join(["longspan", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit_id or commit(), "device": describe_device(device), "versions": versions(),
    }


def make_folder(directory: Path) -> None:
    """Make a folder for result files. Raises `LongspanError` if it cannot be made."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LongspanError(
            f"{directory}: no folder for results ({error.strerror}); choose another with --out"
        ) from None


def read_file(file: Path) -> dict[str, Any]:
    """Read one result file. Raises `LongspanError` if it is not one."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LongspanError(
            f"{file}: not a result file ({error}); delete it and run again") from None
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise LongspanError(f"{file}: not a result file (no rows); delete it and run again")
    return content


def read_bench(directory: Path, bench: str) -> list[dict[str, Any]]:
    """Read the bench's files of all devices, by name."""
    return [read_file(file) for file in sorted(directory.glob(f"{bench}.*.json"))]


def merge_rows(
    old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]], key: Sequence[str]
) -> list[dict[str, Any]]:
    """Old rows with those of the same key replaced, then the others; sorted by key."""
    def order(row: Mapping[str, Any]) -> list[tuple[float, str]]:
        values = [row.get(name) for name in key]
        return [(value, "") if isinstance(value, int | float) else (-1, json.dumps(value))
                for value in values]

    merged = {row_identity(row, key): dict(row) for row in [*old, *new]}
    return sorted(merged.values(), key=order)


def describe_device(device: str) -> dict[str, Any]:
    """Name, count, memory and driver of what a bench ran on."""
    if device.startswith("cuda"):
        import torch

        properties = torch.cuda.get_device_properties(0)
        return {"name": properties.name, "count": torch.cuda.device_count(),
                "memory_gib": round(properties.total_memory / GIB, 1), "driver": _gpu_driver()}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"name": f"CPU {_cpu_name()}", "count": num_cores(),
            "memory_gib": round(memory / GIB, 1), "driver": None}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter for speed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Return the source's commit, with ``-dirty`` if it was changed since; None: no git."""
    root = Path(__file__).resolve().parents[2]
    name = _output_of(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"])
    if not name:
        return None
    changed = _output_of(["git", "-C", str(root), "status", "--porcelain", "--", "longspan"])
    return name + ("-dirty" if changed else "")


def _dump(content: Mapping[str, Any]) -> str:
    """JSON with one row a line, so that a diff shows which rows changed."""
    rows = ",\n".join("  " + json.dumps(row) for row in content["rows"])
    head = {key: value for key, value in content.items() if key != "rows"}
    return json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{rows}\n ]\n}}\n'


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found and found[1].strip().lower() != "unknown":
            return re.sub(r"\((R|TM)\)|@.*$|\bCPU\b", "", found[1]).strip()
    return platform.machine()


def _gpu_driver() -> str | None:
    found = _output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return found.splitlines()[0].strip() if found else None


def _output_of(command: Sequence[str]) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
