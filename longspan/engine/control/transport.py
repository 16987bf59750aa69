"""What carries steps to a runner and back, and the one for a runner in this process. No torch."""

from __future__ import annotations

from collections import deque
from typing import Protocol

from longspan.engine.step import ScheduledBatch, StepResult


class Transport(Protocol):
    """Carries steps to a runner and back, first in, first out."""

    @property
    def max_in_flight(self) -> int:
        """Most steps that are submitted and not yet collected; `Loop` allows more short ones."""

    def submit(self, batch: ScheduledBatch) -> None:
        """Hand over a step; returns at once."""

    def collect(self, timeout_s: float | None = None) -> StepResult | None:
        """Wait up to ``timeout_s`` for the oldest result. None when the time is over, or when a
        command came first."""

    def discard(self) -> None:
        """Drop the steps in flight, after an interrupt. A result that comes nevertheless is of an
        earlier epoch."""


class PendingStep(Protocol):
    """A step that was handed to the device."""

    def wait_for(self, timeout_s: float) -> bool:
        """Wait up to ``timeout_s``; True if the step is computed."""

    def wait(self) -> StepResult:
        """Wait for the result, and return it."""


class Launcher(Protocol):
    """What hands steps to a device: `longspan.engine.device.runner.Runner`, or a test double."""

    def launch(self, batch: ScheduledBatch) -> PendingStep:
        """Hand over the step; may return before it is computed."""


class LocalTransport:
    """Launches each step in this thread, as it is submitted.

    Args:
        max_in_flight: 2 for a GPU, where a launch returns at once and the next step is there when
            the last one ends; 1 for a CPU, where the launch computes the step.
    """

    def __init__(self, launcher: Launcher, max_in_flight: int = 1) -> None:
        self.max_in_flight = max_in_flight
        self._launcher = launcher
        self._launched: deque[PendingStep] = deque()

    def submit(self, batch: ScheduledBatch) -> None:
        """Launch the step."""
        self._launched.append(self._launcher.launch(batch))

    def collect(self, timeout_s: float | None = None) -> StepResult | None:
        """Wait for the oldest step."""
        if timeout_s is not None and not self._launched[0].wait_for(timeout_s):
            return None
        return self._launched.popleft().wait()

    def discard(self) -> None:
        """Forget results. Launched steps are still computed, before any that is launched later."""
        self._launched.clear()
