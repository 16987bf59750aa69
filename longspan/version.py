"""The version of longspan, which needs no installed package to be known."""

from __future__ import annotations

__version__ = "0.1.0"
