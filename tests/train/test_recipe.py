"""recipes/nano: the phases, and the whole chain on a toy."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest

from recipes import nano

LINE = "The quick brown fox number {} jumps over the lazy dog and runs home.\n"


def make_text_files(folder: Path) -> None:
    for i in range(120):
        (folder / f"p{i % 6}").mkdir(parents=True, exist_ok=True)
        body = "".join(LINE.format(i * 1000 + j) for j in range(60))
        (folder / f"p{i % 6}" / f"f{i}.txt").write_text(body)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["nano", *map(str, arguments)])
    nano.main()


def test_nano_has_the_five_phases_of_the_report() -> None:
    phases = nano.nano_phases()
    assert [p.seq_len for p in phases] == [4096, 32_768, 65_536, 131_072, 262_144]
    assert [p.rope_theta for p in phases] == [1e4, 1e6, 1e6, 5e6, 1e7]
    assert [p.full_share for p in phases] == [1.0, 1.0, 0.75, 0.75, 0.75]


def test_chain_from_text_files_to_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nano, "VOCAB_SIZE", 600)
    make_text_files(tmp_path / "text")
    data, out, model_dir = tmp_path / "data", tmp_path / "run", tmp_path / "model"
    call(monkeypatch, "corpus", "--root", f"{tmp_path / 'text'}=1", "--out", data)
    common = ("--smoke", "--data", data, "--out", out)
    tokens = ("--tokens", "a=0.002", "--tokens", "b=0.002")
    call(monkeypatch, "train", *common, "--workers", 0, *tokens)
    call(monkeypatch, "export", *common, *tokens, "--model-dir", model_dir)
    call(monkeypatch, "results", "--log", out / "log.jsonl", "--file", tmp_path / "train.cpu.json")
    assert (model_dir / "model.safetensors").is_file()
    assert (tmp_path / "train.cpu.json").is_file()


def test_a_run_that_ends_between_phases_exports_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Config and shards say what the weights were trained with, not what would have come next."""
    monkeypatch.setattr(nano, "VOCAB_SIZE", 600)
    data, out, shards = tmp_path / "data", tmp_path / "run", tmp_path / "shards"
    make_text_files(tmp_path / "text")

    def gate(*_: object) -> dict[str, object]:
        signal.raise_signal(signal.SIGTERM)
        return {}

    monkeypatch.setattr(nano, "run_gate", gate)
    call(monkeypatch, "corpus", "--root", f"{tmp_path / 'text'}=1", "--out", data)
    common = ("--smoke", "--data", data, "--out", out)
    call(monkeypatch, "train", *common, "--workers", 0, "--tokens", "a=0.002", "--shards", shards)
    call(monkeypatch, "export", *common, "--tokens", "a=0.002", "--model-dir", tmp_path / "state")
    call(monkeypatch, "export", *common, "--shards", shards, "--model-dir", tmp_path / "joined")
    for folder in (shards, tmp_path / "state", tmp_path / "joined"):
        config = json.loads((folder / "config.json").read_text())
        assert config["rope_theta"] == 1e4, folder
        assert config["dual_chunk_attention_config"]["chunk_size"] == 256, folder
    assert (tmp_path / "joined" / "model.safetensors").is_file()


def test_unknown_phase_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["train", "--smoke", "--data", "x", "--out", "y", "--tokens", "c=1"]
    with pytest.raises(ValueError, match="no phase named"):
        nano.chosen_phases(nano.parser().parse_args(arguments))
