"""Parquet, which needs a package that not everyone has."""

from __future__ import annotations

from typing import Any

from longspan.errors import MissingDependencyError


def arrow() -> Any:
    """pyarrow with its Parquet module. Raises `MissingDependencyError`."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingDependencyError(
            "Parquet needs pyarrow, which is not installed: pip install 'longspan[synth]'"
        ) from None
    return pyarrow
