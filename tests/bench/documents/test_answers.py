"""bench documents: cases that can be told apart, scores by what was said and where it stands."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from longspan.bench.documents.answers import METRICS, DocumentsOptions, row, run
from longspan.bench.documents.houses import Asked, make_houses, write_folder, write_report
from longspan.bench.session import BenchOptions, BenchSession
from longspan.documents.gather import gather
from longspan.documents.sources import SourceIndex
from longspan.errors import LongspanError


def options_of(**changes: Any) -> DocumentsOptions:
    return DocumentsOptions(**{"model": "nano", "what": ("folder", "pdf"), "num_files": 4,
                               "num_pages": 3, "num_questions": 5, "seed": 1, "threads": 1,
                               **changes})


def answered(folder: Path, path: str, asked: list[Asked], said: list[str]) -> list[dict[str, Any]]:
    """What `generate` gives for these answers."""
    documents = gather([str(folder / path)]).documents
    index = SourceIndex(documents)
    return [{"text": text, "num_prompt_tokens": 9, "ttft_s": 1.0, "documents": documents,
             "sources": [asdict(source) for source in index.find(text, one.question)]}
            for text, one in zip(said, asked, strict=True)]


@pytest.mark.parametrize("what", ["folder", "pdf"])
def test_right_answers_and_their_places(tmp_path: Path, what: str) -> None:
    houses = make_houses(40, 0)
    if what == "folder":
        path, asked = "houses", write_folder(tmp_path / "houses", houses, 40)
    else:
        path, asked = "report.pdf", write_report(tmp_path / "report.pdf", houses, 40)
    outputs = answered(tmp_path, path, asked, [f"It is {one.answer}." for one in asked])
    for metric in METRICS:
        found = row(metric, outputs, asked, tmp_path)
        assert (found["n"], found["score"], found["wrong"]) == (40, 1.0, []), metric
        assert 0.9 < found["ci_low"] < found["ci_high"] == 1.0
    others = [asked[(number + 5) % 40].answer for number in range(40)]
    outputs = answered(tmp_path, path, asked, others)
    found = {metric: row(metric, outputs, asked, tmp_path)["score"] for metric in METRICS}
    assert found["answer"] <= 0.1 and found["passage"] <= 0.4
    nothing = answered(tmp_path, path, asked, ["Unknown."] * 40)
    assert [row(metric, nothing, asked, tmp_path)["score"] for metric in METRICS] == [0, 0, 0]


def test_the_same_seed_gives_the_same_houses_and_answers_are_in_one_alone() -> None:
    houses = make_houses(40, 3)
    assert houses == make_houses(40, 3) != make_houses(40, 4)
    for house in houses:
        for _, answer in house.questions:
            assert [one for one in houses if re.search(rf"\b{answer}\b", one.text)] == [house]


def test_the_command_writes_its_rows(tmp_path: Path) -> None:
    session = BenchSession("documents", BenchOptions.make("cpu", tmp_path, None, None))
    assert run(session, options_of(num_files=2, num_pages=1, num_questions=2)) == 0
    (file,) = tmp_path.glob("documents.*.json")
    rows = json.loads(file.read_text())["rows"]
    assert [(one["documents"], one["metric"], one["n"], one["num_documents"]) for one in rows] == [
        (what, metric, 2, count) for what, count in (("houses", 2), ("report.pdf", 1))
        for metric in METRICS]


def test_failures_are_said_in_the_commands_own_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = BenchSession("documents", BenchOptions.make("cpu", tmp_path, None, None))
    assert run(session, options_of(num_questions=1, model=str(tmp_path / "gone"))) == 1
    assert f"error: {tmp_path}/gone" in capsys.readouterr().err
    assert [one["documents"] for one in session.rows] == ["houses", "report.pdf"]
    with pytest.raises(LongspanError, match="--pages must be 1 to 40, not 41"):
        options_of(num_pages=41)
    with pytest.raises(LongspanError, match="--what: 'web' is not one of folder, pdf"):
        options_of(what=("web",))
