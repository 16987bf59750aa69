"""Files to documents: every file is kept or has its reason."""

from __future__ import annotations

import gzip
import json
import os
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from longspan.data.documents import Document, Reader, Reading, Root
from longspan.data.filters import Filters, Refusal
from longspan.data.intake import KEPT, Intake
from longspan.data.vocabulary import ADJECTIVES, NOUNS, pseudo_word
from longspan.documents.markup import html_to_text
from longspan.errors import LongspanError


def prose(seed: int, num_words: int = 120, line: int = 12) -> str:
    """Sentences of random words, ``line`` words on a line."""
    rng = random.Random(seed)
    words = [rng.choice((pseudo_word(rng), *rng.sample(ADJECTIVES + NOUNS, 4)))
             for _ in range(num_words)]
    lines = [" ".join(words[i : i + line]) for i in range(0, num_words, line)]
    return ".\n".join(lines) + ".\n"


def read(
    *paths: Path | str, reading: Reading | None = None, filters: Filters | None = None,
    max_bytes: int | None = None,
) -> tuple[list[Document], dict[str, int]]:
    """Documents, and the number of files left out by reason."""
    intake = Intake()
    reader = Reader(reading or Reading(), Refusal(filters or Filters()), intake)
    roots = [Root(path=str(path), max_bytes=max_bytes) for path in paths]
    documents = list(reader.read(roots))
    return documents, {str(row["fate"]): int(row["num_files"]) for row in intake.rows()}


@pytest.mark.parametrize("line", [10**6, 12], ids=["paragraph a line", "short lines"])
def test_all_of_five_hundred_texts_are_kept(tmp_path: Path, line: int) -> None:
    for i in range(500):
        (tmp_path / f"{i:03}.txt").write_text(prose(i, line=line))
    documents, left_out = read(tmp_path)
    assert len(documents) == 500 and left_out == {}


@pytest.mark.parametrize("text", [
    "这是一个关于长上下文语言模型的故事，山川湖海日月星辰。", "Ein Satz über große Äpfel, ",
    "Это предложение о длинных книгах и коротких письмах. ", "Une phrase où l’été dure, ",
    "هذه جملة عن الكتب الطويلة ", "ﬁne ﬂow – “quoted” • bullet … "])
def test_every_language_is_kept(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(
        "\n".join(f"{text}{i} {hash_words(i)}" for i in range(60)), encoding="utf-8")
    documents, left_out = read(tmp_path)
    assert len(documents) == 1 and left_out == {}
    assert text in documents[0].text


def hash_words(seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(pseudo_word(rng) for _ in range(3))


def test_code_of_every_language_and_books_of_any_size_are_kept(tmp_path: Path) -> None:
    suffixes = ("js", "ts", "go", "rs", "java", "cpp", "hpp", "tex", "ipynb", "yaml", "sh")
    names = [f"src/tests/a.{suffix}" for suffix in suffixes]
    (tmp_path / "src" / "tests").mkdir(parents=True)
    for i, name in enumerate(names):
        (tmp_path / name).write_text(prose(i))
    words = random.Random(9).choices(NOUNS + ADJECTIVES, k=800_000)
    (tmp_path / "book.txt").write_text(" ".join(words))
    documents, left_out = read(tmp_path)
    assert len(documents) == len(names) + 1 and left_out == {}
    assert max(len(d.text) for d in documents) > 4_000_000


def test_whatever_is_left_out_has_its_reason(tmp_path: Path) -> None:
    contents = {
        "empty.txt": b" \n", "short.txt": b"Too short.\n", "binary.bin": b"\x00\x01" * 300,
        "latin.txt": ("\xe9t\xe9 " * 100).encode("latin-1"), ".hidden/x.txt": prose(1).encode(),
        "copy1.txt": prose(2).encode(), "copy2.txt": prose(2).upper().encode(),
        "near.txt": (prose(2, 1200) + "one line more\n").encode(),
        "near2.txt": prose(2, 1200).encode(),
        "tags.xml": b"<entry key='a'><value type='number'>1</value></entry>\n" * 40,
        "loop.log": b"the same line again and again\n" * 400,
        "noise.txt": "".join(random.Random(1).choices(
            "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/", k=4000)).encode(),
        "cut.txt.gz": gzip.compress(prose(3).encode())[:-20],
        "data.jsonl": json.dumps({"body": prose(4)}).encode()}
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "link.txt").symlink_to(tmp_path / "copy1.txt")
    documents, left_out = read(tmp_path)
    assert [d.name.split("/")[-1] for d in documents] == ["copy1.txt", "near.txt"]
    assert left_out == {
        "empty": 1, "shorter than 200 characters": 1, "binary": 1, "not UTF-8": 1, "hidden": 1,
        "duplicate": 1, "near-duplicate": 1, "mostly markup": 1, "repeats itself": 1, "noise": 1,
        "cannot be read": 1, "no column text": 1, "a link or no file": 1}


def test_other_encodings_and_compressed_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(prose(1).encode("utf-16"))
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf" + prose(2).encode())
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(prose(3).encode()))
    documents, left_out = read(tmp_path)
    assert [d.text for d in documents] == [prose(1), prose(2), prose(3)] and left_out == {}


def test_records(tmp_path: Path) -> None:
    texts = [prose(i) for i in range(5)]
    lines = [json.dumps({"id": i, "body": text}) for i, text in enumerate(texts[:3])]
    lines += ["", "not json", json.dumps({"body": None}), json.dumps({"body": "\ud800" * 300})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    table = pyarrow.table({"body": texts[3:], "other": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    for paths in ((tmp_path / "a.jsonl", tmp_path / "b.parquet"), (tmp_path,)):
        documents, left_out = read(*paths, reading=Reading(column="body"))
        assert [d.text for d in documents] == texts
        assert left_out == {
            "no JSON object": 1, "no text in column body": 1, "half a character": 1}
    for name in ("a.jsonl", "b.parquet"):
        with pytest.raises(LongspanError, match="no column text; choose --column from .*body"):
            read(tmp_path / name)


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    (tmp_path / "b.jsonl").write_text("no json\n")
    with pytest.raises(LongspanError, match="is no file or folder"):
        read(tmp_path / "none")
    with pytest.raises(LongspanError, match="no Parquet file"):
        read(tmp_path / "a.parquet")
    with pytest.raises(LongspanError, match="the first line is no JSON object"):
        read(tmp_path / "b.jsonl")


def test_files_are_joined_only_when_asked(tmp_path: Path) -> None:
    for i, name in enumerate(("a/x/1.txt", "a/x/2.txt", "a/y/3.txt", "b/4.txt", "5.txt")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(prose(i))
    counts = {depth: [d.num_files for d in read(tmp_path, reading=Reading(join_depth=depth))[0]]
              for depth in (None, 0, 1, 2)}
    assert counts == {None: [1] * 5, 0: [5], 1: [1, 3, 1], 2: [1, 2, 1, 1]}


def test_patterns_choose_files(tmp_path: Path) -> None:
    for i, name in enumerate(("a.py", "tests/b.py", "c.txt")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(prose(i))
    documents, left_out = read(
        tmp_path, reading=Reading(include=("*.py",), exclude=("*/tests/*",)))
    assert len(documents) == 1 and left_out == {"not included": 1, "excluded": 1}


def test_takes_no_more_than_the_budget(tmp_path: Path) -> None:
    for i in range(8):
        (tmp_path / f"p{i}").mkdir()
        (tmp_path / f"p{i}" / "x.txt").write_text(prose(i))
    documents, left_out = read(tmp_path, max_bytes=3000)
    assert 1000 < sum(len(d.text) for d in documents) <= 3000
    assert left_out == {"over the budget": 8 - len(documents)}


def test_bytes_are_counted_where_they_went(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(1))
    (tmp_path / "b.txt").write_text("short")
    intake = Intake()
    reader = Reader(Reading(), Refusal(Filters()), intake)
    document, = reader.read([Root(path=str(tmp_path))])
    intake.note(str(tmp_path), KEPT, "a.txt", document.num_bytes, 7)
    found = [(r["fate"], r["num_files"], r["num_bytes"], r["num_tokens"]) for r in intake.rows()]
    assert found == [(KEPT, 1, len(prose(1)), 7), ("shorter than 200 characters", 1, 5, 0)]
    assert intake.left_out() == "1 shorter than 200 characters"


def test_the_table_is_in_the_order_of_the_sources(tmp_path: Path) -> None:
    """Though what is kept is noted later than what is left out."""
    intake = Intake()
    for name, content in (("a", prose(1)), ("b", "short")):
        (tmp_path / name).write_text(content)
    reader = Reader(Reading(), Refusal(Filters()), intake)
    a, b = (str(tmp_path / name) for name in "ab")
    document, = reader.read([Root(path=a), Root(path=b)])
    intake.note(a, KEPT, document.name, document.num_bytes)
    assert [row["source"] for row in intake.rows()] == [a, b]


def test_links_and_folders_that_cannot_be_read_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("open", "closed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(prose(len(name)))
    (tmp_path / "link").symlink_to(tmp_path / "open")
    scandir = os.scandir

    def guarded(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    documents, left_out = read(tmp_path)
    assert len(documents) == 1
    assert left_out == {"a folder that cannot be read": 1, "a link or no file": 1}


def test_names_of_other_encodings(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / name).write_text(prose(1))
    for max_bytes in (None, 10**6):
        (document,), left_out = read(tmp_path, max_bytes=max_bytes)
        assert document.name.endswith("caf?.txt") and left_out == {}


def test_large_binaries_are_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights.bin").write_bytes(b"weights\x00" * 5000)
    monkeypatch.delattr(Path, "read_bytes")
    assert read(tmp_path) == ([], {"binary": 1})


def test_html_keeps_visible_text() -> None:
    page = "<head><title>t</title></head><p>One &amp; two</p><script>x()</script><p>three</p>"
    assert html_to_text(page).split() == ["One", "&", "two", "three"]
