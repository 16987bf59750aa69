"""The engine: scheduler, runner and the offline `LLM`. Importing this package loads no torch."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {"LLM": "longspan.engine.llm", "SamplingParams": "longspan.engine.request"}

__all__ = ["LLM", "SamplingParams"]  # noqa: F822 - resolved lazily below


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
