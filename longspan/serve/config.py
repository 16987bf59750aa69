"""Choices of one server."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import ip_address

from longspan.errors import LongspanError

ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@]+|null")
HOST_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


def plain_name(name: str) -> str:
    """Return a host's name in the one form that is compared: lower case, no brackets, no final
    dot, addresses in their shortest form."""
    name = name.lower().removesuffix(".").removeprefix("[").removesuffix("]")
    return str(ip_address(name)) if is_address(name) else name


def is_loopback(name: str) -> bool:
    """Return whether a plain name stands for this machine and nothing else."""
    return ip_address(name).is_loopback if is_address(name) else name == "localhost"


def is_address(name: str) -> bool:
    """Return whether a plain name is an IP address."""
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """Limits and times of the HTTP edge. ``None`` means: decide from the engine's limits."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on; 0: any free one."""
    api_keys: tuple[str, ...] = ()
    """Any of them opens every route; empty: no key is asked for. /health never asks."""
    allowed_hosts: tuple[str, ...] = ()
    """Names, beside those of the loopback interface, by which clients may call this server. A
    server that other machines reach takes any, unless some are named."""
    allowed_origins: tuple[str, ...] = ()
    """Origins (scheme, name and port) of pages elsewhere that may use this server from a browser;
    ``*``: all. They need the API key as everybody does."""
    model_name: str | None = None
    """Name under which clients ask for the model; default: the engine's."""
    max_body_bytes: int | None = None
    """Longest request body; default: 16 bytes for each token of the longest prompt."""
    max_buffered_bytes: int | None = None
    """Request bodies in memory together; default: four of the longest."""
    max_queued_tokens: int | None = None
    """Prompt tokens accepted and not yet prefilled; default: four of the longest prompts."""
    max_queued_requests: int = 1024
    """Requests accepted and not yet answering."""
    max_connections: int = 4096
    """Open connections; fewer where the system allows fewer descriptors. Beyond, idle ones are
    closed, the longest idle first."""
    access_log: bool = False
    """Log a line for each request."""
    max_choices: int = 64
    """Completions that one request may ask for: its prompts times its n."""
    default_max_tokens: int = 2048
    """Longest completion of a request that names none (less if the prompt leaves less room)."""
    ping_interval_s: float = 5.0
    """Between signs of life on a silent stream."""
    header_grace_s: float = 1.0
    """Headers of a stream go out after this, even while the prompt is still being tokenised; until
    then a refusal gets its own status."""
    head_timeout_s: float = 20.0
    """Longest wait for the head of a request, from its first byte or the connection's start."""
    body_timeout_s: float = 30.0
    """Longest silence of a client that is sending a body; and longest time for a body that comes
    more slowly than `body.SLOWEST_BYTES_PER_S`."""
    send_timeout_s: float = 120.0
    """Longest time for which a client may not read; its request is then cancelled."""
    drain_timeout_s: float = 600.0
    """Longest wait for running requests after SIGTERM."""

    def __post_init__(self) -> None:
        if not self.host:
            raise LongspanError("host is empty; name an address, 127.0.0.1 for this machine alone "
                                "or 0.0.0.0 for all that reach it")
        if not 0 <= self.port <= 65535:
            raise LongspanError(f"port {self.port} is not between 0 and 65535")
        if self.model_name == "":
            raise LongspanError("model_name is empty; leave it out for the model's own")
        for name in ("max_body_bytes", "max_buffered_bytes", "max_queued_tokens",
                     "max_queued_requests", "max_choices", "max_connections", "default_max_tokens",
                     "ping_interval_s", "head_timeout_s", "body_timeout_s", "send_timeout_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:  # nan too
                raise LongspanError(f"{name} must be positive, not {value}")
        if not self.drain_timeout_s >= 0:
            raise LongspanError(f"drain_timeout_s must be 0 or more, not {self.drain_timeout_s}")
        for name in self.allowed_hosts:
            if not (HOST_NAME.fullmatch(plain_name(name)) or is_address(plain_name(name))):
                raise LongspanError(f"allowed host {name!r} must be a name or an address alone, "
                                    "without scheme and port, for example gpu-3.example.org")
        for origin in self.allowed_origins:
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise LongspanError(f"allowed origin {origin!r} must be scheme, name and port as "
                                    "browsers write them, for example https://app.example.org, or "
                                    "* for all")
        if not all(key and key.isascii() and key.isprintable() for key in self.api_keys):
            raise LongspanError("an API key must be printable ASCII and not empty")

    @property
    def is_public(self) -> bool:
        """Whether other machines may reach the server."""
        return not is_loopback(plain_name(self.host))
