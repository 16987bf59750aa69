"""``longspan synth``: any tokenizer, deterministic, goes on after a cut, one line for mistakes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from longspan.cli import run_command
from longspan.commands import synth
from longspan.files.owned import owned_folder
from longspan.train.tokenizer import save_tokenizer, train_tokenizer
from tests.data.conftest import make_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``text`` with 20 files and three tokenizers: ``byte``, ``large``, ``spaces``."""
    folder = tmp_path_factory.mktemp("synth")
    (folder / "text").mkdir()
    texts = [make_text(i, 120 + 40 * i) for i in range(20)]
    for i, text in enumerate(texts):
        (folder / "text" / f"{i:02}.txt").write_text(text)
    byte = train_tokenizer(texts, 700)
    save_tokenizer(byte, folder / "byte")
    byte.add_tokens([f"<w{i}>" for i in range(700, 70_000)])
    save_tokenizer(byte, folder / "large")
    spaces = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    spaces.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spaces.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0)])
    spaces.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    spaces.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=[chr(c) for c in range(33, 127)]))
    save_tokenizer(spaces, folder / "spaces")
    return folder


def call(folder: Path, out: Path, *options: object, tokenizer: str = "byte") -> int:
    """Exit status of the command over the folder's text."""
    given = [str(option) for option in options]
    rows = [] if "--rows" in given else ["--rows", "512=24", "--rows", "1_024=6"]
    usual = [] if "--tokenizer" in given else ["--tokenizer", str(folder / tokenizer)]
    usual += [] if "--workers" in given else ["--workers", "1"]
    return run_command(["synth", str(folder / "text"), "--out", str(out), *usual, *rows, *given])


def read_rows(out: Path, pattern: str = "train-*.parquet") -> list[dict[str, Any]]:
    return [row for file in sorted(out.glob(pattern))
            for row in pyarrow.parquet.read_table(file).to_pylist()]


@pytest.mark.parametrize("name", ["byte", "large", "spaces"])
def test_rows_for_any_tokenizer(folder: Path, tmp_path: Path, name: str) -> None:
    assert call(folder, tmp_path / "out", "--join-short", "--licence", "CC0",
                tokenizer=name) == 0
    rows = read_rows(tmp_path / "out")
    assert [row["length"] for row in rows] == [512] * 24 + [1024] * 6
    tokenizer = Tokenizer.from_file(str(folder / name / "tokenizer.json"))
    for row in rows:
        assert len(row["input_ids"]) == len(row["loss_weights"]) == row["length"]
        assert set(row["loss_weights"]) <= {0.0, 1.0, 2.0, 5.0} and row["loss_weights"][0] == 0
        assert len(row["distances"]) == len(row["answer_starts"]) == len(row["answer_stops"])
        assert max(row["input_ids"]) < tokenizer.get_vocab_size()
    schema = pyarrow.parquet.read_schema(next((tmp_path / "out").glob("train-*.parquet")))
    assert str(schema.field("input_ids").type) == "list<element: uint32>"
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["licence"] == "CC0" and card["seed"] == 0
    assert sum(r["num_rows"] for r in card["rows"] if r["split"] == "train") == 30
    assert sum(r["num_rows"] for r in card["rows"] if r["split"] == "held_out") == 2
    kept, = card["table"]
    assert (kept["fate"], kept["num_files"]) == ("kept", 20)
    assert kept["num_tokens"] == card["num_train_tokens"] + card["num_held_out_tokens"]
    assert (tmp_path / "out" / "card.svg").stat().st_size > 1000


def test_spaces_are_not_doubled_where_texts_are_joined(folder: Path, tmp_path: Path) -> None:
    """A tokenizer that begins each text with a space: rows are lines as they were in the text."""
    assert call(folder, tmp_path / "out", "--join-short", "--task", "copy=1", "--packed", 0,
                tokenizer="spaces") == 0
    tokenizer = Tokenizer.from_file(str(folder / "spaces" / "tokenizer.json"))
    lines = {line for file in (folder / "text").iterdir()
             for line in file.read_text().splitlines()}
    known = total = 0
    for row in read_rows(tmp_path / "out"):
        text = tokenizer.decode(row["input_ids"], skip_special_tokens=False)
        found = text.replace("</s>", "\n").split("\n")[1:-1]
        assert sum(line.startswith(" ###") for line in found) == 0
        known += sum(line in lines for line in found)
        total += len(found)
    assert known > 0.75 * total


