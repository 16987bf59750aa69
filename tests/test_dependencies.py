"""What is installed without extras suffices for what needs none."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
NAMED_TRITON = {"2.11.0": "3.6.0", "2.13.0": "3.7.1", "2.14.1": "3.8.0", "2.15.0": "3.9.0"}
"""What builds of PyTorch with CUDA require."""
IMPORTS = """
import importlib, os, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError("No module named " + name, name=name)
sys.meta_path.insert(0, Missing())
import torch
from tests.forks import forked
for module in {modules!r}:
    _, status = os.waitpid(forked(lambda: importlib.import_module(module)), 0)
    print(module, "is there" if status == 0 else "is not there", flush=True)
"""
COMMANDS = """
for words in {commands!r}:
    def run(words=words):
        from longspan.cli import run_command
        status = run_command(words.split())
        assert status == 2, status
    print("$", words, flush=True)
    _, status = os.waitpid(forked(run), 0)
    print("status 2" if status == 0 else "another end", flush=True)
"""
SAID = {
    "train nano --out there": "training needs transformers, which is not installed: "
                              "pip install 'longspan[train]'",
    "train extend there --corpus there --to 8k --out there":
        "training needs transformers, which is not installed: pip install 'longspan[train]'",
    "import there.gguf there": "gguf is not installed: pip install 'longspan[gguf]'"}
"""What commands say that need an extra, by command."""
MODULES = (
    "longspan", "longspan.cli", "longspan.commands.demo", "longspan.commands.generate",
    "longspan.commands.info", "longspan.commands.evaluate", "longspan.engine.front.llm",
    "longspan.documents.gather",
    "longspan.eval.runner", "longspan.eval.endpoint", "longspan.eval.plot",
    "longspan.bench.engine.cpu", "longspan.bench.engine.ttft", "longspan.bench.ops.command",
    "longspan.bench.engine.quality", "bench.report")


def name_of(requirement: str) -> str:
    """Name of a distribution, as package indexes write it."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def closure(requirements: list[str]) -> set[str]:
    """Names of distributions and of all that they need without extras of their own."""
    found, left = set[str](), [name_of(line) for line in requirements]
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        try:
            needed = requires(name) or []
        except PackageNotFoundError:  # for another platform
            continue
        left += [name_of(line) for line in needed if "extra ==" not in line]
    return found


def packages_of_extras_alone() -> set[str]:
    """Packages to import that only extras bring."""
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines
              if name_of(line) != "longspan"]
    alone = closure(extras) - closure(project["dependencies"])
    return {package for package, names in packages_distributions().items()
            if {name_of(name) for name in names} <= alone}


def test_the_list_tells_extras_from_what_is_always_there() -> None:
    found = packages_of_extras_alone()
    assert {"fastapi", "zmq", "transformers", "llguidance", "matplotlib"} <= found
    assert not {"torch", "numpy", "typer", "jinja2", "msgspec", "tokenizers"} & found


@pytest.fixture(scope="module")
def imports() -> str:
    """What one process says that tries each module in a fork of its own: torch, which most of
    them need, is loaded once."""
    code = IMPORTS.format(names=packages_of_extras_alone(), modules=MODULES)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.parametrize("module", MODULES)
def test_imports_without_extras(imports: str, module: str) -> None:
    """As after `pip install .`, with which `make demo` begins."""
    assert f"{module} is there\n" in imports, imports


def test_commands_name_the_extra_that_they_need() -> None:
    code = (IMPORTS + COMMANDS).format(
        names=packages_of_extras_alone(), modules=(), commands=tuple(SAID))
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for words, said in SAID.items():
        told = result.stdout.split(f"$ {words}\n")[1].split("$")[0].splitlines()
        assert told[-1] == "status 2" and len(told) == 2, result.stdout
        assert told[0].startswith(f"error: {said}"), told


def test_pins_agree() -> None:
    """What make installs is what the project allows, and the Triton of tests may be the one that
    each build of PyTorch names: else pip takes another PyTorch without a word."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    torch = next(Requirement(line) for line in project["dependencies"]
                 if name_of(line) == "torch")
    triton = next(Requirement(line) for line in project["optional-dependencies"]["dev"]
                  if name_of(line) == "triton")
    asked = {name: Requirement(found) for name, found in re.findall(
        r"^(TORCH_\w+) \?= (torch.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)}
    assert asked["TORCH_CUDA"].specifier == torch.specifier
    assert [pin.operator for pin in asked["TORCH_CPU"].specifier] == ["=="]
    assert torch.specifier.contains(next(iter(asked["TORCH_CPU"].specifier)).version)
    for pytorch, its_triton in NAMED_TRITON.items():
        assert torch.specifier.contains(pytorch) is triton.specifier.contains(its_triton)
