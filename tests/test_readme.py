"""The README's commands: each is what the program takes, and what can be run here is run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer

from longspan import cli
from longspan.commands.run_app import UsageError
from longspan.documents.gather import as_prompt, gather
from tests.serve.fake import Running, running

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "longspan" / "nano" / "README.md"]
"""Pages with further commands: these are taken apart, not run."""
ADDRESS = "http://127.0.0.1:8000"
WINDOWS = {"small": 16_384, "Qwen/Qwen2.5-1.5B-Instruct": 32_768,
           "Qwen/Qwen2.5-7B-Instruct-1M": 1_010_000}
"""What the models of examples read, tokens; of ``small`` what the example plans."""
CHARACTERS_A_TOKEN = 3.5
"""A measured ratio, of what examples read in Qwen2.5's tokens: 3.6 to 4.1 on 2026-11-29."""
RUN = (["info", "nano"], ["eval", "list"], ["--version"])
"""Beginnings of commands that are quick, need nothing and write nothing: these are run."""


def blocks(language: str, text: str = TEXT) -> list[str]:
    """Code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str = TEXT) -> Iterator[list[str]]:
    """Every command of a page's shell blocks, as the shell takes it apart."""
    for block in blocks("sh", text):
        command: list[str] = []
        for word in [*_with_line_ends(block), "\n"]:
            if word in ("\n", "|"):
                if command:
                    yield command
                command = []
            else:
                command.append(word)


def _with_line_ends(block: str) -> Iterator[str]:
    """Words of a block; a line ends where no quote is open."""
    rest = ""
    for line in block.replace("\\\n", " ").splitlines(keepends=True):
        rest += line
        try:
            words = shlex.split(rest.replace(" | ", " '|' "), comments=True)
        except ValueError:  # a quote is open: the command goes on
            continue
        yield from words
        yield "\n"
        rest = ""
    assert not rest, f"a quote is never closed: {rest}"


COMMANDS = list(commands())


def programs(name: str) -> list[list[str]]:
    """Arguments of every use of a program."""
    return [command[1:] for command in COMMANDS if command[0] == name]


def parse(arguments: list[str]) -> None:
    """Take a command line apart as longspan does, without running it."""
    command: Any = typer.main.get_command(cli.app)
    context, name = None, "longspan"
    while hasattr(command, "commands"):
        context = command.make_context(name, list(arguments), parent=context)
        name, command, arguments = command.resolve_command(
            context, [*context._protected_args, *context.args])
    command.make_context(name, list(arguments), parent=context)


def test_every_program_of_the_readme_is_checked_below() -> None:
    assert {command[0] for command in COMMANDS} == {
        "make", "pip", "longspan", "curl", "hf", "cat"}
    assert len(programs("longspan")) >= 15


@pytest.mark.parametrize("arguments", programs("longspan"), ids=" ".join)
def test_longspan_takes_the_command(arguments: list[str]) -> None:
    if arguments == ["--version"]:
        return
    parse(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_longspan_takes_the_commands_of_a_page(page: Path) -> None:
    """What stands in brackets may be left out, and is."""
    text = re.sub(r" \[[^\]\n]*\]", "", page.read_text(encoding="utf-8"))
    for words in commands(text):
        if words[0] == "longspan":
            parse(words[1:])


def test_commands_named_in_sentences_are_there() -> None:
    named = list[list[str]]()
    for page in [ROOT / "README.md", *PAGES]:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        named += [words.split() for words in re.findall(r"`longspan ([^`]+)`", text)]
    assert len(named) > 50
    for words in named:
        _find(words)


def _find(words: list[str]) -> None:
    """Follow the names of commands, as far as they go. An option must be one of the command."""
    command: Any = typer.main.get_command(cli.app)
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands, words
        command, words = command.commands[words[0]], words[1:]
    known = {name for option in command.params for name in option.opts}
    assert {word for word in words if word.startswith("--")} <= known, words


def test_the_check_itself_refuses_what_is_wrong() -> None:
    for line in ("generate nano --documents docs", "generate", "fly nano", "eval run",
                 "generate nano --max-tokens many", "info nano --length 1 --length 2"):
        with pytest.raises(UsageError):
            parse(line.split())


@pytest.mark.parametrize("arguments", [
    one for one in programs("longspan") if any(one[:len(head)] == head for head in RUN)],
    ids=" ".join)
def test_quick_commands_run_as_written(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run_command(arguments) == 0
    assert capsys.readouterr().out


def documents_of(words: list[str]) -> list[str]:
    return [words[index + 1] for index, word in enumerate(words) if word == "--document"]


def test_documents_of_examples_are_in_the_repository() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    files = listed.stdout.split() or [str(file.relative_to(ROOT)) for file in ROOT.rglob("*")]
    named = [name for words in programs("longspan") for name in documents_of(words)]
    assert len(named) >= 5
    for name in named:
        assert name == "-" or any(f"{file}/".startswith(f"{name}/") for file in files), name
    for words in programs("cat"):
        assert all(list(ROOT.glob(pattern)) for pattern in words)


def test_documents_of_examples_fit_their_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    checked = 0
    for words in programs("longspan"):
        named = documents_of(words)
        if named and named != ["-"]:
            model = words[words.index("--model") + 1] if "--model" in words else words[1]
            num_tokens = len(as_prompt(gather(named).documents)) / CHARACTERS_A_TOKEN
            assert num_tokens < WINDOWS[model], words
            checked += 1
    assert checked >= 3
    assert ["info", "small", "--length", str(WINDOWS["small"])] in programs("longspan")


def test_models_that_are_made_are_made_before_they_are_used() -> None:
    made = {words[2] for words in programs("longspan") if words[0] == "import"}
    for words in programs("longspan"):
        if words[0] in ("generate", "info", "serve"):
            assert words[1] in made | {"nano"} or re.fullmatch(r"[\w.-]+/[\w.-]+", words[1])
    fetched = {words[2] for words in programs("hf")}
    assert {words[1] for words in programs("longspan") if words[0] == "import"} <= fetched


def test_make_knows_its_targets() -> None:
    for words in programs("make"):
        done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_pip_installs_extras_that_there_are() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for words in programs("pip"):
        assert words[0] == "install"
        for word in words[1:]:
            found = re.fullmatch(r"\.\[([\w,-]+)\]", word)
            if found:
                assert set(found[1].split(",")) <= set(project["optional-dependencies"])
            else:
                assert word in (".", "torch==2.13.0", "--index-url",
                                "https://download.pytorch.org/whl/cpu"), word
    makefile = (ROOT / "Makefile").read_text()
    assert "TORCH_CPU ?= torch==2.13.0\n" in makefile


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(model_name="nano") as server:
        yield server


def test_curl_asks_what_the_server_answers(server: Running) -> None:
    for words in programs("curl"):
        url, body = words[0], words[words.index("-d") + 1]
        assert url.startswith(ADDRESS) and "Content-Type: application/json" in words
        reply = httpx.post(url.replace(ADDRESS, server.url), json=json.loads(body))
        assert reply.status_code == 200, reply.text


def test_python_runs_as_written(server: Running) -> None:
    """The engine's own example with the bundled model, and the client's with a server."""
    found = blocks("python")
    assert len(found) == 2
    for code in found:
        code = code.replace(ADDRESS, server.url)
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout
