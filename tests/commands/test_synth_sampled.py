"""``longspan synth pairs --model``: a model's own wrong answers, each question asked once."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from longspan.cli import run_command
from longspan.data.lines import read_lines
from longspan.eval import endpoint
from longspan.train.tokenizer import save_tokenizer, train_tokenizer
from tests.data.conftest import make_text
from tests.eval.nasty import FAULTS, NastyServer

TRIES = 3


def call(data_dir: Path, text: Path, out: Path, url: str, *options: object) -> int:
    """Exit status of the command."""
    given = [str(option) for option in options]
    return run_command([
        "synth", "pairs", str(text), "--tokenizer", str(data_dir / "tokenizer"), "--out", str(out),
        "--rows", "512=12", "--held-out", "0", "--model", "m", "--url", url, "--tries", str(TRIES),
        "--task", "needle=1", "--task", "absent=1", *given])


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [make_text(i, 300) for i in range(3)]
    save_tokenizer(train_tokenizer(texts, 700), folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text."""
    folder = tmp_path_factory.mktemp("sampled")
    for i in range(3):
        (folder / f"{i}.txt").write_text(make_text(i, 300))
    return folder


class Parrot:
    """Says the first long number of the text, whatever the question, from some try on."""

    def __init__(self, right_until: int = 0) -> None:
        self.right_until = right_until
        self.seen: Counter[str] = Counter()

    def __call__(self, messages: Any) -> str:
        """Return the reply."""
        content = messages[-1]["content"]
        self.seen[content] += 1
        number = re.findall(r"\d{4,}|[0-9a-f-]{36}|[a-z]+-[a-z]+", content)[0]
        return "I do not know." if self.seen[content] <= self.right_until else f"It is {number}."


def test_wrong_answers_become_pairs(data_dir: Path, text: Path, tmp_path: Path) -> None:
    out, nasty = tmp_path / "out", NastyServer(Parrot())
    with nasty.serve() as url:
        assert call(data_dir, text, out, url) == 0
    pairs = list(read_lines(out / "pairs-train.jsonl"))
    right = list(read_lines(out / "pairs-train-right.jsonl"))
    assert len(pairs) + len(right) == 12 and len(pairs) >= 8
    for pair in pairs:
        assert pair["rejected"].startswith("It is ") and pair["chosen"] != pair["rejected"]
        if pair["task"] == "absent":
            assert pair["why"] in ("another key's value", "invented value")
            assert not re.search(r"\d", pair["chosen"])
    for row in right:
        assert row["right"] == TRIES and row["task"] == "needle"
    temperatures = Counter(body["temperature"] for body in nasty.requests)
    assert temperatures[0.0] == 12 and temperatures[1.0] == (TRIES - 1) * len(right)
    assert {body["seed"] for body in nasty.requests} <= set(range(TRIES))
    card = json.loads((out / "pairs-card.json").read_text())
    assert card["model"] == "m" and sum(row["num_rows"] for row in card["rows"]) == len(pairs)


def test_a_refusal_is_right_where_the_text_does_not_say(
    data_dir: Path, text: Path, tmp_path: Path
) -> None:
    """The second answer of a try is taken when the first one was right."""
    out = tmp_path / "out"
    with NastyServer(Parrot(right_until=1)).serve() as url:
        assert call(data_dir, text, out, url) == 0
    pairs = list(read_lines(out / "pairs-train.jsonl"))
    assert {(pair["attempt"], pair["task"]) for pair in pairs} == {(0, "needle"), (1, "absent")}
    assert {pair["why"] for pair in pairs if pair["task"] == "needle"} == {"false refusal"}


def test_misfortunes_change_nothing_and_nothing_is_asked_twice(
    data_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.0)
    found = []
    for faults in ((), tuple(fault for fault in FAULTS if fault not in ("429", "silence"))):
        out, nasty = tmp_path / str(len(faults)), NastyServer(lambda messages: "12", faults)
        with nasty.serve() as url:
            assert call(data_dir, text, out, url) == 0
            lines = (out / "pairs-train.jsonl").read_bytes()
            found.append(lines)
            (out / "pairs-train.jsonl").write_bytes(lines[: len(lines) // 2])
            before = len(nasty.requests)
            assert call(data_dir, text, out, url, "--concurrency", 1) == 0
            assert len(nasty.requests) == before, "replies were kept"
            assert (out / "pairs-train.jsonl").read_bytes() == lines
            assert call(data_dir, text, out, url, "--temperature", 0.5) == 2
    assert found[0] == found[1]


def test_an_address_needs_the_name_of_a_model(
    data_dir: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["synth", "pairs", str(text), "--tokenizer", str(data_dir / "tokenizer"),
                        "--out", str(tmp_path / "out"), "--rows", "512=1", "--url",
                        "http://127.0.0.1:9/v1"]) == 2
    assert capsys.readouterr().err == "error: --url: name the model there by --model\n"
    with NastyServer(Parrot(), max_model_len=600).serve() as url:
        assert call(data_dir, text, tmp_path / "out", url) == 2
    assert "m takes 600 tokens" in capsys.readouterr().err
