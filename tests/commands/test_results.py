"""Result files: merging, what is recorded about the run, faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longspan.commands import results
from longspan.errors import LongspanError

OLD = [{"impl": "dense", "num_tokens": 8, "prefill_s": 1.0},
       {"impl": "sparse", "num_tokens": 8, "prefill_s": 0.5}]


def test_new_rows_replace_those_of_the_same_key() -> None:
    new = [{"impl": "sparse", "num_tokens": 8, "prefill_s": 0.4},
           {"impl": "sparse", "num_tokens": 4, "prefill_s": 0.1}]
    merged = results.merge_rows(OLD, new, ("impl", "num_tokens"))
    assert [(row["impl"], row["num_tokens"], row["prefill_s"]) for row in merged] == [
        ("dense", 8, 1.0), ("sparse", 4, 0.1), ("sparse", 8, 0.4)]


def test_keys_may_be_null_or_objects() -> None:
    rows: list[dict[str, Any]] = [
        {"depth": 0.5, "params": {"b": 1, "a": 2}}, {"depth": None, "params": {}}]
    merged = results.merge_rows(rows, [{"depth": 0.5, "params": {"a": 2, "b": 1}, "x": 1}],
                                ("depth", "params"))
    assert merged == [{"depth": None, "params": {}},
                      {"depth": 0.5, "params": {"a": 2, "b": 1}, "x": 1}]


def test_a_file_says_what_was_run_when_and_on_what(tmp_path: Path) -> None:
    rows = [{"model": "m", "impl": "dense", "num_tokens": 8, "threads": 1}]
    file = results.write_rows(tmp_path / "new", "cpu", rows, summary={"ratio": 2.0})
    assert file.name.startswith("cpu.") and file.suffix == ".json"
    content = results.read_file(file)
    assert set(content) == {"bench", "command", "date", "commit", "device", "versions", "rows",
                            "summary"}
    assert set(content["device"]) == {"name", "count", "memory_gib", "driver"}
    assert content["device"]["count"] >= 1 and "torch" in content["versions"]
    assert content["rows"] == rows
    results.write_rows(tmp_path / "new", "cpu", [{**rows[0], "num_tokens": 9}])
    (content,) = results.read_bench(tmp_path / "new", "cpu")
    assert [row["num_tokens"] for row in content["rows"]] == [8, 9]
    assert content["summary"] == {"ratio": 2.0}
    assert [path.name for path in (tmp_path / "new").iterdir()] == [file.name]


def test_rows_of_earlier_runs_say_where_they_come_from(tmp_path: Path) -> None:
    def write(commit: str, *lengths: int) -> list[dict[str, Any]]:
        about = {"command": "c", "date": f"day {commit}", "commit": commit, "versions": {},
                 "device": {"name": "chip"}}
        rows = [{"model": "m", "impl": "dense", "num_tokens": n, "threads": 1} for n in lengths]
        return results.read_file(results.write_rows(tmp_path, "cpu", rows, about=about))["rows"]

    assert not any("commit" in row for row in write("one", 1, 2, 3))
    assert [row.get("commit") for row in write("two", 2)] == ["one", None, "one"]
    found = write("three", 3)
    assert [row.get("commit") for row in found] == ["one", "two", None]
    assert [row.get("date") for row in found] == ["day one", "day two", None]
    assert not any("command" in row or "versions" in row for row in found)  # all the same


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": 1}', "\xff"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "cpu.x.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(LongspanError, match="not a result file"):
        results.read_file(file)


def test_every_committed_result_file_can_be_read() -> None:
    folder = Path(__file__).parents[2] / "bench" / "results"
    for file in folder.glob("*.json"):
        content = results.read_file(file)
        assert file.name.startswith(f"{content['bench']}."), file
        keys = [json.dumps([row.get(name) for name in results.KEY_FIELDS[content["bench"]]])
                for row in content["rows"]]
        assert len(set(keys)) == len(keys), f"{file}: rows with the same key"


def test_no_git_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "_output_of", lambda command: None)
    assert results.commit() is None
    assert results.describe_device("cpu")["driver"] is None


def test_commands_that_do_not_exist_give_nothing() -> None:
    assert results._output_of(["no-such-program-at-all"]) is None


def test_a_full_disk_keeps_the_old_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = results.write_rows(tmp_path, "cpu", [{"model": "m"}])
    before = file.read_bytes()

    def full(self: Path, text: str, **more: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(LongspanError, match="No space left on device.*old rows are kept"):
        results.write_rows(tmp_path, "cpu", [{"model": "n"}])
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
