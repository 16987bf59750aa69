"""Whole runs as Python functions: a recipe is data, and names everything that decides its model."""

from __future__ import annotations

from collections.abc import Callable

from longspan.errors import LongspanError
from longspan.recipes.qwen import qwen2_5_7b_1m, qwen2_5_14b_1m
from longspan.recipes.recipe import Extension

EXTENSIONS: dict[str, Callable[[], Extension]] = {
    "qwen2.5-7b-1m": qwen2_5_7b_1m, "qwen2.5-14b-1m": qwen2_5_14b_1m}


def find_extension(name: str) -> Extension:
    """Return a recipe by name. Raises `LongspanError` for an unknown one."""
    if name not in EXTENSIONS:
        raise LongspanError(f"no recipe named {name}: choose from {', '.join(EXTENSIONS)}")
    return EXTENSIONS[name]()