def test_a_cut_run_goes_on_with_the_same_rows(folder: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for out in (whole, cut):
        assert call(folder, out, "--join-short") == 0
    files = sorted(file.name for file in cut.glob("*.parquet"))
    assert len(files) == 4
    for name in files[1:]:
        (cut / name).unlink()
    (cut / f"{files[1]}.part").write_text("half")
    (cut / "card.json").unlink()
    kept = (cut / files[0]).stat().st_mtime_ns
    assert call(folder, cut, "--join-short") == 0
    assert (cut / files[0]).stat().st_mtime_ns == kept and not list(cut.glob("*.part"))
    for name in [*files, "card.json"]:
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_workers_and_seeds(folder: Path, tmp_path: Path) -> None:
    outs = {}
    for name, options in {"one": (), "two": ("--workers", 2), "seed": ("--seed", 1)}.items():
        assert call(folder, tmp_path / name, "--join-short", *options) == 0
        outs[name] = read_rows(tmp_path / name)
    assert outs["one"] == outs["two"] and outs["one"] != outs["seed"]


def test_other_options_or_files_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder never holds rows of two kinds."""
    texts = tmp_path / "texts"
    shutil.copytree(folder / "text", texts)
    given = ["synth", str(texts), "--tokenizer", str(folder / "byte"), "--out",
             str(tmp_path / "out"), "--rows", "512=2", "--join-short", "--workers", "1"]
    assert run_command(given) == 0
    before = {file: file.read_bytes() for file in (tmp_path / "out").glob("*.parquet")}
    large = [str(folder / "large") if part == str(folder / "byte") else part for part in given]
    for more in (["--seed", "1"], ["--min-chars", "300"], ["--held-out", "0.3"],
                 ["--answer-weight", "1"], ["--task", "fim=1"], ()):
        assert run_command([*(given if more else large), *more]) == 2, more
        assert "was made from other files or options" in capsys.readouterr().err
    assert run_command([*given, "--licence", "MIT"]) == 0
    (texts / "00.txt").write_text(make_text(99, 200))
    assert run_command(given) == 2
    assert {file: file.read_bytes() for file in (tmp_path / "out").glob("*.parquet")} == before


def test_killed_anywhere_it_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed leaves nothing that stops the next run."""
    out, code = tmp_path / "out", "from longspan.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "synth", str(folder / "text"), "--tokenizer",
         str(folder / "byte"), "--out", str(out), "--rows", "512=40000", "--workers", "1",
         "--join-short"], stdout=subprocess.DEVNULL)
    while not (out / "rows.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    monkeypatch.setattr(synth, "make_rows", lambda job, shards: None)
    monkeypatch.setattr(synth, "write_card", lambda job, meta, shards: None)
    assert call(folder, out, "--join-short", "--rows", "512=40000") == 0
    assert call(folder, out, "--join-short", "--rows", "512=30000") == 2


def test_an_interrupt_ends_workers_too(folder: Path, tmp_path: Path) -> None:
    """As a terminal sends it: to all processes at once. Files are small, so that the first of many
    is soon there, and what nobody has begun is not made."""
    # Python takes no notice of interrupts where its parent ignores them, as background jobs do.
    code = ("import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "from longspan.data import shards; shards.SHARD_TOKENS = 1 << 15\n"
            "from longspan.cli import main; main()")
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "synth", str(folder / "text"), "--tokenizer",
         str(folder / "byte"), "--out", str(out), "--rows", "512=12000", "--workers", "2",
         "--join-short"], stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        while not list(out.glob("*.parquet.part")) and not list(out.glob("*.parquet")):
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=120) == 130
        assert len(list(out.glob("*.parquet"))) < 90, "there would be 188 and more"
    finally:
        process.kill()


