"""Time on the device: CUDA events, or the clock on CPUs; medians with their range."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from longspan.attention.observer import AttentionObserver
from longspan.ops import add_routed_mlp, fp8_linear, int4_linear

Run = Callable[[], object]
FLUSH_BYTES = 256 * 1024**2
"""Written before a timed call that must not find its data in the L2 cache: several caches full."""
LINEAR_FUNCTIONS = (
    F.linear, torch.Tensor.addmm_, add_routed_mlp, fp8_linear, int4_linear,
    torch.ops.aten._weight_int4pack_mm_for_cpu,
    torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32)
"""What products with weights are made of (`longspan.model.linear.Linear`), routed experts too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Repeated runs of one thing, ms."""

    median_ms: float
    low_ms: float
    """Fastest run."""
    high_ms: float
    """Slowest run."""
    n: int

    def share(self, count: int) -> Timing:
        """Return the time of one of ``count`` equal parts."""
        return Timing(median_ms=self.median_ms / count, low_ms=self.low_ms / count,
                      high_ms=self.high_ms / count, n=self.n)

    def fields(self) -> dict[str, Any]:
        """Return it as result rows hold it."""
        return {"time_ms": round(self.median_ms, 5), "low_ms": round(self.low_ms, 5),
                "high_ms": round(self.high_ms, 5), "n": self.n}


@dataclass(frozen=True, kw_only=True, slots=True)
class Repeats:
    """How often something is run."""

    max_s: float = 1.5
    """Repeats end with the run after which this would be exceeded; there is always one."""
    most: int = 20


def measure(
    run: Run, device: str, repeats: Repeats | None = None, *, flush_cache: bool = False,
) -> Timing:
    """Time runs after one warm-up."""
    return measure_together([run], device, repeats, flush_cache=flush_cache)[0]


def measure_together(
    runs: Sequence[Run], device: str, repeats: Repeats | None = None, *, flush_cache: bool = False,
) -> list[Timing]:
    """Run several things in turn, so that drift of clocks and power meets all of them alike.

    How many runs there are follows from the first ones that are timed: those before them may have
    compiled kernels for seconds.
    """
    repeats = repeats or Repeats()
    for run in runs:
        run()
    synchronize(device)
    flush = _flush(device) if flush_cache else None
    found: list[list[Callable[[], float]]] = [[] for _ in runs]

    def take_turns() -> None:
        for index, run in enumerate(runs):
            if flush is not None:
                flush()
            found[index].append(_time(device, run))
    take_turns()
    first_ms = sum(reads[0]() for reads in found)
    for _ in range(1, min(repeats.most, int(1000 * repeats.max_s / max(first_ms, 1e-3)))):
        take_turns()
    return [_timing([read() for read in reads]) for reads in found]


def recorded(work: Run, device: str) -> Run:
    """On a GPU what a decode step does: replay a graph of the work."""
    if not device.startswith("cuda"):
        return work
    work()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def rounded(value: float | None, digits: int = 3) -> float | None:
    """Round to some significant digits, so that files stay readable."""
    return None if value is None else float(f"{value:.{digits}g}")


def rate(amount: float, timing: Timing) -> float:
    """Return the amount in units of 1e12 a second."""
    return float(f"{amount / timing.median_ms / 1e9:.4g}")


class Regions(AttentionObserver):
    """Device time by name: the parts of attention, where it observes, and what `region` is put
    around. Reading waits for the device; recording does not. Regions inside a region do not count.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._reads: defaultdict[str, list[Callable[[], float]]] = defaultdict(list)
        self._is_inside = False

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        """Add the time until the context's end to ``name``."""
        if self._is_inside:
            yield
            return
        self._is_inside = True
        try:
            stop = _start(self._device)
            yield
            self._reads[name].append(stop())
        finally:
            self._is_inside = False

    def totals_ms(self) -> dict[str, float]:
        """Sum by name."""
        return {name: sum(read() for read in reads) for name, reads in self._reads.items()}


@contextmanager
def noting_compilations(device: str) -> Iterator[list[str]]:
    """Note the Triton kernels that are compiled meanwhile, or read from the compiler's cache: what
    is timed should wait for none."""
    names: list[str] = []
    if not device.startswith("cuda"):
        yield names
        return
    from triton.runtime.jit import JITFunction

    compile_kernel = JITFunction._do_compile

    def noted(kernel: Any, *args: Any, **options: Any) -> Any:
        names.append(kernel.fn.__name__)
        return compile_kernel(kernel, *args, **options)

    JITFunction._do_compile = noted
    try:
        yield names
    finally:
        JITFunction._do_compile = compile_kernel


class LinearRegions(TorchFunctionMode):
    """While entered, all products with weights are a region of their own."""

    def __init__(self, regions: Regions, name: str) -> None:
        super().__init__()
        self._regions, self._name = regions, name

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a torch function, a product with weights inside the region."""
        if func not in LINEAR_FUNCTIONS:
            return func(*args, **(kwargs or {}))
        with self._regions.region(self._name):
            return func(*args, **(kwargs or {}))


def _time(device: str, run: Run) -> Callable[[], float]:
    """Run now; the result reads the milliseconds, after the device has finished."""
    stop = _start(device)
    run()
    return stop()


def _start(device: str) -> Callable[[], Callable[[], float]]:
    """Start a stopwatch; calling the result stops it and gives what reads its milliseconds."""
    if not device.startswith("cuda"):
        started = time.perf_counter()

        def stop_clock() -> Callable[[], float]:
            passed_ms = 1000 * (time.perf_counter() - started)
            return lambda: passed_ms
        return stop_clock
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()

    def stop_events() -> Callable[[], float]:
        last.record()

        def read() -> float:
            last.synchronize()
            return float(first.elapsed_time(last))
        return read
    return stop_events


def _flush(device: str) -> Run | None:
    if not device.startswith("cuda"):
        return None
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device).zero_


def _timing(times_ms: Sequence[float]) -> Timing:
    return Timing(median_ms=statistics.median(times_ms), low_ms=min(times_ms),
                  high_ms=max(times_ms), n=len(times_ms))
