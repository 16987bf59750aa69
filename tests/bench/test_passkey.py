"""`longspan eval passkey` end to end on a tiny model."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest

from longspan import cli
from longspan.bench import passkey
from longspan.commands import results
from tests.doubles import write_checkpoint

Capture = pytest.CaptureFixture[str]
TEXTS = str(Path(sysconfig.get_paths()["stdlib"]) / "json")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(
        tmp_path_factory.mktemp("tiny"), max_position_embeddings=8192,
        dual_chunk_attention_config={"chunk_size": 2048, "local_size": 256,
                                     "original_max_position_embeddings": 4096}))


def arguments(model: str, out: Path, *more: str) -> list[str]:
    return ["eval", "passkey", model, "--lengths", "2000,3000", "--questions", "3",
            "--haystacks", "2", "--distractors", "1", "--text-root", TEXTS, "--name", "tiny",
            "--device", "cpu", "--out", str(out), *more]


def test_rows_samples_and_table(model: str, tmp_path: Path, capsys: Capture) -> None:
    assert cli.run_command(arguments(model, tmp_path, "--positions", "rope,dca+yarn")) == 0
    captured = capsys.readouterr()
    assert "haystack 2/2" in captured.err and "sparse-dca+yarn" in captured.out
    (content,) = results.read_bench(tmp_path, "eval")
    rows = [row for row in content["rows"] if row["depth"] is None]
    assert {(row["num_tokens"], row["attention"]) for row in rows} == {
        (length, label) for length in (2000, 3000)
        for label in ("rope", "sparse-rope", "dca+yarn", "sparse-dca+yarn")}
    assert {(row["model"], row["n"], row["num_haystacks"]) for row in rows} == {("tiny", 3, 2)}
    lines = (tmp_path / "samples" / "passkey.tiny.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert len(samples) == 24
    # sparse prompts of one prefill chunk share nothing: their last tokens are computed densely
    followers = [sample for sample in samples if "/q1of2" in sample["key"]
                 and not sample["attention"].startswith("sparse")]
    assert len(followers) == 4 and all(sample["num_cached_tokens"] > 1000 for sample in followers)


def test_resume_asks_nothing_twice(
    model: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = arguments(model, tmp_path, "--attention", "dense", "--positions", "rope")
    assert cli.run_command(dense) == 0
    first = (tmp_path / "samples" / "passkey.tiny.jsonl").read_text()
    monkeypatch.setattr(passkey, "LLM", None)  # opening a model would fail
    assert cli.run_command([*dense, "--resume"]) == 0
    assert "nothing was left to do" in capsys.readouterr().err
    assert (tmp_path / "samples" / "passkey.tiny.jsonl").read_text() == first


def test_other_weights_or_options_are_other_samples(model: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "m", seed=1)
    bank = passkey.TextBank([Path(TEXTS) / "decoder.py"], passkey.Tokenizer(path))
    options = {"dtype": None, "num_threads": 1}
    first = passkey.fingerprint(path, bank, options)
    assert passkey.fingerprint(path, bank, {**options, "num_threads": 2}) == first
    assert passkey.fingerprint(path, bank, {**options, "dtype": "bfloat16"}) != first
    write_checkpoint(path, seed=2)
    assert passkey.fingerprint(path, bank, options) != first


@pytest.mark.parametrize(("more", "message"), [
    (["--attention", "auto"], "--attention: 'auto' is not one of dense, sparse"),
    (["--positions", "alibi"], "--positions: 'alibi'"),
    (["--lengths", "4k"], "--lengths: '4k' is not a number"),
    (["--lengths", "100"], "too short for 3 facts"),
    (["--text-root", "/no/such/folder"], "no such folder of texts"),
    (["--questions", "0"], "at least one question"),
])
def test_wrong_options(
    model: str, tmp_path: Path, capsys: Capture, more: list[str], message: str
) -> None:
    assert cli.run_command(arguments(model, tmp_path, *more)) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_auto_positions_are_named_as_what_they_are(
    model: str, tmp_path: Path, capsys: Capture
) -> None:
    assert cli.run_command(arguments(model, tmp_path, "--attention", "dense", "--lengths",
                                     "2000")) == 0
    assert "dca+yarn" in capsys.readouterr().out
