"""What a server writes to its log: lines with time and level, and never a flood of one kind."""

from __future__ import annotations

import logging
import time
from typing import Any

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
PERIOD_S = 60.0
"""Lines of one kind come once in this time where they could be many."""
ACCESS = logging.getLogger("longspan.access")
NOISY = ("asyncio", "uvicorn.error")
"""Loggers of libraries that write a line, and a traceback, for each connection that fails."""


class Seldom:
    """Logs the first of many lines, and how many there were since, once in a period."""

    def __init__(self, period_s: float = PERIOD_S) -> None:
        self._period_s = period_s
        self._next_s = float("-inf")
        self._num_held = 0

    def warn(self, logger: logging.Logger, text: str, *values: Any) -> None:
        """Log a warning, unless one was logged a short while ago."""
        if not self.may_pass():
            return
        num_held, self._num_held = self._num_held, 0
        more = f" ({num_held} more times since the last such line)" if num_held else ""
        logger.warning(text + "%s", *values, more)

    def may_pass(self) -> bool:
        """Return whether it is time for a line; count it otherwise."""
        now_s = time.monotonic()
        if now_s < self._next_s:
            self._num_held += 1
            return False
        self._next_s = now_s + self._period_s
        return True


class Calm(logging.Filter):
    """Lets a record of each kind pass once in a period, without its traceback."""

    def __init__(self, period_s: float = PERIOD_S) -> None:
        super().__init__()
        self._period_s = period_s
        self._kinds = dict[str, Seldom]()

    def filter(self, record: logging.LogRecord) -> bool:
        """Decide about one record."""
        error = record.exc_info[1] if record.exc_info else None
        kind = f"{record.msg.splitlines()[0][:80] if isinstance(record.msg, str) else ''}" \
            f"{type(error).__name__}"
        if not self._kinds.setdefault(kind, Seldom(self._period_s)).may_pass():
            return False
        if isinstance(error, OSError):  # the system's reasons need no traceback
            record.msg = f"{str(record.msg).splitlines()[0]}: {error}"
            record.args = record.exc_info = record.exc_text = None
        return True


def set_up(*, has_access_log: bool) -> None:
    """Write the log to standard error.

    Args:
        has_access_log: a line for each request too.
    """
    logging.basicConfig(level=logging.WARNING, format=FORMAT)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    for name in NOISY:
        logging.getLogger(name).addFilter(Calm())
    ACCESS.setLevel(logging.INFO if has_access_log else logging.WARNING)


def access(client: str, line: str, status: int, request_id: str, started_s: float) -> None:
    """Log a request that was answered.

    Args:
        line: method and path.
        started_s: monotonic time of its arrival.
    """
    ACCESS.info("%s %s %d %.3f s, request %s", client, line, status,
                time.monotonic() - started_s, request_id)
