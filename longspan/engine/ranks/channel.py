"""A connection between two ranks that notices when the other one is gone or stands still. No
torch.

Frames are messages in MessagePack behind their length. Both sides send a beat twice a second, from
a thread of their own; a side that hears nothing for `STALL_S` takes the other one for stalled.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

from longspan.engine.processes.wire import MAX_FRAME_BYTES, BadFrameError, Codec, Message, encode
from longspan.engine.ranks.messages import Beat, Bye, Failed, Refused

BEAT_S = 0.5
STALL_S = 10.0
"""Loading and compiling keep a rank's interpreter busy, but never for so long at a time."""
_LENGTH = 8
GONE, NO_MESSAGE = " is gone", " has sent something that is no message"


class ClosedError(Exception):
    """The other side is gone; the message says how."""


class Channel:
    """One end of a connection.

    Args:
        kind: the messages that come in, a union.
        on_lost: told once, on a thread, why the other side is lost, in words that follow its name;
            not after an orderly end.
        stall_s: see `STALL_S`.
    """

    def __init__(
        self, sock: socket.socket, kind: Any, on_lost: Callable[[str], None],
        stall_s: float = STALL_S,
    ) -> None:
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(BEAT_S)
        self._sock, self._codec, self._on_lost, self._stall_s = sock, Codec(kind), on_lost, stall_s
        self._sending = threading.Lock()
        self._messages: SimpleQueue[Any] = SimpleQueue()
        self._is_over = threading.Event()
        for task in (self._receive, self._beat):
            threading.Thread(target=task, name="longspan-rank", daemon=True).start()

    def put(self, message: Message) -> None:
        """Send a message; one to a lost side goes nowhere."""
        frame = encode(message)
        with contextlib.suppress(OSError), self._sending:
            self._send(len(frame).to_bytes(_LENGTH, "little") + frame)

    def get(self, timeout_s: float | None = None) -> Any:
        """Wait for the next message. Raises `TimeoutError`, and `ClosedError` when there will be
        none."""
        try:
            message = self._messages.get(timeout=timeout_s)
        except Empty:
            raise TimeoutError from None
        if isinstance(message, ClosedError):
            self._messages.put(message)  # for whoever asks again
            raise message
        return message

    def close(self) -> None:
        """Close the connection; nobody is told of it here."""
        self._is_over.set()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _send(self, data: bytes) -> None:
        view = memoryview(data)
        while view and not self._is_over.is_set():
            with contextlib.suppress(TimeoutError):
                view = view[self._sock.send(view):]

    def _beat(self) -> None:
        while not self._is_over.wait(BEAT_S):
            self.put(Beat())

    def _receive(self) -> None:
        try:
            while True:
                size = int.from_bytes(self._read(_LENGTH), "little")
                if size > MAX_FRAME_BYTES:
                    raise ClosedError(NO_MESSAGE)
                message = self._codec.decode(self._read(size))
                if isinstance(message, Beat):
                    continue
                self._messages.put(message)
                if isinstance(message, Failed):
                    raise ClosedError(f": {message.reason}")
                if isinstance(message, Bye | Refused):
                    self._is_over.set()
                    raise ClosedError(" has ended")
        except BadFrameError:
            self._lose(ClosedError(NO_MESSAGE))
        except ClosedError as error:
            self._lose(error)
        except OSError:
            self._lose(ClosedError(GONE))

    def _read(self, size: int) -> bytes:
        found, heard_s = bytearray(), time.monotonic()
        while len(found) < size:
            try:
                part = self._sock.recv(min(size - len(found), 1 << 20))
            except TimeoutError:
                if time.monotonic() - heard_s > self._stall_s:
                    raise ClosedError(
                        f" has not been heard of for {self._stall_s:g} s: it is stopped, or its "
                        "machine is") from None
                continue
            if not part:
                raise ClosedError(GONE)
            found += part
            heard_s = time.monotonic()
        return bytes(found)

    def _lose(self, error: ClosedError) -> None:
        was_over = self._is_over.is_set()
        self._is_over.set()
        self._messages.put(error)
        if not was_over:
            self._on_lost(str(error))
