"""Prometheus metrics of one server, in a registry of its own, and the event loop's lag."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from longspan.engine.front.client import EngineStatus
from longspan.serve.admission import Gate
from longspan.serve.generation import Usage

LAG_PERIOD_S = 0.05
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
SHORT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
RATIOS = (0.25, 0.5, 0.8, 0.9, 0.95, 1.05, 1.1, 1.25, 2, 4)
RECALLS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 1)
STATES = ("loading", "ready", "draining", "dead")


class Metrics:
    """Counters that requests add to, gauges that are read when somebody looks."""

    def __init__(self, gate: Gate, status: Callable[[], EngineStatus]) -> None:
        self._registry = CollectorRegistry()
        self._gate, self._status = gate, status
        self._requests = self._counter("requests", "HTTP requests answered.", "route", "status")
        self._gone = self._counter("disconnects", "Requests whose client hung up.")
        self._prompt = self._counter("prompt_tokens", "Prompt tokens, cached ones included.")
        self._cached = self._counter("cached_tokens", "Prompt tokens from the prefix cache.")
        self._loaded = self._counter(
            "loaded_tokens", "Cached prompt tokens that were not on the device.", "place")
        self._load = self._histogram(
            "prefix_load_seconds", "Time until a prefix was back on the device.", SHORT_SECONDS)
        self._output = self._counter("completion_tokens", "Tokens sampled.")
        self._ttft = self._histogram("ttft_seconds", "Arrival to first token.", SECONDS)
        self._tpot = self._histogram(
            "tpot_seconds", "Mean time of a token after the first.", SHORT_SECONDS)
        self._ratio = self._histogram(
            "ttft_prediction_ratio", "Predicted over actual time to first token.", RATIOS)
        self._recall = Histogram(
            "longspan_attention_recall", "Attention mass that sparse prefill kept, by request.",
            ["rows"], buckets=RECALLS, registry=self._registry)
        self._lag = self._histogram(
            "event_loop_lag_seconds", "Delay of a timer in the front end.", SHORT_SECONDS)
        self._add_gauges()

    def answered(self, route: str, status: int) -> None:
        """Count a response whose headers went out."""
        self._requests.labels(route, str(status)).inc()

    def gone(self) -> None:
        """Count a client that hung up before its answer was complete."""
        self._gone.inc()

    def finished(self, usage: Usage) -> None:
        """Observe a generation that ended, in whatever way."""
        self._prompt.inc(usage.prompt_tokens)
        self._cached.inc(usage.cached_tokens)
        for origin in usage.origins:
            self._loaded.labels("host").inc(origin.num_host_tokens)
            self._loaded.labels("disk").inc(origin.num_disk_tokens)
            self._load.observe(origin.load_s)
        self._output.inc(usage.completion_tokens)
        if usage.ttft_s is not None:
            self._ttft.observe(usage.ttft_s)
            if usage.predicted_ttft_s and usage.ttft_s > 0:
                self._ratio.observe(usage.predicted_ttft_s / usage.ttft_s)
        if usage.recall is not None:
            self._recall.labels("typical").observe(usage.recall.typical)
            if usage.recall.scouts is not None:
                self._recall.labels("scouts").observe(usage.recall.scouts)
        if usage.decode_s is not None:
            self._tpot.observe(usage.decode_s / (usage.completion_tokens - 1))

    async def watch_loop(self) -> None:
        """Measure the event loop's lag until cancelled."""
        while True:
            start_s = time.monotonic()
            await asyncio.sleep(LAG_PERIOD_S)
            self._lag.observe(max(0.0, time.monotonic() - start_s - LAG_PERIOD_S))

    def render(self) -> bytes:
        """Return the text that Prometheus reads."""
        return generate_latest(self._registry)

    def _add_gauges(self) -> None:
        gate, status = self._gate, self._status
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "queued_requests": ("Accepted, prompt not yet computed.", lambda: gate.num_queued),
            "queued_tokens": (
                "Prompt tokens accepted and not yet computed.", lambda: gate.num_queued_tokens),
            "queue_limit_tokens": ("Above it, 429.", lambda: gate.max_queued_tokens),
            "backlog_seconds": ("Predicted time to compute the queue.", gate.backlog_s),
            "open_requests": ("Accepted, not answered in full.", lambda: gate.num_open),
            "engine_waiting_requests": ("Without KV blocks.", lambda: status().num_waiting),
            "engine_running_requests": ("In prefill or decode.", lambda: status().num_running),
            "kv_capacity_tokens": ("KV cache size.", lambda: status().capacity_tokens),
            "kv_used_tokens": ("KV in use by requests.", lambda: status().num_used_tokens),
            "kv_unwritten_tokens": (
                "KV on its way to disk.", lambda: status().num_unwritten_tokens)}
        for name, (text, read) in gauges.items():
            Gauge(f"longspan_{name}", text, registry=self._registry).set_function(read)
        state = Gauge("longspan_state", "1 for the present state.", ["state"],
                      registry=self._registry)
        for name in STATES:
            state.labels(name).set_function(partial(self._is_state, name))

    def _is_state(self, name: str) -> float:
        return float(self._gate.state == name)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"longspan_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"longspan_{name}", text, buckets=buckets, registry=self._registry)
