"""Result rows of a training run, from its log (their format: bench/results)."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from longspan.files.whole import make_folder, replace_file
from longspan.train.run_log import BEFORE, read_log

WINDOW = 10


def phase_rows(log: list[dict[str, Any]], model: str) -> list[dict[str, Any]]:
    """One row per phase: tokens, seconds, TFLOP/s of its steps (median), mean loss and bits per
    byte of its last log rows, and the gate's numbers when it had one; the first phase's row also
    has those of the model before it."""
    rows: list[dict[str, Any]] = []
    names = list(dict.fromkeys(r["phase"] for r in log if "phase" in r))
    for name in names:
        steps = [r for r in log if r.get("phase") == name]
        before = [r for r in log if "phase" in r and names.index(r["phase"]) < names.index(name)]
        start = max((r["num_tokens"] for r in before), default=0)
        tokens = max(r["num_tokens"] for r in steps) - start
        seconds = sum(r["seconds"] for r in steps)
        last = steps[-WINDOW:]
        hits = [r["answer_accuracy"] for r in last if r["answer_accuracy"] is not None]
        row = {
            "model": model, "phase": name, "num_tokens_trained": tokens,
            "seconds": round(seconds, 2), "tokens_per_s": round(tokens / seconds),
            "tflops": round(median(r["tflops"] for r in steps), 1),
            "loss": round(sum(r["loss"] for r in last) / len(last), 4),
            "bits_per_byte": round(sum(r["bits_per_byte"] for r in last) / len(last), 4),
            "answer_accuracy": round(sum(hits) / len(hits), 5) if hits else None,
            "peak_memory_gib": round(max(r["peak_memory_gib"] for r in steps), 1)}
        gates = [r for r in log if r.get("gate") == name]
        row["gate"] = {k: v for k, v in gates[-1].items() if k != "gate"} if gates else None
        rows.append(row)
    untrained = [r for r in log if r.get("gate") == BEFORE]
    if rows and untrained:
        rows[0]["before"] = {k: v for k, v in untrained[-1].items() if k != "gate"}
    return rows


def device_facts(count: int = 1) -> dict[str, Any]:
    """Device and versions of this machine, for the run's own log."""
    device: dict[str, Any] = {"name": platform.processor() or "cpu", "count": count}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device = {
            "name": properties.name, "count": count,
            "memory_gib": round(properties.total_memory / 2**30, 1), "driver": _driver()}
    versions = {
        "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__}
    return {"device": device, "versions": versions}


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_results(
    log_file: Path, out_file: Path, *, model: str, command: str, commit: str
) -> dict[str, Any]:
    """Write the result file of a run; device and versions come from the log's ``start`` row."""
    log = read_log(log_file)
    start = next((r for r in log if "device" in r), device_facts())
    result = {
        "bench": "train", "command": command, "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit, "device": start["device"], "versions": start["versions"],
        "rows": phase_rows(log, model)}
    make_folder(out_file.parent)
    text = json.dumps(result, indent=1) + "\n"
    replace_file(out_file, lambda out: out.write(text.encode()))
    return result
