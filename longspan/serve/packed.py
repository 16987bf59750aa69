"""Bodies as some clients send them: packed, or with halves of characters."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator

from longspan.serve.errors import ApiError

PIECE_BYTES = 1 << 18
"""Bytes that are unpacked at a time, so that little becomes no more than its limit."""
GZIP = 16 + zlib.MAX_WBITS
"""zlib's name for the gzip format."""
# Any escape of JSON, so that a backslash that is itself escaped is passed over.
ESCAPE = re.compile(rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
                    rb"|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL)
REPLACEMENT = rb"\ufffd"


def unpacker(encoding: str) -> Callable[[bytes, bool], Iterator[bytes]]:
    """Return a function that unpacks pieces of a body; it is told which one is the last.

    Raises 415 for an encoding that is not known; the function raises 400 for what is not in it.
    """
    kind = encoding.strip().lower()
    if kind in ("", "identity"):
        return lambda data, is_last: iter((data,))
    if kind not in ("gzip", "x-gzip"):
        raise ApiError(415, f"Content-Encoding {encoding[:40]!r} is not known here; send the body "
                       "as it is, or as gzip.", headers={"Accept-Encoding": "gzip"})
    return _Gzip().unpack


class _Gzip:
    def __init__(self) -> None:
        self._state = zlib.decompressobj(GZIP)

    def unpack(self, data: bytes, is_last: bool) -> Iterator[bytes]:
        """Yield what is in a piece, little by little."""
        try:
            while data or self._state.unconsumed_tail:
                yield self._state.decompress(data or self._state.unconsumed_tail, PIECE_BYTES)
                data = b""
                if self._state.eof:
                    if self._state.unused_data:
                        raise zlib.error("something follows its end")
                    break
            if is_last:
                yield self._state.flush(PIECE_BYTES)
        except zlib.error as error:
            raise ApiError(400, f"The body is not gzip, as Content-Encoding says ({error}).") \
                from None
        if is_last and not self._state.eof:
            raise ApiError(400, "The body's gzip data is cut off.")


def mend_surrogates(body: bytes) -> bytes:
    """Return JSON text with U+FFFD for halves of characters: texts that a client has cut amid an
    emoji have them."""
    return ESCAPE.sub(lambda found: REPLACEMENT if found[1] else found[0], body)
