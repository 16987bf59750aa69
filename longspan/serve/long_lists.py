"""Token lists of long bodies, decoded in pieces.

A prompt may come as a million numbers. Any decoder keeps the interpreter to itself until it is
done, on whatever thread it runs, and the event loop waits for as long: 0.1 s and more. So long
lists are cut at commas, and between the pieces this thread sleeps: one that is always ready to run
gives way only after a while, and each token's way out of the server takes several turns.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any

import msgspec

from longspan.serve.protocol import MAX_INT

FIELDS = ("prompt", "tokens")
"""Fields that may hold long lists of token ids."""
LONG_BYTES = 1 << 18
"""Bytes from which a body, or a list in it, counts as long."""
PIECE_BYTES = 1 << 16
PAUSE_S = 2e-4
"""Pause after each piece, which takes about twice as long, seconds."""
PLACEHOLDER = msgspec.Raw(b"[0]")

_ids = msgspec.json.Decoder(list[Annotated[int, msgspec.Meta(ge=0, le=MAX_INT)]])
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


def take_out(body: bytes) -> tuple[bytes, dict[str, Sequence[int]]]:
    """Return the body with short lists in place of its long token lists, and the latter's ids.

    Anything else is left for validation to reject.
    """
    found = dict[str, Sequence[int]]()
    with suppress(msgspec.DecodeError, UnicodeDecodeError):
        fields: dict[str, Any] = _fields.decode(body)
        for name in FIELDS:
            ids = _decode(bytes(fields.get(name, b"")))
            if ids is not None:
                found[name], fields[name] = ids, PLACEHOLDER
        if found:
            body = msgspec.json.encode(fields)
    return body, found


def _decode(text: bytes) -> array[int] | None:
    """Decode token ids; None if the text is short, or not a list of them."""
    if len(text) < LONG_BYTES or text[:1] != b"[" or text[-1:] != b"]":
        return None
    ids, start, end = array("i"), 1, len(text) - 1
    try:
        while start < end:
            stop = text.find(b",", start + PIECE_BYTES, end)
            stop = end if stop < 0 else stop
            ids.extend(_ids.decode(b"[" + text[start:stop] + b"]"))
            start = stop + 1
            time.sleep(PAUSE_S)
    except msgspec.DecodeError:
        return None
    return None if text[end - 1 : end] == b"," else ids
