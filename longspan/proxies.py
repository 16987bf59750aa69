"""Proxies that the environment names: checked before a library trips over them."""

from __future__ import annotations

from urllib.parse import urlsplit
from urllib.request import getproxies

from longspan.errors import LongspanError

SCHEMES = ("http", "https", "all")


def check_proxies() -> None:
    """Raise `LongspanError` for a proxy variable that holds no address."""
    found = getproxies()
    for scheme in SCHEMES:
        address = found.get(scheme)
        if address and not _is_address(address):
            raise LongspanError(f"the environment's {scheme}_proxy is {address!r}, which is no "
                                "address such as http://proxy.example.org:3128; correct or unset "
                                "it")


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        return bool(parts.hostname) and (parts.port is None or parts.port >= 0)
    except ValueError:
        return False
