"""Prompts that come back from host memory, alone and in turn with another one, in one engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cached_property, partial
from types import TracebackType
from typing import Any, Self

from longspan.bench.engine.cache_driver import Driver, begin, sizes_for
from longspan.bench.engine.cache_options import (
    SPARE,
    SWAP_GIB,
    CacheOptions,
    check_token,
    document_bytes,
    figures,
)
from longspan.bench.engine.engine import open_engine
from longspan.bench.shapes import Shape
from longspan.bench.timing import rounded, synchronize
from longspan.engine.prefix_origin import PrefixOrigin
from longspan.units import GIB

FIRST, SECOND = 2, 3
"""Seeds of the two prompts."""


class HostMeasures:
    """The rows ``host`` and ``turns`` of one length. The engine is opened for the first of them,
    and each prompt is computed once. A context manager."""

    def __init__(self, device: str, shape: Shape, options: CacheOptions, length: int) -> None:
        self._device, self._shape, self._options, self._length = device, shape, options, length
        self._stack, self._is_sound = ExitStack(), True
        self.measures: Mapping[str, Callable[[], dict[str, Any]]] = {
            "host": partial(self._measure, self._host),
            "turns": partial(self._measure, self._turns)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._stack.close()

    def _measure(self, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        self._is_sound = False
        row = measure()
        self._is_sound = True
        return row

    def _end(self) -> None:
        """Let the engine come to rest, unless it is in an error."""
        if self._is_sound:
            self._driver.end()

    def _host(self) -> dict[str, Any]:
        """On a pool that holds one prompt, another one evicts it, and is cancelled; then the first
        one is asked again."""
        driver, length = self._driver, self._length
        prefill_s, token = self._first
        driver.watch()
        save_s, save_pause = driver.evict(length), driver.longest_pause
        driver.watch()
        ttft_s, again, request = driver.prefill("again", length, FIRST)
        synchronize(self._device)
        check_token(again, token, "host memory")
        return {**figures(prefill_s, ttft_s, request.origin, self._block_bytes),
                "save_s": rounded(save_s, 4), "save_pause_s": save_pause["pause_s"],
                "save_pause": save_pause, **self._pause()}

    def _turns(self) -> dict[str, Any]:
        driver, length = self._driver, self._length
        turns, cached = list[tuple[float, PrefixOrigin | None]](), list[int]()
        first = {FIRST: self._first}
        driver.watch()
        prefill_s, token, _ = driver.prefill("other document", length, SECOND)
        first[SECOND], first_pause = (prefill_s, token), driver.longest_pause
        driver.watch()
        for turn in range(self._options.turns):
            for seed, (_, token) in first.items():
                ttft_s, again, request = driver.prefill(f"{seed} again {turn}", length, seed)
                check_token(again, token, "host memory")
                turns.append((ttft_s, request.origin))
                cached.append(request.num_cached_tokens)
        synchronize(self._device)
        origin = min((origin for _, origin in turns), key=lambda origin: (
            0 if origin is None else origin.num_host_tokens))
        worst_s = max(ttft_s for ttft_s, _ in turns)
        return {**figures(first[FIRST][0], worst_s, origin, self._block_bytes),
                "prefills_s": [rounded(seconds, 4) for seconds, _ in first.values()],
                "turns_s": [rounded(seconds, 4) for seconds, _ in turns],
                "cached_tokens": cached, "host_gib": rounded(self._host_gib, 4),
                "first_pause_s": first_pause["pause_s"], "first_pause": first_pause,
                **self._pause()}

    def _pause(self) -> dict[str, Any]:
        pause = self._driver.longest_pause
        return {"pause_s": pause["pause_s"], "pause": pause,
                "step_budget_s": self._driver.step_budget_s}

    @property
    def _block_bytes(self) -> int:
        return self._driver.scheduler.config.tiers.block_bytes

    @cached_property
    def _host_gib(self) -> float:
        options = self._options
        found = SPARE * document_bytes(self._device, self._shape, options, self._length) / GIB
        if "turns" not in options.places:
            return found
        return options.host_gib or found + SWAP_GIB[self._device.split(":")[0]]

    @cached_property
    def _driver(self) -> Driver:
        """An engine that decodes, closed at the end."""
        sizes = sizes_for(self._length, self._options.chunk_len, kv_host_gib=self._host_gib)
        engine = self._stack.enter_context(open_engine(self._shape, self._device, sizes))
        driver = begin(engine, sparse=self._options.attention == "sparse")
        self._stack.callback(self._end)
        return driver

    @cached_property
    def _first(self) -> tuple[float, int]:
        """Compute the first prompt: seconds, its token."""
        prefill_s, token, _ = self._driver.prefill("document", self._length, FIRST)
        return prefill_s, token
