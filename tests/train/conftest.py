"""A whole run of the toy recipe, which several files look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from longspan.cli import run_command

LINE = "The quick brown fox number {} jumps over the lazy dog and runs home.\n"
TOKENS = ("--tokens", "a=0.003", "--tokens", "b=0.002")


def make_text_files(folder: Path) -> None:
    for i in range(120):
        (folder / f"p{i % 6}").mkdir(parents=True, exist_ok=True)
        body = "".join(LINE.format(i * 1000 + j) for j in range(60))
        (folder / f"p{i % 6}" / f"f{i}.txt").write_text(body)


def train_toy(*arguments: object) -> int:
    """Exit status of the toy's training."""
    return run_command(["train", "nano", "--smoke", "--workers", "0", *map(str, arguments)])


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything, of small text: folder ``run``."""
    folder = tmp_path_factory.mktemp("nano")
    make_text_files(folder / "text")
    assert train_toy("--root", f"{folder / 'text'}=1", "--out", folder / "run", *TOKENS) == 0
    return folder / "run"
