"""The whole engine on one thread of the caller's process: for tests, whose doubles cannot travel
between processes. No torch at import.

Commands come in by `EngineThread.send`, and messages go out by the ``send`` that it was made with.
They are the messages that travel between processes, only not encoded.
"""

from __future__ import annotations

import threading
import time
from queue import Empty, SimpleQueue

from longspan.config import EngineConfig
from longspan.engine.control.scheduler import InFlightStep, Scheduler
from longspan.engine.control.transport import LocalTransport
from longspan.engine.processes.backend import Loader, Send, Start
from longspan.engine.processes.serving_loop import ServingLoop
from longspan.engine.processes.wire import (
    Begin,
    Close,
    Command,
    Died,
    Loaded,
    Prepare,
    Prepared,
    Stepped,
    computed_slices,
    last_words,
)
from longspan.engine.step import StepResult


def on_a_thread(load: Loader) -> Start:
    """Start engines on threads of this process."""
    return lambda config, send: EngineThread(config, load, send)


class EngineThread:
    """One engine on its thread, from loading to its end: the last message says why it ended."""

    def __init__(self, config: EngineConfig, load: Loader, send: Send) -> None:
        self._inbox: SimpleQueue[Begin | Command] = SimpleQueue()
        self._config, self._load, self._send = config, load, send
        # A daemon, so that a program that does not stop it ends too.
        self._thread = threading.Thread(target=self._run, name="longspan-engine", daemon=True)
        self._thread.start()

    def send(self, message: Begin | Command | Prepare) -> None:
        """Hand a command over. Nothing is prepared here: it is compiled in its request's step."""
        if isinstance(message, Prepare):
            self._send(Prepared(message.constraint))
        else:
            self._inbox.put(message)

    def stop(self) -> None:
        """End after the step that is being computed."""
        self._inbox.put(Close())

    def join(self, timeout_s: float) -> None:
        """Wait for the thread's end."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            scheduler, engine = self._load(self._config, self._send)
            try:
                self._send(Loaded())
                ServingLoop(Scheduler(scheduler), LocalTransport(engine), self._take, self._send,
                            on_result=self._tell_result).run()
            finally:
                engine.close()
            self._send(Died("it was shut down"))
        except BaseException as error:
            self._send(last_words(error))

    def _take(self, must_wait: bool) -> Command | None:
        while True:
            try:
                message = self._inbox.get(block=must_wait)
            except Empty:
                return None
            if not isinstance(message, Begin):  # whose configuration came from the loader
                return message

    def _tell_result(self, step: InFlightStep, result: StepResult) -> None:
        """Tell the front end what a step brought, as a runner process does."""
        self._send(Stepped(
            slices=computed_slices(step.batch), result=result, started_s=step.submitted_s,
            finished_s=time.monotonic()))
