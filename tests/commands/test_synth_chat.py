"""``longspan synth chat`` and ``pairs``: same seed, same rows, also after a cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longspan.cli import run_command
from longspan.data.lines import read_lines
from longspan.train.tokenizer import save_tokenizer, train_tokenizer
from tests.data.conftest import make_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``text`` with 12 files, and a tokenizer."""
    folder = tmp_path_factory.mktemp("chat")
    (folder / "text").mkdir()
    texts = [make_text(i, 120 + 40 * i) for i in range(12)]
    for i, text in enumerate(texts):
        (folder / "text" / f"{i:02}.txt").write_text(text)
    save_tokenizer(train_tokenizer(texts, 700), folder / "tokenizer")
    return folder


def call(form: str, folder: Path, out: Path, *options: object) -> int:
    """Exit status of the command."""
    given = [str(option) for option in options]
    usual = [] if "--rows" in given else ["--rows", "512=12", "--rows", "2048=6"]
    usual += [] if "--workers" in given else ["--workers", "1"]
    return run_command(["synth", form, str(folder / "text"), "--tokenizer",
                        str(folder / "tokenizer"), "--out", str(out), "--held-out", "0.1", *usual,
                        *given])


def rows_of(file: Path) -> list[dict[str, Any]]:
    return list(read_lines(file))


def test_rows_pairs_and_chat_share_a_corpus(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for form in ("chat", "pairs"):
        assert call(form, folder, out, "--licence", "CC0") == 0
    assert call("rows", folder, out, "--rows", "512=4", "--join-short") == 0
    chat, pairs = rows_of(out / "chat-train.jsonl"), rows_of(out / "pairs-train.jsonl")
    assert len(chat) == len(pairs) == 18
    assert {"messages", "task", "num_tokens"} == set(chat[0])
    assert {"messages", "chosen", "rejected", "task", "why", "num_tokens"} == set(pairs[0])
    assert max(row["num_tokens"] for row in chat) > 1024, "long ones among short ones"
    assert len(rows_of(out / "chat-held_out.jsonl")) == 2
    card = json.loads((out / "pairs-card.json").read_text())
    assert card["licence"] == "CC0" and card["seed"] == 0
    train = [row for row in card["rows"] if row["split"] == "train"]
    assert sum(row["num_rows"] for row in train) == 18
    assert sum(sum(row["why"].values()) for row in train) == 18


@pytest.mark.parametrize("form", ["chat", "pairs"])
def test_a_cut_run_goes_on_with_the_same_rows(folder: Path, tmp_path: Path, form: str) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for out, workers in ((whole, 1), (cut, 2)):
        assert call(form, folder, out, "--workers", workers) == 0
    names = [f"{form}-train.jsonl", f"{form}-held_out.jsonl", f"{form}-card.json"]
    assert [(whole / name).read_bytes() for name in names] == [
        (cut / name).read_bytes() for name in names]
    data = (cut / names[0]).read_bytes()
    (cut / names[0]).write_bytes(data[: len(data) // 2])
    (cut / names[1]).unlink()
    assert call(form, folder, cut) == 0
    assert (cut / names[0]).read_bytes() == data
    assert (cut / names[1]).read_bytes() == (whole / names[1]).read_bytes()
    assert call(form, folder, cut, "--seed", 1) == 2
    assert call(form, folder, tmp_path / "seed", "--seed", 1) == 0
    assert (tmp_path / "seed" / names[0]).read_bytes() != data


@pytest.mark.parametrize(("form", "options", "message"), [
    ("chat", ("--rows", "100=1"), "row length 100 is below 512"),
    ("pairs", ("--rows", "9000=1"), "pairs of 9,000 tokens: at most 8,192"),
    ("chat", ("--task", "nothing=1"), "no task named nothing: choose from needle,"),
    ("chat", ("--rows", "1000000=1"), "rows of 1,000,000 tokens: all training text has"),
    ("chat", ("--include", "*.md"), "no text that can be used: 12 not included"),
    ("pairs", ("none",), "none is no file or folder")])
def test_mistakes_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str,
    options: tuple[str, ...], message: str
) -> None:
    assert call(form, folder, tmp_path / "out", *options) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and message in printed
    assert not list(tmp_path.rglob("*.jsonl"))
