"""Copies of KV blocks between device, host memory and disk, as scheduler and runner speak of them.

No torch. A *slot* is room for one block in host memory. What is loaded into a block of the device
comes after what was saved from it by an earlier transfer. Apart from that transfers are done at any
time: one that needs the slots of another is submitted when that one has ended.
"""

from __future__ import annotations

from array import array
from typing import Literal

import msgspec

from longspan.engine.request import TokenIds

HASH_BYTES = 16
TransferKind = Literal["save", "load", "read", "write", "drop"]
"""``save``: device to host; ``load``: host to device; ``read``: a file to host; ``write``: host to
a file; ``drop``: a file is deleted."""


def _empty() -> array[int]:
    return array("i")


class Transfer(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True,
               kw_only=True):
    """One copy of some blocks. A runner does each once, however often it is sent."""

    transfer_id: int
    """0, 1, 2, ... in the order of submission."""
    kind: TransferKind
    blocks: TokenIds = msgspec.field(default_factory=_empty)
    """[n] blocks of the device pool, for ``save`` and ``load``."""
    slots: TokenIds = msgspec.field(default_factory=_empty)
    """[n] host slots; none for ``drop``."""
    file: str = ""
    """Name of the file, for ``read``, ``write`` and ``drop``."""
    hashes: bytes = b""
    """Chain hashes of the blocks, `HASH_BYTES` each, for ``read`` and ``write``."""
    parent: bytes = b""
    """Hash of the block before the first one, for ``write``."""

    @property
    def num_blocks(self) -> int:
        """Blocks that are copied."""
        return len(self.slots)


class TransferResult(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True,
                     kw_only=True):
    """A transfer that is done, or that has failed."""

    transfer_id: int
    failure: str = ""
    """Why nothing of it is to be used; empty: it was done."""
    elapsed_s: float = 0.0
    """Time that the copies took, waiting for others not counted; 0: not measured."""
