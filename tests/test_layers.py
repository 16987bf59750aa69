"""The shape of the code base, checked: who may import whom, sizes, no ambient state.

A module may also import its own package.
"""

from __future__ import annotations

import ast
import functools
import io
import re
import statistics
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import longspan

ROOT = Path(longspan.__file__).resolve().parent
REPOSITORY = ROOT.parent
FILES = sorted(ROOT.rglob("*.py"))
NAMES = [str(file.relative_to(ROOT)) for file in FILES]
# The log is not among them: it is a record, and names files that are gone.
PAGES = [*sorted((REPOSITORY / "docs").glob("*.md")),
         *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md"))]

EVERYTHING = ("longspan",)
BASE = ("longspan.config", "longspan.cores", "longspan.dca_config", "longspan.errors",
        "longspan.expert_config", "longspan.families", "longspan.fields", "longspan.garbage",
        "longspan.proxies", "longspan.rank_place", "longspan.quantization", "longspan.rope_config",
        "longspan.text_files", "longspan.units", "longspan.version",
        "longspan.weight_form", "longspan.weight_sizes")
# What all rooms of the engine speak of.
WORDS = tuple(f"longspan.engine.{name}"
              for name in ("plain", "recall", "request", "transfer", "kv_file",
                           "prefix_origin", "step", "intake", "resolve"))
KERNEL_PARTS = ("longspan.ops.tiles", "longspan.ops.types", "longspan.ops.geometry",
                "longspan.ops.reference", "longspan.ops.int8_kv")
# The command line and the bodies of its subcommands: nothing else may import them.
COMMANDS = tuple(f"longspan.{name}" for name in ("__main__", "cli", "commands", "bench"))
# What each room may import of ours, besides itself. The longest matching key counts.
ALLOWED_OURS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("longspan", *COMMANDS), EVERYTHING),
    "longspan.errors": (),
    "longspan.cores": (),
    "longspan.units": (),
    "longspan.weight_form": (),
    "longspan.weight_sizes": ("longspan.config", "longspan.weight_form"),
    "longspan.version": (),
    "longspan.fields": ("longspan.errors",),
    "longspan.rope_config": ("longspan.errors", "longspan.fields"),
    "longspan.expert_config": ("longspan.errors", "longspan.fields"),
    "longspan.families": ("longspan.errors", "longspan.fields"),
    "longspan.dca_config": ("longspan.errors", "longspan.fields"),
    "longspan.quantization": ("longspan.errors", "longspan.fields", "longspan.weight_form"),
    "longspan.rank_place": ("longspan.errors",),
    "longspan.config": ("longspan.dca_config", "longspan.errors", "longspan.expert_config",
                        "longspan.rank_place",
                        "longspan.families", "longspan.fields", "longspan.quantization",
                        "longspan.rope_config"),
    "longspan.text_files": ("longspan.errors",),
    "longspan.proxies": ("longspan.errors",),
    "longspan.garbage": (),
    "longspan.ops": ("longspan.ops",),
    "longspan.ops.types": (),
    "longspan.ops.geometry": (),
    "longspan.ops.int8_kv": ("longspan.ops.types",),
    "longspan.ops.reference": ("longspan.ops.types", "longspan.ops.geometry",
                               "longspan.ops.int8_kv"),
    "longspan.ops.sampling": (),
    **dict.fromkeys(("longspan.ops.tiles", "longspan.ops.dense", "longspan.ops.select",
                     "longspan.ops.sparse", "longspan.ops.decode", "longspan.ops.pointwise"),
                    KERNEL_PARTS),
    "longspan.ops.quant": KERNEL_PARTS,
    "longspan.ops.moe": (*KERNEL_PARTS, "longspan.ops.pointwise", "longspan.ops.quant"),
    "longspan.attention": ("longspan.ops", *BASE),
    "longspan.model": ("longspan.attention", "longspan.ops", *BASE),
    "longspan.engine": (),
    **dict.fromkeys(WORDS, (*WORDS, *BASE)),
    "longspan.engine.control": (*WORDS, *BASE),
    "longspan.engine.text": (*WORDS, *BASE),
    "longspan.engine.device": (
        "longspan.engine.control", "longspan.engine.text", *WORDS,
        "longspan.model", "longspan.attention", "longspan.ops", *BASE),
    "longspan.engine.processes": (
        "longspan.engine.control", "longspan.engine.text", *WORDS, *BASE),
    "longspan.engine.ranks": ("longspan.engine.control", "longspan.engine.processes", *WORDS,
                              *BASE),
    "longspan.engine.setup": (
        "longspan.engine.control", "longspan.engine.device", "longspan.engine.processes",
        "longspan.engine.ranks", *WORDS, "longspan.model", "longspan.attention",
        "longspan.ops.types", *BASE),
    "longspan.engine.front": (
        "longspan.engine.control", "longspan.engine.processes", "longspan.engine.setup",
        "longspan.engine.text", *WORDS, *BASE),
    "longspan.engine.front.llm": (
        "longspan.attention.observer", "longspan.engine.control", "longspan.engine.front",
        "longspan.engine.setup", "longspan.engine.text", *WORDS, *BASE),
    "longspan.serve": ("longspan.documents", "longspan.engine.front.client",
                       "longspan.engine.front.stream", "longspan.engine.prefix_origin",
                       "longspan.engine.recall",
                       "longspan.engine.request", "longspan.engine.text.call_format", *BASE),
    "longspan.files": ("longspan.errors",),
    "longspan.train": ("longspan.files", "longspan.attention.rope", "longspan.attention.hf", *BASE),
    "longspan.documents": ("longspan.errors", "longspan.text_files"),
    "longspan.recipes": ("longspan.data", "longspan.files", "longspan.train", *BASE),
    "longspan.data": ("longspan.documents", "longspan.files", *BASE),
    "longspan.eval": BASE,
}
# Packages from outside; where no key matches, anything that the project depends on.
ALLOWED_OTHERS: dict[str, tuple[str, ...]] = {
    "longspan.errors": (),
    "longspan.cores": (),
    "longspan.text_files": (),
    "longspan.proxies": (),
    "longspan.garbage": (),
    "longspan.units": (),
    "longspan.weight_form": (),
    "longspan.quantization": (),
    "longspan.weight_sizes": (),
    "longspan.version": (),
    "longspan.fields": (),
    "longspan.rope_config": (),
    "longspan.expert_config": (),
    "longspan.families": (),
    "longspan.dca_config": (),
    "longspan.rank_place": (),
    "longspan.config": (),
    "longspan.ops": ("torch", "triton", "numpy"),
}
# Rooms that load no torch, but for `LLM`, which computes in its own process.
TORCH_FREE = ("longspan.data", "longspan.documents", "longspan.files", "longspan.serve",
              "longspan.engine.control", "longspan.engine.text", "longspan.engine.processes",
              "longspan.engine.ranks", "longspan.engine.front", *WORDS)
