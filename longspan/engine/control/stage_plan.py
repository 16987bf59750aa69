"""Plans a pipeline: which layers each stage has, how a dense prompt is cut. No torch.

A prompt's chunks pass through the stages one behind another, so stage p computes chunk i when the
chunk before it is done there and stage p - 1 has handed its activations on. The time to the first
token is the time to fill the pipeline, to compute all chunks on the slowest stage, and to drain.
Equal times waste least: of the stages, by their layers (`split_by_time`), and of the chunks, by
their lengths (`plan_dense`): a dense chunk costs ``c + b x + a x (2 L + x)`` after L tokens, so the
chunks become shorter as the history grows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, sqrt

from longspan.engine.control.latency import Terms

NUM_TRIALS = 28
"""Chunk times that `plan_dense` compares."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Flow:
    """How chunks pass through stages."""

    begun_s: tuple[tuple[float, ...], ...]
    """When each stage begins each chunk: [chunk][stage]."""
    done_s: tuple[tuple[float, ...], ...]
    """When it has finished it."""

    @property
    def total_s(self) -> float:
        """Time from the first chunk's begin to the last one's end."""
        return self.done_s[-1][-1]

    def busy_s(self, stage: int) -> float:
        """Return the time for which a stage computes."""
        return sum(done[stage] - begun[stage]
                   for begun, done in zip(self.begun_s, self.done_s, strict=True))

    def idle(self, stage: int) -> float:
        """Return the share of the whole time for which a stage has nothing to compute."""
        return 1 - self.busy_s(stage) / self.total_s


def flow(
    times_s: Sequence[Sequence[float]], sends_s: Sequence[float] = (), max_in_flight: int = 0,
) -> Flow:
    """Let chunks pass through the stages, in order, activations sent while the next chunk is
    computed.

    Args:
        times_s: [chunk][stage], seconds.
        sends_s: for each chunk, from one stage to the next; default: no time.
        max_in_flight: chunks that have left the host and are not done; 0: no limit.
    """
    num_stages = len(times_s[0])
    begun, done = [], list[tuple[float, ...]]()
    free = [0.0] * num_stages
    for index, row in enumerate(times_s):
        send_s = sends_s[index] if sends_s else 0.0
        ready = 0.0
        if max_in_flight and index >= max_in_flight:
            ready = done[index - max_in_flight][-1]
        begins, ends = [], []
        for stage, time_s in enumerate(row):
            begin = max(ready, free[stage])
            free[stage] = begin + time_s
            begins.append(begin)
            ends.append(free[stage])
            ready = free[stage] + send_s
        begun.append(tuple(begins))
        done.append(tuple(ends))
    return Flow(begun_s=tuple(begun), done_s=tuple(done))


def split_by_time(layer_s: Sequence[float], num_stages: int) -> list[range]:
    """Split layers into consecutive stages so that the slowest one is as fast as can be; of the
    splits that are, the one whose earlier stages are fuller.

    Args:
        layer_s: time of each layer; the last layer of a prefill is nearly free, since it computes
            keys and values alone.
    """
    count = len(layer_s)
    assert 1 <= num_stages <= count
    before = [0.0]
    for time_s in layer_s:
        before.append(before[-1] + time_s)
    best = [[inf] * (count + 1) for _ in range(num_stages + 1)]
    cut = [[0] * (count + 1) for _ in range(num_stages + 1)]
    best[0][0] = 0.0
    for stages in range(1, num_stages + 1):
        for stop in range(stages, count - (num_stages - stages) + 1):
            for start in range(stages - 1, stop):
                slowest = max(best[stages - 1][start], before[stop] - before[start])
                if slowest <= best[stages][stop]:
                    best[stages][stop], cut[stages][stop] = slowest, start
    stops = [count]
    for stages in range(num_stages, 0, -1):
        stops.append(cut[stages][stops[-1]])
    return [range(start, stop) for stop, start in zip(stops, stops[1:], strict=False)][::-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseCosts:
    """What decides how a dense prompt is cut."""

    terms: Terms
    """(c, b, a) of the whole model, seconds; c is what each stage pays for each chunk."""
    stage_shares: tuple[float, ...]
    """Share of each stage in the work; their sum is 1."""
    unit_len: int
    """Chunks end at multiples of this, tokens."""
    shortest: int
    """Least length of a chunk: shorter ones would take as long."""
    longest: int
    """Most tokens that a step has room for."""

    def stage_times(self, start: int, stop: int) -> list[float]:
        """Predict a chunk's time on each stage, seconds."""
        fixed, token, pair = self.terms
        work_s = token * (stop - start) + pair * (stop - start) * (stop + start)
        return [fixed + share * work_s for share in self.stage_shares]


def plan_dense(costs: DenseCosts, start: int, stop: int) -> tuple[int, ...]:
    """Cut a dense prompt into chunks of equal time, as many as are best for its length.

    Returns the chunks' ends, the last of them ``stop``.
    """
    assert 0 <= start < stop
    _, token, pair = costs.terms
    total_s = token * (stop - start) + pair * (stop - start) * (stop + start)
    most = max(1, -(-(stop - start) // costs.shortest))
    counts = sorted({max(1, round(most ** (trial / (NUM_TRIALS - 1))))
                     for trial in range(NUM_TRIALS)})
    plans = [_equal_cuts(costs, start, stop, total_s / count) for count in counts]
    return min(plans, key=lambda ends: _total_s(costs, start, ends))


def _equal_cuts(costs: DenseCosts, start: int, stop: int, work_s: float) -> tuple[int, ...]:
    """Cut into chunks whose work takes ``work_s``, within the lengths that are possible."""
    _, token, pair = costs.terms
    ends, unit = list[int](), costs.unit_len
    while start < stop:
        slope = token + 2 * pair * start
        if pair * work_s > 1e-9 * slope * slope:
            length = (sqrt(slope * slope + 4 * pair * work_s) - slope) / (2 * pair)
        else:  # where steps have been seen to cost the same whatever is in them, both are 0
            length = work_s / slope if slope else costs.longest
        wanted = start + min(max(length, costs.shortest), costs.longest)
        end = round(wanted / unit) * unit
        end = min(end, (start + costs.longest) // unit * unit)
        if end <= start:
            end = (start // unit + 1) * unit
        start = stop if stop - end < costs.shortest / 2 and stop - start <= costs.longest else (
            min(end, stop))
        ends.append(start)
    return tuple(ends)


def _total_s(costs: DenseCosts, start: int, ends: Sequence[int]) -> float:
    """Predict the time that all chunks need, activations sent in no time."""
    begins = (start, *ends[:-1])
    return flow([costs.stage_times(*cut) for cut in zip(begins, ends, strict=True)]).total_s


def equal_split(num_layers: int, num_stages: int) -> list[range]:
    """Split into nearly equal stages where times are not known: the last one, whose last layer is
    nearly free in prefill, and those before it have one layer more."""
    return split_by_time([1.0] * (num_layers - 1) + [0.02], num_stages)


def stage_shares(layer_s: Callable[[int], float], stages: Sequence[range]) -> tuple[float, ...]:
    """Return the share of each stage in the time of all layers."""
    times = [sum(map(layer_s, stage)) for stage in stages]
    return tuple(time_s / sum(times) for time_s in times)
