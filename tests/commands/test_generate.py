"""`longspan generate` over documents: each under its name, read once, every question answered."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longspan import cli
from longspan.bench.documents.pdf import pdf_bytes
from longspan.commands.generate import choose_sampling, describe_sampling
from longspan.engine.front.llm import LLM
from longspan.engine.request import SamplingParams
from tests.doubles import write_checkpoint

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[Any]]:
    """The conversations that the model is given."""
    seen: list[Sequence[Any]] = []
    stream = LLM.stream_chat

    def spy(self: LLM, messages: Sequence[Any], *rest: Any) -> Any:
        seen.append(list(messages))
        return stream(self, messages, *rest)

    monkeypatch.setattr(LLM, "stream_chat", spy)
    return seen


def run(model: Path, *arguments: str) -> int:
    return cli.run_command(["generate", str(model), "--device", "cpu", "--max-tokens", "3",
                            *arguments])


def type_in(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_forty_files_and_a_pdf_under_their_names(
    capsys: Capture, model: Path, tmp_path: Path, asked: list[Sequence[Any]]
) -> None:
    folder = tmp_path / "cases"
    folder.mkdir()
    for i in range(40):
        (folder / f"case-{i:02}.md").write_text(f"Case {i} is about item {i * i}.\n")
    (folder / "notes.bin").write_bytes(b"\0")
    (tmp_path / "report.pdf").write_bytes(pdf_bytes("The report."))
    assert run(model, "--document", str(folder), "--document", str(tmp_path / "report.pdf"),
               "--question", "Which?") == 0
    ((message,),) = asked
    for i in range(40):
        assert f"===== cases/case-{i:02}.md =====\nCase {i} is" in message["content"]
    assert message["content"].endswith("===== report.pdf =====\nThe report.\n\nWhich?")
    shown = capsys.readouterr().err
    assert "41 documents, " in shown and "cases/case-39.md" in shown
    assert "binary" in shown and "cases/notes.bin" in shown


def test_many_files_are_summed_up(capsys: Capture, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i:02}.txt").write_text("x" * (i + 1))
    assert run(model, "--document", str(folder), "--question", "Which?") == 0
    shown = capsys.readouterr().err
    assert "60 documents, 1,830 tokens" in shown
    assert "10 shorter ones" in shown and "55" in shown  # 1 to 10 tokens, together 55
    assert "d/59.txt" in shown and "d/00.txt" not in shown


def test_every_question_is_asked_on_its_own_and_the_document_is_read_once(
    capsys: Capture, model: Path, tmp_path: Path, asked: list[Sequence[Any]]
) -> None:
    file = tmp_path / "a.txt"
    file.write_text("x" * 1500)
    questions = ["What?", "Where?", "When?"]
    arguments = [f"--question={question}" for question in questions]
    assert run(model, "--document", str(file), "--json", *arguments) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["question"] for row in rows] == questions
    assert [row["num_cached_tokens"] for row in rows] == [0, 1408, 1408]
    assert rows[0]["documents"] == [{"name": "a.txt", "num_tokens": 1500}]
    assert rows[0]["left_out"] == []
    assert [len(messages) for messages in asked] == [1, 1, 1]
    assert run(model, "--document", str(file), *arguments) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("> ")] == [
        "> What?", "> Where?", "> When?"]


def test_typed_questions_follow_each_other(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path,
    asked: list[Sequence[Any]],
) -> None:
    (tmp_path / "a.txt").write_text("text")
    type_in(monkeypatch, "What?\n\n Où?".encode())
    assert run(model, "--document", str(tmp_path / "a.txt")) == 0
    assert [[message["role"] for message in messages] for messages in asked] == [
        ["user"], ["user", "assistant", "user"]]
    assert asked[1][-1]["content"] == "Où?"
    assert asked[1][0]["content"] == "===== a.txt =====\ntext\n\nWhat?"
    assert capsys.readouterr().out.count("> ") >= 2
    type_in(monkeypatch, b"Wh\xe9t?")
    assert run(model, "--document", str(tmp_path / "a.txt")) == 2
    assert "standard input: not UTF-8 text (byte 0xe9)" in capsys.readouterr().err


def test_nothing_to_ask_is_said_before_anything_is_loaded(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "a.txt"
    file.write_text("text")
    missing = tmp_path / "no model"
    for stdin, document in ((None, str(file)), (sys.stdin, "-")):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert run(missing, "--document", document) == 2
        assert "there is nothing to ask: give --question" in capsys.readouterr().err
    assert run(missing, "--document", str(file), "--question", " ") == 2
    assert "--question is empty" in capsys.readouterr().err
    assert run(missing, "--document", str(file), "--prompt-file", str(file)) == 2
    assert "not both" in capsys.readouterr().err
    assert run(missing) == 2
    assert "give --document, files and folders to ask about" in capsys.readouterr().err


def test_one_value_for_one_option(capsys: Capture, model: Path, tmp_path: Path) -> None:
    """In every command; click would take the last one without a word."""
    for arguments in (["generate", str(model), "--prompt-file", "a", "--prompt-file", "b"],
                      ["info", "nano", "--length", "5", "--length=6"],
                      ["eval", "run", "nano", "--seed", "1", "--seed", "1"],
                      ["bench", "cpu", "--threads", "1", "--threads", "2"],
                      ["synth", "x", "--out", "a", "--out", "b"]):
        assert cli.run_command(arguments) == 2
        option = next(part for part in arguments if part.startswith("--"))
        assert f"{option} is given twice; give it once" in capsys.readouterr().err


def test_the_checkpoint_says_how_to_sample(
    capsys: Capture, tmp_path: Path, model: Path
) -> None:
    assert choose_sampling(str(model), {"temperature": None}).temperature == 0
    advised = write_checkpoint(tmp_path / "advised", max_position_embeddings=256)
    (advised / "generation_config.json").write_text(
        '{"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}')
    taken = choose_sampling(str(advised), {"temperature": None, "top_k": 5, "max_tokens": 9})
    assert taken == SamplingParams(max_tokens=9, temperature=0.7, top_p=0.8, top_k=5,
                                   repetition_penalty=1.1)
    assert describe_sampling(taken) == "temperature 0.7, top_k 5, top_p 0.8, repetition_penalty 1.1"
    assert describe_sampling(SamplingParams(temperature=0)) == "the most probable token"
    (tmp_path / "a.txt").write_text("text")
    assert run(advised, "--prompt-file", str(tmp_path / "a.txt")) == 0
    assert "temperature 0.7, top_k 20" in capsys.readouterr().err


def test_help_and_version(capsys: Capture) -> None:
    for arguments in (["-h"], ["generate", "-h"], ["bench", "cpu", "-h"], ["eval", "run", "-h"]):
        assert cli.run_command(arguments) == 0
        assert "-h, --help" in capsys.readouterr().out
    assert cli.run_command(["--version"]) == 0
    assert capsys.readouterr().out.startswith("longspan 0.")


def test_sources_of_answers(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
) -> None:
    """Where the answer's words stand, as lines and in JSON; without documents there is none."""
    (tmp_path / "a.txt").write_text("The harbour opened in 1931.")
    (tmp_path / "b.pdf").write_bytes(pdf_bytes("The library of Orlen", "was led by Mara Voss."))
    stream = LLM.stream_chat

    def answer(self: LLM, *arguments: Any) -> Any:
        for event in stream(self, *arguments):
            output = getattr(event, "output", None)
            yield replace(event, output=replace(output, text="Mara Voss.")) if output else event

    monkeypatch.setattr(LLM, "stream_chat", answer)
    arguments = [f"--document={tmp_path / name}" for name in ("a.txt", "b.pdf")]
    assert run(model, *arguments, "--question", "Who led it?", "--sources") == 0
    out = capsys.readouterr().out
    assert out.endswith('Source: b.pdf, line 3 (characters 26-42): "led by Mara Voss"\n')
    assert run(model, *arguments, "--question", "Who led it?", "--sources", "--json") == 0
    row = json.loads(capsys.readouterr().out)
    assert row["sources"] == [{"name": "b.pdf", "start": 26, "stop": 42, "line": 3,
                               "quote": "led by Mara Voss", "share": 1.0,
                               "is_asked": False}]
    assert run(model, *arguments, "--question", "Who led it?", "--json") == 0
    assert "sources" not in json.loads(capsys.readouterr().out)
    assert run(model, "--prompt-file", str(tmp_path / "a.txt"), "--sources") == 2
    assert "--sources looks for answers in documents" in capsys.readouterr().err
