"""The orders that a child process of an engine gets, and the sockets' addresses. No torch."""

from __future__ import annotations

from typing import Literal

import msgspec

from longspan.config import EngineConfig

Role = Literal["scheduler", "runner"]
ROLES: tuple[Role, ...] = ("scheduler", "runner")


class Orders(msgspec.Struct, frozen=True, kw_only=True):
    """A child's task, sent as the first line of its standard input."""

    role: Role
    directory: str
    """Private directory of the sockets, removed at the end."""
    config: EngineConfig
    max_in_flight: int
    loader: str
    """``module:function`` of the `longspan.engine.processes.backend.Loader`."""

    def address(self, role: Role | Literal["front", "grammars"]) -> str:
        """Return the socket address of one process's inbox."""
        return socket_address(self.directory, role)


def socket_address(directory: str, role: str) -> str:
    """Return the socket address of one process's inbox in a private directory."""
    return f"ipc://{directory}/{role}"
