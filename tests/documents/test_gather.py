"""Files and folders to documents: each under its name, everything else with its reason."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from longspan.bench.documents.pdf import pdf_bytes
from longspan.documents import gather as module
from longspan.documents.gather import as_prompt, gather
from longspan.errors import LongspanError
from tests.documents.files import write_word


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        file = folder / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def found(*paths: Path | str) -> tuple[dict[str, str], dict[str, str]]:
    """Texts and reasons by name."""
    result = gather([str(path) for path in paths])
    return ({one.name: one.text for one in result.documents},
            {one.name: one.reason for one in result.left_out})


def failure(*paths: Path | str) -> str:
    with pytest.raises(LongspanError) as error:
        gather([str(path) for path in paths])
    return str(error.value)


def test_a_folder_of_all_kinds(tmp_path: Path) -> None:
    root = tmp_path / "case"
    write(root, **{"b.py": "x = 1\n", "a.md": "# A\r\n", "deep__er__c.html": "<p>C</p>", "z": " "})
    (root / "d.pdf").write_bytes(pdf_bytes("D"))
    write_word(root / "e.docx")
    (root / "photo.jpg").write_bytes(b"\xff\xd8\0")
    (root / "old.txt").write_bytes(b"caf\xe9")
    (root / "link").symlink_to(root / "b.py")
    write(root, **{".env": "key", ".git__HEAD": "x"})
    texts, left_out = found(root)
    assert list(texts) == ["case/a.md", "case/b.py", "case/d.pdf", "case/e.docx",
                           "case/deep/er/c.html"]
    assert texts["case/a.md"] == "# A" and texts["case/d.pdf"] == "D"
    assert left_out == {
        "case/z": "empty", "case/photo.jpg": "binary", "case/old.txt": "not UTF-8",
        "case/link": "a link", "case/.env": "hidden"}


def test_names_and_texts_stand_together_in_the_prompt(tmp_path: Path) -> None:
    write(tmp_path, **{"a.txt": "one\n", "b.txt": "two\n\n"})
    result = gather([str(tmp_path / "b.txt"), str(tmp_path / "a.txt")])
    assert as_prompt(result.documents) == "===== b.txt =====\ntwo\n\n===== a.txt =====\none"


def test_a_file_is_read_once_and_names_differ(tmp_path: Path) -> None:
    write(tmp_path, **{"x__a.txt": "one", "y__a.txt": "two", "x__b.txt": "three"})
    first, second = tmp_path / "x" / "a.txt", tmp_path / "y" / "a.txt"
    texts, left_out = found(first, second, tmp_path / "x")
    assert texts == {"a.txt": "one", str(second): "two", "x/b.txt": "three"}
    assert left_out == {"x/a.txt": "named twice"}


def test_folders_of_one_name(tmp_path: Path) -> None:
    write(tmp_path, **{"x__src__a.txt": "one", "y__src__a.txt": "two"})
    texts, _ = found(tmp_path / "x" / "src", tmp_path / "y" / "src")
    assert texts == {"src/a.txt": "one", str(tmp_path / "y" / "src" / "a.txt"): "two"}


def test_standard_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"piped")))
    write(tmp_path, **{"a.txt": "one"})
    assert found("-", tmp_path / "a.txt")[0] == {"standard input": "piped", "a.txt": "one"}


def test_what_is_named_must_be_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"\0")
    assert failure(tmp_path / "photo.jpg") == (
        f"{tmp_path}/photo.jpg: binary; leave it out or convert it to UTF-8 text")
    assert failure(tmp_path / "none") == f"{tmp_path}/none: no such file or folder"
    assert failure("") == "an empty name: no such file or folder"
    (tmp_path / "blank.txt").write_text(" \n")
    assert failure(tmp_path / "blank.txt") == "blank.txt: the document is empty; give some text"
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / ".x").write_text("x")
    assert failure(tmp_path) == (f"{tmp_path}: no text there (1 empty, 1 binary, 1 hidden); "
                                 "name files or folders of text")
    (tmp_path / "void").mkdir()
    assert "no text there (nothing there)" in failure(tmp_path / "void")
    monkeypatch.setattr(module, "MAX_TEXT_BYTES", 2**20)
    (tmp_path / "large.txt").write_text("x" * (2**20 + 1))
    assert "large.txt: larger than 1 MiB; leave it out" in failure(tmp_path / "large.txt")


@pytest.mark.parametrize("is_repository", [True, False])
def test_ignored_files_are_those_that_git_ignores(tmp_path: Path, is_repository: bool) -> None:
    """As git lists them; a folder without a repository is read by the rules in it."""
    write(tmp_path, **{
        ".gitignore": "*.log\nbuild/\n/top.txt\n!keep.log\ndeep/**/x.txt\n",
        "a.log": "1", "keep.log": "2", "top.txt": "3", "sub__top.txt": "4", "build__out.txt": "5",
        "sub__build__out.txt": "6", "deep__a__b__x.txt": "7", "deep__y.txt": "8",
        "sub__.gitignore": "!a.log\ny.txt\n", "sub__a.log": "9", "sub__y.txt": "10",
        "kept.txt": "11"})
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    listed = subprocess.run(
        ["git", "-C", str(tmp_path), "ls-files", "--others", "--exclude-standard"],
        capture_output=True, text=True, check=True).stdout.split()
    if not is_repository:
        (tmp_path / ".git").rename(tmp_path / ".elsewhere")
    texts, left_out = found(tmp_path)
    root = tmp_path.name
    assert {f"{root}/{name}" for name in listed if ".git" not in name} == set(texts)
    assert left_out[f"{root}/build/"] == "ignored by .gitignore"
    assert f"{root}/sub/a.log" in texts and f"{root}/sub/y.txt" in left_out


def test_rules_of_the_repository_hold_in_its_folders(tmp_path: Path) -> None:
    write(tmp_path, **{".gitignore": "*.log\n/build/\n", ".git__info__exclude": "*.tmp\n",
                       "sub__a.log": "1", "sub__a.txt": "2", "build__b.log": "3",
                       "build__b.txt": "4", "sub__c.tmp": "5"})
    texts, left_out = found(tmp_path / "sub")
    assert list(texts) == ["sub/a.txt"] and set(left_out) == {"sub/a.log", "sub/c.tmp"}
    # A folder that is ignored, but named: somebody wants what is in it.
    assert list(found(tmp_path / "build")[0]) == ["build/b.log", "build/b.txt"]
    assert list(found(tmp_path / "sub" / "a.log")[0]) == ["a.log"]
