"""Tables between markers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import report
from longspan.errors import LongspanError

README = """# Title
<!-- bench:eval -->
old
<!-- /bench:eval -->
between
<!-- bench:cpu -->
<!-- /bench:cpu -->
end
"""


def write(folder: Path, bench: str, rows: list[dict[str, Any]], **more: Any) -> None:
    content = {"bench": bench, "date": "2025-01-02T03:04:05+00:00", "rows": rows,
               "device": {"name": "Chip", "count": 2}, **more}
    (folder / f"{bench}.chip.json").write_text(json.dumps(content))


def eval_row(num_tokens: int, attention: str, depth: float | None = None) -> dict[str, Any]:
    return {"model": "nano", "task": "passkey", "num_tokens": num_tokens, "attention": attention,
            "depth": depth, "n": 100, "score": 0.97, "ci_low": 0.9155, "ci_high": 0.9897}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "eval", [eval_row(4096, "rope"), eval_row(1_000_000, "rope"),
                             {**eval_row(4096, "sparse-dca"), "density": 0.05},
                             eval_row(4096, "rope", 0.05)])
    row = {"impl": "dense", "num_tokens": 65_536, "prefill_s": 12.34, "density": 1.0,
           "peak_memory_gib": 1.5, "threads": 2}
    write(tmp_path, "cpu", [row, {**row, "impl": "other", "density": None}], summary={
        "sparse_over_dense_extrapolated": 3.21, "demo_length": 131_072,
        "dense_extrapolated_s": 50.0, "sparse_over_transformers": 4.0,
        "transformers_length": 65_536})
    return tmp_path


def test_tables_are_rebuilt_between_the_markers(folder: Path) -> None:
    readme = folder / "README.md"
    readme.write_text(README)
    arguments = ["--readme", str(readme), "--results", str(folder)]
    assert report.main(arguments) == 0
    text = readme.read_text()
    assert "| tokens | attention | passkey | density |\n| --- | ---: | ---: | ---: |\n" in text
    assert "| 4,096 | rope | 97 (92-99; 100) |  |" in text
    assert "| 4,096 | sparse-dca | 97 (92-99; 100) | 5.0 % |" in text
    assert "| 1,000,000 | rope | 97 (92-99; 100) |  |" in text and "sparse-dca | not" not in text
    assert "| dense | 65,536 | 12.3 s | 100.0 % | 1.50 GiB | 2 |" in text
    assert "3.2 times as fast as dense at 131,072 tokens" in text
    assert "(2 x Chip, 2025-01-02)" in text
    assert "old" not in text and "between" in text and text.endswith("end\n")
    assert report.main(arguments) == 0
    assert readme.read_text() == text


def test_what_is_missing_is_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = folder / "README.md"
    assert report.main(["--readme", str(readme)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {readme}: no such file")
    with pytest.raises(LongspanError, match="no such file"):
        report.run(readme, folder)
    readme.write_text("nothing marked")
    with pytest.raises(LongspanError, match="no markers"):
        report.run(readme, folder)
    with pytest.raises(LongspanError, match="no table is called 'x'"):
        report.build_table("x", folder)
    with pytest.raises(LongspanError, match="no results of bench 'cpu'"):
        report.build_table("cpu", folder / "none")
