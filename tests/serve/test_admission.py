"""The gate's arithmetic."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from longspan.engine.control.latency import Costs, Forecast
from longspan.engine.front.client import EngineStatus
from longspan.serve.admission import Gate
from longspan.serve.config import ServeConfig
from longspan.serve.errors import ApiError

STATUS = EngineStatus(
    state="ready", max_model_len=1000,
    latency=Forecast(costs=Costs(dense=(0.0, 0.01, 0.0)), block_size=1, prefill_chunk_len=100))


def gate(**options) -> Gate:
    return Gate(ServeConfig(**options), lambda: STATUS)


def test_limits_follow_the_engine():
    assert gate().max_queued_tokens == 4000
    assert gate().max_body_bytes == 1 << 20
    assert gate(max_body_bytes=5).max_buffered_bytes == 20


def test_bytes_count_until_tokens_are_known():
    here = gate(max_queued_tokens=1000)
    with here.enter(2000) as ticket:
        assert here.num_queued_tokens == 500
        here.resize(ticket, [700, 100])
        assert here.num_queued_tokens == 800
        ticket.parts[0].done = 700
        assert here.num_queued_tokens == 100 and here.num_queued == 1
        ticket.parts[1].done = 100
        assert here.num_queued == 0 and here.num_open == 1
    assert here.num_open == 0


def test_retry_after_is_the_excess_of_the_backlog():
    here = gate(max_queued_tokens=1000)
    with here.enter(0) as ticket:
        here.resize(ticket, [900])
        with pytest.raises(ApiError) as caught, here.enter(4 * 400):
            pass
    assert caught.value.status == 429
    assert caught.value.headers["Retry-After"] == "3"  # 300 of 900 tokens, 9 s
    with here.enter(10**9):
        pass  # larger than the budget, but nobody else is there


def test_a_body_that_announced_too_little_is_refused_once_its_length_is_known():
    """As a chunked one, which announces nothing."""
    here = gate(max_queued_tokens=1000)
    with here.enter(0) as first, here.enter(0) as second, here.enter(0) as third:
        here.resize(first, [5000])  # larger than the budget, but nobody else waits
        with pytest.raises(ApiError) as caught:
            here.resize(second, [100])
        assert caught.value.status == 429 and here.num_queued_tokens == 5000
        assert caught.value.headers["Retry-After"] == "41"  # 4100 of 5000 tokens, 50 s
        first.parts[0].done = 4500
        here.resize(third, [300, 200])
        assert here.num_queued_tokens == 1000
        here.resize(third, [300, 200])  # its own tokens are not in its way


def test_requests_of_unknown_length_are_counted_once_it_is_known():
    here = gate(max_queued_requests=1)
    with here.enter(0) as first, here.enter(0) as second:
        here.resize(first, [1])
        with pytest.raises(ApiError, match="1 requests wait"):
            here.resize(second, [1])


def test_predictions_share_the_machine():
    here = gate()
    with here.enter(0) as long:
        here.resize(long, [800])
        assert here.predict_new_s(100) == pytest.approx(2.0)  # its own and as much of the other
        with here.enter(0) as short:
            here.resize(short, [100])
            assert here.predict_ttft_s(short) == pytest.approx(2.0, abs=0.1)
            assert here.predict_ttft_s(long) == pytest.approx(9.0, abs=0.1)
            assert here.backlog_s() == pytest.approx(9.0)


def test_nothing_is_predicted_before_anything_is_measured():
    status = replace(STATUS, latency=None)
    here = Gate(ServeConfig(), lambda: status)
    with here.enter(400) as ticket:
        assert here.predict_ttft_s(ticket) is None and here.predict_new_s(5) is None
        assert here.backlog_s() > 0
        status = STATUS
        assert here.predict_new_s(100) == pytest.approx(2.0)
        assert here.predict_ttft_s(ticket) is not None


def test_idle():
    async def wait() -> None:
        here = gate()
        await here.wait_idle()
        with here.enter(0), pytest.raises(TimeoutError):
            await asyncio.wait_for(here.wait_idle(), 0.01)
        await here.wait_idle()

    asyncio.run(wait())
