"""Drives the engine of `longspan bench cache`: a request that decodes, and prompts beside it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from longspan import garbage
from longspan.bench.engine.engine import EngineSizes, ShapeEngine, random_ids
from longspan.bench.session import CheckFailed
from longspan.bench.timing import rounded
from longspan.engine.control.loop import Loop
from longspan.engine.control.prefixes import hash_prompt
from longspan.engine.control.scheduler import InFlightStep, Scheduler
from longspan.engine.control.self_measurement import measure_itself
from longspan.engine.request import Request, SamplingParams
from longspan.engine.setup.compile_ahead import compile_steps
from longspan.engine.step import StepResult

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
    """Compile and measure the machine as a server does, and begin to decode."""
    engine.runner.compile_ahead(compile_steps(engine.plan.scheduler_config()))
    driver = Driver(engine, sparse=sparse)
    driver.measure()
    garbage.freeze()
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
        self._loop = Loop(self.scheduler, engine.runner.transport(), queues_prefill=False,
                          on_result=self._note_step)
        self._tokens: dict[str, int] = {}
        self.num_prefilled: Counter[str] = Counter()
        """Prompt tokens computed for each request; a paused chunk's in proportion."""
        self._decoded_s = self._watched_s = 0.0
        self._step: tuple[float, float, int] = 0.0, 0.0, 0
        self.longest_pause: dict[str, Any] = {"pause_s": 0.0}
        """The longest one between two tokens of the decoding request since `watch`, ``pause_s``:
        how long after that it ended, and of its last step what was predicted, what the device
        took, and how many prompt tokens it had."""

    def measure(self) -> None:
        """Learn what steps take."""
        measure_itself(self.scheduler, self._loop)

    def decode(self) -> None:
        """Begin to decode, until the end."""
        self.add("decoding", DECODING_LEN, 1, DECODED_LEN)
        self.turn_until(lambda: "decoding" in self._tokens)

    @property
    def step_budget_s(self) -> float | None:
        """What a pause is compared with."""
        return self._engine.plan.config.step_budget_s

    @property
    def longest_pause_s(self) -> float:
        """Seconds of `longest_pause`."""
        return float(self.longest_pause["pause_s"])

    def watch(self) -> None:
        """Measure pauses from now on."""
        self.longest_pause, self._decoded_s = {"pause_s": 0.0}, time.perf_counter()
        self._watched_s = self._decoded_s

    def add(
        self, name: str, length: int, seed: int, num_tokens: int = 1, *,
        question: int | None = None,
    ) -> Request:
        """Hand in a prompt.

        Args:
            question: seed of its last tokens, where they differ from those of the document.
        """
        begun_s = time.perf_counter()
        request = self._make(name, length, seed, num_tokens, question)
        # a server's front end does that, beside the loop
        self._decoded_s += time.perf_counter() - begun_s
        self._loop.add(request)
        return request

    def prefill(
        self, name: str, length: int, seed: int, *, question: int | None = None,
    ) -> tuple[float, int, Request]:
        """Ask and wait for the first token: seconds, the token, the request."""
        request = self.add(name, length, seed, question=question)
        begun_s = time.perf_counter()
        self.turn_until(lambda: name in self._tokens)
        return time.perf_counter() - begun_s, self._tokens[name], request

    def evict(self, length: int) -> float:
        """Hand in another prompt, and cancel it when it begins. Returns the time until then."""
        other = self.add("other", length, 3)
        begun_s = time.perf_counter()
        self.turn_until(lambda: other.computed_len > 0 or other.num_pieces > 0
                        or other.num_in_flight > 0)
        taken_s = time.perf_counter() - begun_s
        self.cancel("other")
        return taken_s

    def prefill_twice(self, length: int) -> dict[str, int]:
        """Cancel a prompt a step behind its middle, and ask it again. Returns the tokens computed
        each time, and those of the beginning that were found the second time."""
        first = self.add("document", length, 2)
        self.turn_until(lambda: first.computed_len >= length // 2)
        begun = self.num_prefilled["document"]
        self.turn_until(lambda: self.num_prefilled["document"] > begun)
        self.cancel("document")
        _, _, request = self.prefill("again", length, 2)
        return {"computed_tokens": self.num_prefilled["document"],
                "computed_again": self.num_prefilled["again"],
                "found_tokens": request.num_cached_tokens}

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
                    self._note_pause(now_s - self._decoded_s, now_s - self._watched_s)
                    self._decoded_s = now_s

    def _make(
        self, name: str, length: int, seed: int, num_tokens: int, question: int | None,
    ) -> Request:
        vocab_size = self._engine.plan.model.vocab_size
        ids = random_ids(length, vocab_size, seed)
        if question is not None:
            ids = ids[:-QUESTION_LEN] + random_ids(QUESTION_LEN, vocab_size, question)
        request = Request(
            request_id=name, prompt_ids=ids,
            params=SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=0.0),
            sparse=self._sparse and num_tokens == 1)
        hash_prompt(request, self.scheduler.config)
        return request

    def _note_step(self, step: InFlightStep, result: StepResult) -> None:
        total = 0
        for item in step.batch.slices:
            if item.cached_len >= item.prompt_len:
                continue
            begun, pieces = item.cached_len, item.pieces
            if pieces is not None:
                begun += item.query_len * pieces.first // pieces.total
            self.num_prefilled[item.request_id] += item.done_len - begun
            total += item.done_len - begun
        self._step = step.batch.expected_s, result.elapsed_s, total

    def _note_pause(self, pause_s: float, at_s: float) -> None:
        if pause_s > self.longest_pause["pause_s"]:
            expected_s, step_s, prefilled = self._step
            self.longest_pause = {
                "pause_s": rounded(pause_s, 3), "at_s": rounded(at_s, 3),
                "expected_s": rounded(expected_s, 3), "step_s": rounded(step_s, 3),
                "prefilled": prefilled}