COMPUTES = ("longspan.engine.front.llm",)
NO_DOCUMENT = re.compile(r"\b(DESIGN|HOUSE)\b|\b[Ss]pec: |\b[Ii]ssue #?\d|\bdecision \d")
DOTTED = re.compile(r"`(longspan(?:\.\w+)+)`")
PATH = re.compile(r"(?<![\w/.-])(?:docs|longspan|recipes|tests)/[\w/-]*(?:\.\w+)?|\blog\.md\b")
PAGE_PATH = re.compile(r"`([\w/-]+(?:\.py|\.md|/))`|\]\(((?!http)[\w/.-]+)\)")
ENVIRONMENT = ("environ", "environb", "getenv", "putenv")
MAX_FILE_LINES = 420
MAX_FUNCTION_LINES = 80
MAX_KERNEL_LINES = 150
MAX_MEDIAN_FUNCTION_LINES = 10
MAX_ARGUMENTS = 8

Function = ast.FunctionDef | ast.AsyncFunctionDef


def module_name(file: Path) -> str:
    parts = ["longspan", *file.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


@functools.cache
def names_in(file: Path) -> frozenset[str | None]:
    """Every name that a file defines or uses."""
    return frozenset(getattr(node, "name", getattr(node, "id", None))
                     for node in ast.walk(parse(file)))


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported, inside functions too.

    ``from a import b`` gives a.b where b is a module of ours, else a.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                keep = len(parents) - node.level + is_package
                base = ".".join([*parents[:keep], *filter(None, [base])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if is_ours(full) else base


def is_ours(name: str) -> bool:
    """Whether a dotted name is a module of the package."""
    path = ROOT.parent.joinpath(*name.split("."))
    return name.startswith("longspan") and (path.is_dir() or path.with_suffix(".py").is_file())


def inside(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def matching(table: dict[str, tuple[str, ...]], module: str) -> str | None:
    """The longest key of a table that the module lies in."""
    keys = [key for key in table if key != "longspan" and inside(module, (key,))]
    if module == "longspan" and module in table:
        return module
    return max(keys, key=len) if keys else None


def forbidden_imports(file: Path, tree: ast.AST, module: str) -> list[str]:
    """One line for each import that the tables do not allow."""
    room, others = matching(ALLOWED_OURS, module), matching(ALLOWED_OTHERS, module)
    assert room is not None, f"{module} has no row in the layer table"
    found = []
    for line, name in imports(tree, module, file.name == "__init__.py"):
        if inside(name, ("longspan",)):
            allowed = inside(name, (*ALLOWED_OURS[room], room))
        else:
            top = name.split(".")[0]
            allowed = (others is None or top in sys.stdlib_module_names
                       or top in ALLOWED_OTHERS[others])
        if not allowed:
            found.append(f"{file.name}:{line}: {module} must not import {name}")
    return found


def functions(tree: ast.AST) -> list[Function]:
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def num_lines(node: Function) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def is_kernel(node: Function) -> bool:
    """A Triton or Gluon function: decorated with some form of ``jit``."""
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def is_command(node: Function) -> bool:
    """A typer command: each argument is an option of the command line."""
    return any(ast.unparse(decorator).split("(")[0].endswith((".command", ".callback"))
               for decorator in node.decorator_list)


def num_arguments(node: Function) -> int:
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return len([arg for arg in every if arg.arg not in ("self", "cls")])


def public_functions(tree: ast.Module) -> Iterator[Function]:
    """Functions and methods of a module that others may call."""
    for node in tree.body:
        holder = [node]
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            holder = node.body
        for item in holder:
            if isinstance(item, Function) and not item.name.startswith("_"):
                yield item


def is_overload(node: Function) -> bool:
    """``@overload`` stubs and property setters share the first definition's docstring."""
    names = [ast.unparse(decorator) for decorator in node.decorator_list]
    return any(name.endswith(("overload", ".setter")) for name in names)


@pytest.mark.parametrize(("module", "source", "fine"), [
    ("longspan.ops.x", "import torch, triton.language, math, numpy", True),
    ("longspan.ops.x", "from longspan.ops.types import PagedKV", True),
    ("longspan.ops.x", "from longspan.config import DcaConfig", False),
    ("longspan.ops.x", "def f():\n    import transformers", False),
    ("longspan.ops.x", "from . import types", True),
    ("longspan.ops.x", "from ..attention import rope", False),
    ("longspan.attention.x", "from longspan import ops", True),
    ("longspan.attention.x", "from longspan import engine", False),
    ("longspan.attention.x", "import longspan.model", False),
    ("longspan.attention.x", "import longspan", False),
    ("longspan.config", "import torch", False),
    ("longspan.config", "import json", True),
    ("longspan.train.x", "from longspan.attention.rope import build_rotary", True),
    ("longspan.train.x", "from longspan.attention.layer import allocate_cache", False),
    ("longspan.train.x", "from longspan.data import sources", False),
    ("longspan.eval.x", "from longspan.engine.front.llm import LLM", False),
    ("longspan.serve.x", "from longspan.engine.front.client import AsyncEngine", True),
    ("longspan.serve.x", "from longspan.engine import llm", False),
    ("longspan.cli", "def f():\n    from longspan.engine import llm", True),
    ("longspan.commands.demo", "from longspan.eval import task", True),
    ("longspan.ops.dense.x", "from longspan.ops.tiles import splits", True),
    ("longspan.ops.dense.x", "from longspan.ops.select import probes", False),
    ("longspan.ops.x", "from longspan.ops.sparse import eager", True),
    ("longspan.engine.control.x", "from longspan.engine.step import Update", True),
    ("longspan.engine.control.x", "from longspan.engine.text import grammar", False),
    ("longspan.engine.front.x", "from longspan.engine.device.runner import Runner", False),
    ("longspan.engine.processes.x", "from longspan.engine.front.client import AsyncEngine", False),
    ("longspan.engine.request", "from longspan.engine.control import blocks", False),
    ("longspan.engine.front.x", "from longspan.commands.console import note", False),
])
def test_the_import_check_itself(module, source, fine):
    found = forbidden_imports(Path("x.py"), ast.parse(source), module)
    assert (found == []) is fine


def wrong_imports(file: Path) -> list[str]:
    """Imports that the layer table forbids."""
    return forbidden_imports(file, parse(file), module_name(file))


def lines_beyond(file: Path) -> list[str]:
    """A file that is to be split."""
    count = len(file.read_text(encoding="utf-8").splitlines())
    return [f"{count} lines, at most {MAX_FILE_LINES}"] if count > MAX_FILE_LINES else []


def large_functions(file: Path) -> list[str]:
    """Functions with too many lines or arguments."""
    is_ops = module_name(file).startswith("longspan.ops")
    found = []
    for node in functions(parse(file)):
        limit = MAX_KERNEL_LINES if is_kernel(node) else MAX_FUNCTION_LINES
        if num_lines(node) > limit:
            found.append(f"{node.name}: {num_lines(node)} lines, at most {limit}")
        if num_arguments(node) > MAX_ARGUMENTS and not (is_ops or is_command(node)):
            found.append(f"{node.name}: {num_arguments(node)} arguments, at most {MAX_ARGUMENTS}")
    return found


def test_functions_are_short_on_the_whole():
    sizes = [num_lines(node) for file in FILES for node in functions(parse(file))
             if not is_kernel(node)]
    assert statistics.median(sizes) <= MAX_MEDIAN_FUNCTION_LINES


def reads_environment(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.module == "os" and any(alias.name in ENVIRONMENT for alias in node.names)
    return isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT


def ambient_state(file: Path) -> list[str]:
    """No ``global``; environment variables only in the command line."""
    in_cli = inside(module_name(file), ("longspan.cli",))
    return [
        ast.unparse(node) for node in ast.walk(parse(file))
        if isinstance(node, ast.Global) or (reads_environment(node) and not in_cli)
    ]


def bare_functions(file: Path) -> list[str]:
    """Public functions without return annotation or docstring."""
    found = []
    for node in public_functions(parse(file)):
        if node.returns is None and not is_kernel(node):  # kernels are not typed
            found.append(f"{node.name} (line {node.lineno}): no return annotation")
        if ast.get_docstring(node) is None and not is_overload(node):
            found.append(f"{node.name} (line {node.lineno}): no docstring")
    return found


def bare_classes(file: Path) -> list[str]:
    """Public classes without docstring, and a module without."""
    tree = parse(file)
    found = [node.name for node in tree.body if isinstance(node, ast.ClassDef)
             and not node.name.startswith("_") and ast.get_docstring(node) is None]
    if tree.body and ast.get_docstring(tree) is None:
        found.append("the module")
    return found


@pytest.mark.parametrize("check", [wrong_imports, lines_beyond, large_functions, ambient_state,
                                   bare_functions, bare_classes])
def test_every_file(check: Callable[[Path], list[str]]) -> None:
    found = {name: check(file) for name, file in zip(NAMES, FILES, strict=True)}
    assert {name: lines for name, lines in found.items() if lines} == {}


def prose(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring, attributes' included, and of every comment."""
    for node in ast.walk(ast.parse(source)):
        if (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)):
            yield node.lineno, node.value.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.removeprefix("#").strip()


def is_defined(dotted: str) -> bool:
    """Whether a dotted name is a module of ours, or a name that is bound in one."""
    if is_ours(dotted):
        return True
    module, _, name = dotted.rpartition(".")
    place = REPOSITORY.joinpath(*module.split("."))
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return file.is_file() and name in names_in(file)


def faults(source: str) -> list[str]:
    """One line for each comment or docstring that cannot be followed."""
    found = []
    for line, text in prose(source):
        if text.startswith("Of "):
            found.append(f"line {line}: begins with \"Of\"; say what it is")
        missing = [match.group() for match in NO_DOCUMENT.finditer(text)]
        missing += [name for name in DOTTED.findall(text) if not is_defined(name)]
        missing += [path for path in PATH.findall(text)
                    if not (REPOSITORY / path.rstrip(".")).exists()]
        found += [f"line {line}: {name.strip()} is not in the repository" for name in missing]
    return found


def test_comments_can_be_followed() -> None:
    found = {str(file): faults(file.read_text(encoding="utf-8"))
             for file in (*FILES, *sorted((REPOSITORY / "tests").rglob("*.py")))}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(("source", "count"), [
    ('x = 1\n"""Of a run."""', 1),
    ("def f():\n    # DESIGN 1b, spec: selection, issue 3\n    pass", 3),
    ('"""See `longspan.config.FAMILIES`, `longspan.engine.text`, docs/shapes.md."""', 0),
    ('"""See `longspan.config.NONE`, `longspan.desk`, docs/none.md."""', 3),
    ("x = 'Of a value, DESIGN'", 0),
])
def test_the_prose_check_itself(source: str, count: int) -> None:
    assert len(faults(source)) == count


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_files_that_exist(page: Path) -> None:
    names = ["".join(pair) for pair in PAGE_PATH.findall(page.read_text(encoding="utf-8"))]
    assert [name for name in names if not any(
        (place / name).exists() for place in (page.parent, REPOSITORY, ROOT))] == []


def test_tables_name_modules_that_exist() -> None:
    names = [*ALLOWED_OURS, *ALLOWED_OTHERS, *TORCH_FREE, *COMPUTES,
             *(name for allowed in ALLOWED_OURS.values() for name in allowed)]
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    for override in settings["tool"]["mypy"]["overrides"]:
        names += [name for name in override["module"] if name.startswith("longspan")]
    assert [name for name in names if not is_ours(name)] == []


def run_python(code: str) -> str:
    """Output of a fresh interpreter that sees no GPU."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False,
        cwd=ROOT.parent, timeout=120,
        env={"PATH": "", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_module_imports_without_a_gpu():
    modules = list(map(module_name, FILES))
    code = (f"import importlib, sys\n"
            f"for name in {modules!r}: importlib.import_module(name)\n"
            "torch = sys.modules.get('torch')\n"
            "print(bool(torch and torch.cuda.is_initialized()))")
    assert run_python(code).strip() == "False"  # nothing touches a device on import


def test_the_control_plane_is_torch_free():
    modules = [name for name in map(module_name, FILES)
               if inside(name, TORCH_FREE) and name not in COMPUTES]
    assert all(any(inside(name, (room,)) for name in modules) for room in TORCH_FREE)
    code = (f"import importlib, sys\n"
            f"for name in {modules!r}:\n"
            "    importlib.import_module(name)\n"
            "    if 'torch' in sys.modules: sys.exit(f'{name} imports torch')\n"
            "print('free')")
    assert run_python(code).strip() == "free"
