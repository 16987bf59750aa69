"""What commands show: the prefill bar, tables and memory figures.

Everything that is not the result goes to stderr. A live bar is drawn only on a terminal; logs get
a plain line at every tenth.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from longspan.units import in_gib

if TYPE_CHECKING:
    from longspan.engine.prefix_origin import PrefixOrigin
    from longspan.engine.recall import Recall
    from longspan.engine.request import Progress, RequestOutput

LOG_WIDTH = 120
QUIET_S = 2.0
"""Plain logs get no progress of prefills shorter than this."""


class PrefillBar:
    """Live progress of a prefill on stderr; used as a context manager."""

    def __init__(self, title: str = "prefill") -> None:
        self._title = title
        self._is_live = sys.stderr.isatty()
        self._bar: Any = None
        self._task: Any = None
        self._num_shown_tenths = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Remove the live bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(self, event: Progress) -> None:
        """Show how far a prefill is."""
        if self._is_live:
            self._draw(event)
        else:
            self._log(event)

    def _draw(self, event: Progress) -> None:
        if self._bar is None:
            self._bar = _live_bar()
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=event.num_prompt_tokens, rate="")
        self._bar.update(self._task, completed=event.num_prefilled_tokens, rate=_pace(event),
                         refresh=True)

    def _log(self, event: Progress) -> None:
        percent_done = 100 * event.num_prefilled_tokens // event.num_prompt_tokens
        if percent_done // 10 <= self._num_shown_tenths or event.elapsed_s < QUIET_S:
            return
        self._num_shown_tenths = percent_done // 10
        note(f"{self._title} {event.num_prefilled_tokens:>9,}/{event.num_prompt_tokens:,} tokens "
             f"{percent_done:3d} %  {_pace(event)}{_cached(event)}".rstrip())


def prefill_rate(event: Progress) -> float:
    """Tokens computed per second so far, cached ones not counted; 0 before there are any."""
    computed = event.num_prefilled_tokens - event.num_cached_tokens
    return computed / event.elapsed_s if computed > 0 and event.elapsed_s > 0 else 0.0


def note(text: str) -> None:
    """Write one line on stderr."""
    print(text, file=sys.stderr, flush=True)


def write_answer(text: str) -> None:
    """Write text of an answer on stdout, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]],
               to_stderr: bool = False) -> None:
    """Print a table that reads well in a terminal and in a plain log; numbers to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=to_stderr, highlight=False)
    if not console.is_terminal:
        console = Console(stderr=to_stderr, highlight=False, width=LOG_WIDTH)
    table = Table(
        title=title, title_justify="left", title_style="bold", show_header=any(columns),
        box=box.SIMPLE_HEAD if console.is_terminal else box.ASCII if any(columns) else None)
    for index, name in enumerate(columns):
        is_text = index == 0 or not any(columns)
        table.add_column(name, justify="left" if is_text else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*[str(cell) for cell in row])
    console.print(table)


def report_rows(output: RequestOutput, peak_bytes: int) -> list[tuple[str, str]]:
    """Return what a finished request cost, as (name, value with unit)."""
    tokens = f"{output.num_prompt_tokens:,}"
    if output.num_cached_tokens:
        tokens += f" ({output.num_cached_tokens:,} cached{_origin(output.prefix_origin)})"
    computed = output.num_prompt_tokens - output.num_cached_tokens
    return [
        ("prompt tokens", tokens),
        ("time to first token", seconds(output.ttft_s)),
        ("prefill", per_second(computed / output.prefill_s if output.prefill_s else None)),
        ("decode", per_second(output.decode_tokens_per_s)),
        ("attention density", percent(output.density)),
        *recall_rows(output.recall),
        ("peak memory", in_gib(peak_bytes)),
    ]


def recall_rows(recall: Recall | None) -> list[tuple[str, str]]:
    """Return how much attention mass sparse prefill kept; nothing where none was sparse."""
    if recall is None:
        return []
    covered = f" ({recall.num_tokens:,} tokens)"
    rows = [("attention recall", percent(recall.typical) + covered)]
    if recall.scouts is not None:
        rows.append(("recall of scouts", percent(recall.scouts)))
    return rows


def seconds(value: float | None) -> str:
    """Format a duration; a dash for none."""
    return "-" if value is None else f"{value:.2f} s" if value < 100 else f"{value:.0f} s"


def per_second(value: float | None) -> str:
    """Format a rate of tokens; a dash for none."""
    return "-" if value is None else f"{value:,.1f} tokens/s"


def percent(value: float | None) -> str:
    """Format a share; a dash for none."""
    return "-" if value is None else f"{100 * value:.1f} %"


def _live_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    return Progress(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens"),
        TextColumn("{task.fields[rate]}"), console=Console(stderr=True), transient=True)


def _origin(origin: PrefixOrigin | None) -> str:
    """Say which of the cached tokens were not on the device."""
    if origin is None:
        return ""
    places = (("host memory", origin.num_host_tokens), ("disk", origin.num_disk_tokens))
    found = ", ".join(f"{count:,} from {place}" for place, count in places if count)
    return f": {found} in {seconds(origin.load_s)}"


def _cached(event: Progress) -> str:
    return f" ({event.num_cached_tokens:,} cached)" if event.num_cached_tokens else ""


def _pace(event: Progress) -> str:
    """Tokens per second and time left; empty before anything is computed."""
    rate = prefill_rate(event)
    if not rate:
        return ""
    missing = event.num_prompt_tokens - event.num_prefilled_tokens
    minutes, left_s = divmod(round(missing / rate), 60)
    left = f", {minutes}:{left_s:02} left" if missing else ""
    return f"{rate:,.0f} tokens/s{left}"
