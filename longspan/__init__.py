"""longspan makes open models read a million tokens. Importing it loads no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longspan.config import EngineConfig
    from longspan.engine.front.llm import LLM
    from longspan.engine.request import SamplingParams

__all__ = ["LLM", "EngineConfig", "SamplingParams"]

_HOMES = {
    "LLM": "longspan.engine.front.llm",
    "EngineConfig": "longspan.config",
    "SamplingParams": "longspan.engine.request",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
