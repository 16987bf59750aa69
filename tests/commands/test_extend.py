"""``longspan train extend``: a checkpoint that is not ours; resumed, refused, and the result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from longspan.cli import run_command
from longspan.engine.front.llm import LLM
from longspan.engine.request import SamplingParams
from longspan.files.owned import owned_folder
from longspan.train.run_log import read_log
from tests.commands.checkpoints import make_checkpoint, make_text_folder

PHASES = ("--phase", "256:1e4:2048:1e-3", "--phase", "512:2e5:2048:1e-3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extend")
    make_text_folder(folder / "text", 60)
    make_checkpoint(folder / "base", vocab_size=700, max_positions=128)
    return folder


def call(folder: Path, out: Path, *options: object, corpus: str = "text") -> int:
    """Exit status of an extension by small phases of two and four steps."""
    given = [str(option) for option in options]
    phases = [] if "--phase" in given else PHASES
    to = [] if "--to" in given else ["--to", "512"]
    return run_command([
        "train", "extend", str(folder / "base"), "--corpus", str(folder / corpus), "--out",
        str(out), "--workers", "0", "--tokens-per-step", "512", *to, *phases, *given])


def losses(out: Path) -> list[float]:
    """Loss of the steps of each phase's end."""
    return [row["loss"] for row in read_log(out / "log.jsonl") if "phase" in row]


