"""The HTTP edge: an OpenAI-compatible server in front of an engine in other processes."""

from __future__ import annotations

from importlib.util import find_spec

from longspan.errors import MissingDependencyError

NEEDED = {"fastapi": "fastapi", "uvicorn": "uvicorn", "pydantic": "pydantic",
          "prometheus_client": "prometheus-client", "zmq": "pyzmq", "msgspec": "msgspec"}
"""Distribution that provides each module."""


def check_dependencies() -> None:
    """Raise `MissingDependencyError` with the command that installs what the server needs."""
    missing = [name for module, name in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise MissingDependencyError(
            f"the server needs {', '.join(missing)}: pip install 'longspan[serve]'")
