"""What a child process of an engine is told, and where the sockets are. No torch."""

from __future__ import annotations

from typing import Literal

import msgspec

from longspan.config import EngineConfig

Role = Literal["scheduler", "runner"]
ROLES: tuple[Role, ...] = ("scheduler", "runner")


class Orders(msgspec.Struct, frozen=True, kw_only=True):
    """What a child is to do: the first line of its standard input."""

    role: Role
    directory: str
    """Of the sockets; removed by whoever is the last to notice the end."""
    config: EngineConfig
    max_in_flight: int
    loader: str
    """module:function that builds what computes."""

    def address(self, who: Role | Literal["front"]) -> str:
        """Of an inbox."""
        return socket_address(self.directory, who)


def socket_address(directory: str, who: str) -> str:
    """Of the inbox of ``who``, in a private directory."""
    return f"ipc://{directory}/{who}"
