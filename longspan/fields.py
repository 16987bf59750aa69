"""Values of a JSON object that a person wrote: read by key, checked, refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from longspan.errors import CheckpointError


class Fields:
    """Values of a JSON object by key. Each raises `CheckpointError` with the file, the key and the
    value where it is of another kind."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.raw, self.source = raw, source

    def integer(self, key: str, default: int | None = None) -> int:
        """Read a positive integer; absent and null mean the default."""
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self.wrong(key, "a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Read a finite number that is not negative; absent and null mean the default."""
        value = self.raw.get(key)
        value = default if value is None else value
        if (not isinstance(value, (int, float)) or isinstance(value, bool)
                or not 0 <= value < math.inf):
            raise self.wrong(key, "a number >= 0")
        return float(value)

    def boolean(self, key: str) -> bool:
        """Read true or false; absent and null mean false."""
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return bool(value)

    def block(self, key: str) -> Fields:
        """Read the JSON object under a key; absent and null mean an empty one."""
        value = self.raw.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.wrong(key, "a JSON object")
        return Fields(value or {}, f"{self.source}: {key}")

    def wrong(self, key: str, needed: str) -> CheckpointError:
        """Make the error that names a key and its value."""
        return CheckpointError(f"{self.source}: {key} is {self.raw.get(key)!r}, {needed} is needed")
