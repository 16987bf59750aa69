"""Drives the engine of `longspan bench cache`: a request that decodes, and prompts beside it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from longspan.bench.engine.engine import EngineSizes, ShapeEngine, random_ids
from longspan.bench.session import CheckFailed
from longspan.engine.control.loop import Loop
from longspan.engine.control.scheduler import Scheduler
from longspan.engine.request import Request, SamplingParams
from longspan.engine.setup.compile_ahead import compile_steps

DECODING_LEN, DECODED_LEN = 128, 4_000
QUESTION_LEN = 64
"""Last tokens of a document's further questions."""
ANY_SPEED = 1e15


def sizes_for(length: int, chunk_len: int | None, **places: Any) -> EngineSizes:
    """Return the sizes of an engine whose pool holds one prompt and the request that decodes."""
    room = DECODING_LEN + DECODED_LEN + 512
    return EngineSizes(
        max_model_len=max(length + 128, room), num_tokens=length + room,
        chunk_len=chunk_len, max_num_requests=4, places=places)


def begin(engine: ShapeEngine, *, sparse: bool) -> Driver:
    """Compile, compute a first prompt, and begin to decode."""
    engine.runner.compile_ahead(compile_steps(engine.plan.scheduler_config()))
    driver = Driver(engine, sparse=sparse)
    driver.prefill("first", min(4_096, engine.plan.config.max_model_len or 4_096) // 2, 7)
    driver.decode()
    return driver


class Driver:
    """An engine's loop, a request that decodes, and what happens meanwhile."""

    def __init__(self, engine: ShapeEngine, *, sparse: bool) -> None:
        self._engine, self._sparse = engine, sparse
        config = engine.plan.scheduler_config()
        # What loading takes is measured here, also where computing would be sooner.
        self.scheduler = Scheduler(replace(
            config, tiers=replace(config.tiers, disk_bytes_per_s=ANY_SPEED)))
        self._loop = Loop(self.scheduler, engine.runner.transport(), queues_prefill=False)
        self._tokens: dict[str, int] = {}
        self._decoded_s = 0.0
        self.longest_pause_s = 0.0
        """Between two tokens of the decoding request, since `watch`."""

    def decode(self) -> None:
        """Begin to decode, until the end."""
        self.add("decoding", DECODING_LEN, 1, DECODED_LEN)
        self.turn_until(lambda: "decoding" in self._tokens)

    def watch(self) -> None:
        """Measure pauses from now on."""
        self.longest_pause_s, self._decoded_s = 0.0, time.perf_counter()

    def add(
        self, name: str, length: int, seed: int, num_tokens: int = 1, *,
        question: int | None = None,
    ) -> Request:
        """Hand in a prompt.

        Args:
            question: seed of its last tokens, where they differ from those of the document.
        """
        ids = random_ids(length, self._engine.plan.model.vocab_size, seed)
        if question is not None:
            ids = ids[:-QUESTION_LEN] + random_ids(
                QUESTION_LEN, self._engine.plan.model.vocab_size, question)
        request = Request(
            request_id=name, prompt_ids=ids,
            params=SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=0.0),
            sparse=self._sparse and num_tokens == 1)
        self._loop.add(request)
        return request

    def prefill(
        self, name: str, length: int, seed: int, *, question: int | None = None,
    ) -> tuple[float, int, Request]:
        """Ask and wait for the first token: seconds, the token, the request."""
        begun_s = time.perf_counter()
        request = self.add(name, length, seed, question=question)
        self.turn_until(lambda: name in self._tokens)
        return time.perf_counter() - begun_s, self._tokens[name], request

    def cancel(self, name: str) -> None:
        """Cancel a request and wait until its blocks are free."""
        self._loop.abort(name)
        self.turn_until(lambda: name not in self.scheduler._running)

    def settle(self) -> None:
        """Wait until everything is written."""
        self.turn_until(lambda: self.scheduler.tiers.is_idle)

    def end(self) -> None:
        """Cancel what runs, and wait until nothing is under way."""
        self._loop.abort("decoding")
        self.turn_until(lambda: self._loop.is_idle)

    def turn_until(self, is_over: Callable[[], bool]) -> None:
        """Turn the loop. Raises `CheckFailed` when a request fails."""
        while not is_over():
            for update in self._loop.turn().updates:
                if update.failure:
                    raise CheckFailed(f"{update.failure}; not timed")
                if update.token_id is None:
                    continue
                self._tokens.setdefault(update.request_id, update.token_id)
                if update.request_id == "decoding":
                    now_s = time.perf_counter()
                    self.longest_pause_s = max(self.longest_pause_s, now_s - self._decoded_s)
                    self._decoded_s = now_s
