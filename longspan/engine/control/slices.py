"""Planned slices as they travel, and what is noted and told of them. No torch."""

from __future__ import annotations

from longspan.engine.control.planner import PlannedSlice, scored_tokens
from longspan.engine.request import Request
from longspan.engine.step import (
    RowLogprobs,
    RowSampling,
    SamplingExtras,
    ScheduledSlice,
    Update,
)


def scheduled_slice(planned: PlannedSlice) -> ScheduledSlice:
    """Make the slice that is sent."""
    request, pieces, params = planned.request, planned.pieces, planned.request.params
    start, stop = request.scheduled_len, request.scheduled_len + planned.query_len
    prompt_len = request.prompt_len
    is_last = stop >= prompt_len and (pieces is None or pieces.is_last)
    sampling = RowSampling(
        temperature=params.temperature, top_k=params.top_k, top_p=params.top_p,
        min_p=params.min_p, seed=request.seed) if is_last else None
    return ScheduledSlice(
        request_id=request.request_id, slot=request.slot, token_ids=request.tokens(start, stop),
        cached_len=start, prompt_len=prompt_len, block_ids=request.block_ids,
        sparse=request.sparse, sampling=sampling, pieces=pieces,
        origin=request.origin if start == request.num_cached_tokens else None,
        scored=scored_tokens(request, start, stop),
        extras=SamplingExtras.of(request) if is_last and start < prompt_len else None)


def note_scheduled(planned: PlannedSlice, repeats: int) -> None:
    """Move the request on, for the steps that are scheduled before this one's result is there."""
    request, pieces = planned.request, planned.pieces
    request.num_in_flight += 1
    if pieces is None or pieces.is_last:
        request.scheduled_len += repeats * planned.query_len
        request.num_pieces = 0
    else:
        request.num_pieces = pieces.stop


def make_update(
    request: Request, token: int | None, logprobs: RowLogprobs | None, computed_len: int,
    failure: str = "",
) -> Update:
    """Say what a slice, or an end without one, changed for a request."""
    return Update(
        request_id=request.request_id, computed_len=computed_len,
        num_cached_tokens=request.num_cached_tokens, token_id=token,
        finish_reason=request.finish_reason, logprobs=logprobs, failure=failure,
        origin=request.origin)
