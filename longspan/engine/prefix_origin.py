"""Where a prompt's cached tokens came from. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixOrigin:
    """Where a prompt's cached tokens came from, if not all of them were on the device."""

    num_host_tokens: int = 0
    """Those that were copied from host memory."""
    num_disk_tokens: int = 0
    """Those that were read from disk."""
    load_s: float = 0.0
    """Seconds from the request's admission until they were on the device."""