def test_loss_weights_are_those_asked_for(folder: Path, tmp_path: Path) -> None:
    assert call(folder, tmp_path / "out", "--task", "needle=1", "--packed", 0,
                "--answer-weight", 3, "--copy-weight", 1, "--join-short") == 0
    for row in read_rows(tmp_path / "out"):
        weights = np.array(row["loss_weights"])
        assert row["task"] == "needle" and set(weights) <= {0.0, 1.0, 3.0}
        for start, stop in zip(row["answer_starts"], row["answer_stops"], strict=True):
            assert (weights[start:stop] == 3.0).all()


@pytest.mark.parametrize(("options", "message"), [
    (("--rows", "100=1"), "row length 100 is below 128"),
    (("--rows", "512"), "--rows 512: write NAME=NUMBER"),
    (("--rows", "512=0"), "--rows 512=0: write NAME=NUMBER"),
    (("--task", "nothing=1"), "no task named nothing: choose from"),
    (("--task", "fim=-1"), "--task fim=-1: write NAME=NUMBER"),
    (("--compressed", "1:0"), "--compressed 1:0: write LOW:HIGH"),
    (("--min-chars", "10000000"), "no text that can be used: 20 shorter than 10,000,000"),
    (("--include", "*.md"), "no text that can be used: 20 not included"),
    (("--task", "fim=1", "--rows", "90000=1"),
     "fim in rows of 90,000 tokens: a document of 45,000 is needed, the longest has"),
    (("--rows", "1000000=1", "--join-short"), "rows of 1,000,000 tokens: all training text has"),
    (("--held-out", "0", "--tokenizer", "none"), "no tokenizer none"),
    (("--split", "x", "datasets:none-of-this/name"), "cannot be read"),
    (("none",), "none is no file or folder"),
])
def test_mistakes_are_one_line_and_leave_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr("longspan.data.documents.hub_records", no_hub)
    assert call(folder, tmp_path / "out", *options) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and message in printed
    assert not list(tmp_path.rglob("*.parquet")) and not list(tmp_path.rglob("*.part"))
    assert not (tmp_path / "out" / "rows.json").exists()


def no_hub(name: str, split: str, column: str) -> None:
    """What the reader of the hub does without a network."""
    from longspan.errors import LongspanError
    raise LongspanError(f"data set {name}, split {split}: cannot be read")


def test_held_out_rows_are_no_longer_than_held_out_text(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(folder, tmp_path / "out", "--join-short", "--rows", "8000=2") == 0
    assert "no held-out rows of 8,000 tokens and more" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "out").glob("*.parquet")] == [
        "train-0008000-00000.parquet"]


def test_other_folders_are_not_touched(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("x")
    assert call(folder, tmp_path) == 2
    assert call(folder, tmp_path / "mine") == 2
    assert "has other files" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(("module", "function"), [
    (pyarrow.parquet, "write_table"), (np, "save"), (Path, "write_text")])
def test_no_room_on_the_disk_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, module: object, function: str
) -> None:
    """Whatever it is that does not fit: rows, the corpus, the tokenizer."""
    def full(*_: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, function, full)
        assert call(folder, tmp_path / "out", "--join-short") == 2
    printed = capsys.readouterr().err
    assert "cannot be written (No space left on device; " in printed and printed.count("\n") == 1
    assert not list(tmp_path.rglob("*.part"))
    assert call(folder, tmp_path / "out", "--join-short") == 0


@pytest.mark.parametrize("form", ["rows", "chat", "pairs"])
def test_a_folder_that_another_run_writes_to_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str,
) -> None:
    """Two of them would take each other's unfinished files away."""
    with owned_folder(tmp_path):
        assert run_command(["synth", form, str(folder / "text"), "--tokenizer",
                            str(folder / "byte"), "--out", str(tmp_path), "--rows", "512=2"]) == 2
    assert "another run is writing there" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
