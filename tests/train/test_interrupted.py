"""Every piece of a run whose disk fills up, whose state is cut short, or that is told to end: one
line, nothing lost, and the same losses as without it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longspan.train.run_log import read_log
from tests.train.conftest import TOKENS, train_toy
from tests.train.test_state import full_disk

FULL = 100_000
"""Bytes that the logs need, and no state."""
PIECES = ("pretrain", "practice", "sft", "dpo")


def losses(folder: Path) -> list[float]:
    """Loss at the end of each phase of a piece."""
    return [row["loss"] for row in read_log(folder / "log.jsonl") if "phase" in row]


def copy_before(done: Path, out: Path, piece: str) -> Path:
    """Copy a run as it was before one of its pieces; returns that piece's folder."""
    names = ("data", *PIECES[: PIECES.index(piece)], "chat-short", "chat-mixed", "pairs")
    for name in names:
        shutil.copytree(done / name, out / name, symlinks=True)
    return out / piece


@pytest.mark.parametrize("piece", PIECES)
def test_a_full_disk_loses_nothing(
    done: Path, tmp_path: Path, piece: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_before(done, tmp_path, piece)
    arguments = ("--out", tmp_path, "--until", piece, *TOKENS)
    with full_disk(FULL):
        assert train_toy(*arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1
    assert "state.pt cannot be written" in printed
    assert not (folder / "model").exists() and not list(folder.glob("*.part"))
    assert train_toy(*arguments, "--time-limit-s", 0.1) == 0, "some steps, and not all"
    state = (folder / "state.pt").read_bytes()
    with full_disk(FULL):
        assert train_toy(*arguments) == 2
    assert (folder / "state.pt").read_bytes() == state, "what was saved before is still there"
    assert train_toy(*arguments) == 0
    assert (folder / "model" / "model.safetensors").read_bytes() == (
        done / piece / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("piece", PIECES)
def test_a_state_that_is_cut_short_is_one_line(
    done: Path, tmp_path: Path, piece: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a piece that begins anew, as the line advises, comes to the same losses."""
    folder = copy_before(done, tmp_path, piece)
    arguments = ("--out", tmp_path, "--until", piece, *TOKENS)
    shutil.copytree(done / piece, folder, ignore=shutil.ignore_patterns("model", "phases"))
    state = folder / "state.pt"
    state.write_bytes(state.read_bytes()[: state.stat().st_size // 2])
    assert train_toy(*arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and "state.pt" in printed
    assert not (folder / "model").exists()
    state.unlink()
    assert train_toy(*arguments) == 0
    assert losses(folder) == losses(done / piece)


def test_a_signal_to_all_processes_saves(done: Path, tmp_path: Path) -> None:
    """Schedulers end a job by a signal to each of its processes, those that make rows included."""
    folder = copy_before(done, tmp_path, "practice")
    command = [sys.executable, "-m", "longspan.cli", "train", "nano", "--smoke", "--workers", "2",
               "--out", str(tmp_path), "--until", "practice", "--tokens", "practice=4"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not losses_so_far(folder):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    assert "Traceback" not in printed and "stopped in phase practice" in printed
    assert (folder / "state.pt").is_file() and not (folder / "model").exists()


def losses_so_far(folder: Path) -> list[float]:
    """Losses of a run under way."""
    return losses(folder) if (folder / "log.jsonl").is_file() else []