def states(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        logits: torch.Tensor = model(ids).logits
    return logits


def test_extends_and_answers_in_both_engines(folder: Path, tmp_path: Path) -> None:
    assert call(folder, tmp_path / "out", "--join-short") == 0
    model = tmp_path / "out" / "model"
    before, after = (json.loads((path / "config.json").read_text())
                     for path in (folder / "base", model))
    assert after["rope_theta"] == after["rope_parameters"]["rope_theta"] == 2e5
    assert after["dual_chunk_attention_config"]["original_max_position_embeddings"] == 512
    assert after["max_position_embeddings"] > 512 and after["use_cache"]
    changed = {"rope_theta", "rope_parameters", "dual_chunk_attention_config", "dtype",
               "max_position_embeddings", "torch_dtype"}
    assert {k: v for k, v in after.items() if k not in changed} == {
        k: v for k, v in before.items() if k not in changed}
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (model / name).read_bytes() == (folder / "base" / name).read_bytes()
    rows = read_log(tmp_path / "out" / "log.jsonl")
    measured = [row["held_out_bits_per_byte"] for row in rows if "gate" in row]
    assert len(measured) == 3 and measured[-1] < measured[0]
    assert (tmp_path / "out" / "log.svg").read_text().startswith("<?xml")
    ids = list(range(40, 90))
    plain = states(model, torch.tensor([ids]))[0, -1]
    llm = LLM(str(model), device="cpu", attention="dense")
    answer = llm.generate([ids], SamplingParams(max_tokens=1))[0]
    assert answer.token_ids[0] == plain.argmax().item()
    assert (states(folder / "base", torch.tensor([ids]))[0, -1] - plain).abs().max() > 1e-3


def test_resumed_runs_have_the_same_losses(folder: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert call(folder, whole, "--join-short") == 0
    assert call(folder, parts, "--join-short", "--time-limit-s", 1e-3) == 0
    assert (parts / "state.pt").is_file() and not (parts / "model").exists()
    assert call(folder, parts, "--join-short") == 0
    assert losses(parts)[-1] == losses(whole)[-1]
    first, second = (torch.load(out / "state.pt")["model"] for out in (whole, parts))
    assert all((first[name] == second[name]).all() for name in first)
    assert call(folder, parts, "--join-short") == 0, "nothing is left to do"


def test_a_corpus_that_is_there_is_not_made_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several runs over one text, as ablations are: the same losses, and no second corpus."""
    assert call(folder, tmp_path / "first", "--join-short") == 0
    data = tmp_path / "first" / "data"
    assert call(folder, tmp_path / "second", "--join-short", corpus=str(data)) == 0
    assert losses(tmp_path / "second") == losses(tmp_path / "first")
    assert not (tmp_path / "second" / "data").exists()
    tokenizer = json.loads((data / "tokenizer" / "tokenizer.json").read_text())
    tokenizer["added_tokens"].pop()
    (data / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer))
    capsys.readouterr()
    assert call(folder, tmp_path / "third", "--join-short", corpus=str(data)) == 2
    assert_one_line(capsys, "is in the tokens of another tokenizer: make it with --tokenizer")


@pytest.mark.parametrize(("options", "message"), [
    (("--seed", 1), "another data seed"),
    (("--phase", "256:1e4:2048:1e-3", "--phase", "512:1e6:2048:1e-3"), "another phase 512"),
    (("--synthetic", 0.25), "another mixture"),
    (("--held-out", 0.1), "was made from other files"),
])
def test_resuming_with_another_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[Any, ...],
    message: str,
) -> None:
    assert call(folder, tmp_path / "out", "--join-short", "--time-limit-s", 1e-3) == 0
    before = (tmp_path / "out" / "state.pt").read_bytes()
    capsys.readouterr()
    assert call(folder, tmp_path / "out", "--join-short", *options) == 2
    assert_one_line(capsys, message)
    assert (tmp_path / "out" / "state.pt").read_bytes() == before


@pytest.mark.parametrize(("corpus", "options", "message"), [
    ("none", (), "is no file or folder"),
    ("empty", (), "no text that can be used"),
    ("tiny", (), "one document alone"),
    ("text", ("--phase", "1k:2e5:2048:1e-3", "--to", "1k", "--tokens-per-step", "1024"),
     "a document of 512 is needed"),
    ("text", ("--join-short", "--to", "128", "--phase", ""), "write LENGTH:BASE:TOKENS:RATE"),
    ("text", ("--to", "1024"), "the last phase has rows of 512"),
    ("text", ("--to", "x"), "write tokens, such as"),
    ("text", ("--join-short", "--phase", "64k:1e6:65536:1e-4", "--to", "64k",
              "--tokens-per-step", "65536"), "rows of 65,536 tokens: all training text has"),
    ("records.jsonl", ("--column", "body"), "body"),
])
def test_bad_input_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], corpus: str,
    options: tuple[Any, ...], message: str,
) -> None:
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "tiny").mkdir(exist_ok=True)
    shutil.copyfile(folder / "text" / "008.txt", folder / "tiny" / "one.txt")
    (folder / "records.jsonl").write_text('{"text": "some text"}\n')
    assert call(folder, tmp_path / "out", *options, corpus=corpus) == 2
    assert_one_line(capsys, message)
    assert not (tmp_path / "out" / "model").exists()
    assert call(folder, tmp_path / "out", "--join-short") == 0, "no debris blocks the next run"


def test_a_broken_checkpoint_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "base", tmp_path / "base")
    (tmp_path / "text").symlink_to(folder / "text")
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-500])
    assert call(tmp_path, tmp_path / "out", "--join-short") == 2
    assert_one_line(capsys, "the weights cannot be loaded")


def test_a_folder_of_other_things_is_left_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert call(folder, tmp_path, "--join-short") == 2
    assert_one_line(capsys, "has other files (thesis.txt)")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_that_another_run_writes_to_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with owned_folder(tmp_path):
        assert call(folder, tmp_path, "--join-short") == 2
    assert_one_line(capsys, "another run is writing there")
    assert not list(tmp_path.iterdir())


def test_a_dry_run_says_what_it_takes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(folder, tmp_path / "out", "--dry-run", "--gpus", 2, "--context-parallel", 2) == 0
    printed = capsys.readouterr().out
    assert "2 GPUs" in printed and "512" in printed and "total" in printed
    assert not (tmp_path / "out").exists()
    assert call(folder, tmp_path / "out", "--dry-run", "--gpu-memory-gib", 0.1) == 2
    assert_one_line(capsys, "phase 256: rows of 256 tokens need")


def assert_one_line(capsys: pytest.CaptureFixture[str], message: str) -> None:
    printed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(printed) == 1 and message in printed[0], printed
