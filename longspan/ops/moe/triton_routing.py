"""Which experts each token takes, and their tokens side by side (Triton). The host reads nothing.

Shapes: T tokens, E experts, k chosen ones, R = T k *routes*, numbered token * k + choice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_EXPERTS = 1_024
COUNTED_ROUTES = 4_096
"""Up to this many routes are put in order by counting, in one launch; more in three; where there
are more experts, by a sort."""
TALLIED_EXPERTS, TALLIED_ROUTES = 255, 128
"""The most experts of which a program tallies its routes, and those routes."""
ROUTE_ROWS, COUNT_ROWS = 4, 16


class Groups(NamedTuple):
    """Routes in the order of their experts."""

    order: Tensor
    """[R] int32: routes of expert 0, of expert 1, ..., each in the order of the tokens."""
    ends: Tensor
    """[E] int32: where each expert's routes end in ``order``."""


def route(logits: Tensor, num_chosen: int, is_normed: bool) -> tuple[Tensor, Tensor]:
    """See `reference.route`; experts are int32. Of equal ones the first is chosen."""
    num_tokens, num_experts = logits.shape
    assert logits.dtype == torch.float32 and logits.stride(1) == 1
    weights = torch.empty(num_tokens, num_chosen, dtype=torch.float32, device=logits.device)
    experts = torch.empty(num_tokens, num_chosen, dtype=torch.int32, device=logits.device)
    if num_tokens:
        _route[(triton.cdiv(num_tokens, ROUTE_ROWS),)](
            logits, weights, experts, num_tokens, num_experts, logits.stride(0),
            CHOSEN=num_chosen, IS_NORMED=is_normed, ROWS=ROUTE_ROWS,
            WIDTH=triton.next_power_of_2(num_experts), num_warps=4)
    return weights, experts


def group(experts: Tensor, num_experts: int) -> Groups:
    """Put routes in the order of their experts. experts: [T, k]."""
    flat = experts.reshape(-1).to(torch.int32)
    num_routes = flat.shape[0]
    if num_routes > COUNTED_ROUTES and num_experts <= TALLIED_EXPERTS:
        return _group_many(flat, num_experts)
    if num_routes > COUNTED_ROUTES:
        ordered, order = flat.sort(stable=True)
        numbers = torch.arange(num_experts, dtype=flat.dtype, device=flat.device)
        ends = torch.searchsorted(ordered, numbers, right=True, out_int32=True)
        return Groups(order.to(torch.int32), ends)
    order = torch.empty(num_routes, dtype=torch.int32, device=flat.device)
    ends = torch.empty(num_experts, dtype=torch.int32, device=flat.device)
    programs = triton.cdiv(num_routes, COUNT_ROWS)
    _count[(programs + triton.cdiv(num_experts, COUNT_ROWS),)](
        flat, order, ends, num_routes, num_experts, programs, ROWS=COUNT_ROWS,
        TILE=min(512, triton.next_power_of_2(num_routes)), num_warps=4)
    return Groups(order, ends)


def _group_many(flat: Tensor, num_experts: int) -> Groups:
    """Tally parts of the routes, add tallies up, put each part's routes behind those before."""
    num_routes, width = flat.shape[0], triton.next_power_of_2(num_experts + 1)
    programs = triton.cdiv(num_routes, TALLIED_ROUTES)
    tallies = torch.empty((num_experts + 1) * programs, dtype=torch.int32, device=flat.device)
    order = torch.empty(num_routes, dtype=torch.int32, device=flat.device)
    ends = torch.empty(num_experts, dtype=torch.int32, device=flat.device)
    sizes = {"ROUTES": TALLIED_ROUTES, "EXPERTS": width, "num_warps": 4}
    _tally[(programs,)](flat, tallies, num_routes, num_experts, programs, **sizes)
    totals = tallies.cumsum(0, dtype=torch.int32)
    _put[(programs,)](flat, totals, order, ends, num_routes, num_experts, programs, **sizes)
    return Groups(order, ends)


@triton.jit
def _part(flat, num_routes, num_experts, ROUTES: tl.constexpr):
    """Return a program's routes and their experts. Those past the end count as elsewhere: behind
    all that are, so they move nobody."""
    routes = tl.program_id(0) * ROUTES + tl.arange(0, ROUTES)
    own = tl.load(flat + routes, mask=routes < num_routes, other=num_experts)
    return routes, tl.minimum(own, num_experts)


@triton.jit(do_not_specialize=["num_routes", "programs"])
def _tally(
    flat, tallies, num_routes, num_experts, programs, ROUTES: tl.constexpr, EXPERTS: tl.constexpr,
):
    """Count a program's routes of each expert, and those elsewhere. tallies: [E + 1, programs]."""
    _, own = _part(flat, num_routes, num_experts, ROUTES)
    numbers = tl.arange(0, EXPERTS)
    tl.store(tallies + numbers * programs + tl.program_id(0), tl.histogram(own, EXPERTS),
             mask=numbers <= num_experts)


@triton.jit(do_not_specialize=["num_routes", "programs"])
def _put(
    flat, totals, order, ends, num_routes, num_experts, programs, ROUTES: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Put a program's routes behind those of lesser experts and of programs before."""
    routes, own = _part(flat, num_routes, num_experts, ROUTES)
    is_equal = own[None, :] == own[:, None]
    earlier = tl.sum((is_equal & (routes[None, :] < routes[:, None])).to(tl.int32), 1)
    place = own * programs + tl.program_id(0)
    start = tl.load(totals + place - 1, mask=place > 0, other=0)
    tl.store(order + start + earlier, routes, mask=routes < num_routes)
    if tl.program_id(0) == 0:
        numbers = tl.arange(0, EXPERTS)
        mask = numbers < num_experts
        stops = tl.load(totals + (numbers + 1) * programs - 1, mask=mask, other=0)
        tl.store(ends + numbers, stops, mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _route(
    logits, weights, experts, num_tokens, num_experts, row_stride,
    CHOSEN: tl.constexpr, IS_NORMED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    """Choose the experts of ROWS tokens, one after the other."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    places = rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    mask = (rows < num_tokens)[:, None] & (columns < num_experts)[None, :]
    left = tl.load(logits + places, mask=mask, other=float("-inf"))
    left = tl.where((rows < num_tokens)[:, None], left, 0.0)  # rows past the end: no NaN
    powers = tl.exp(left - tl.max(left, 1)[:, None])
    total = tl.sum(powers, 1)
    chosen_total = tl.zeros([ROWS], tl.float32)
    places = rows * CHOSEN
    for choice in tl.static_range(CHOSEN):
        best = tl.minimum(tl.argmax(left, 1), num_experts - 1)  # NaN everywhere: any
        is_best = columns[None, :] == best[:, None]
        weight = tl.sum(tl.where(is_best, powers, 0.0), 1) / total
        chosen_total += weight
        left = tl.where(is_best, float("-inf"), left)
        tl.store(experts + places + choice, best.to(tl.int32), mask=rows < num_tokens)
        tl.store(weights + places + choice, weight, mask=rows < num_tokens)
    if IS_NORMED:
        for choice in tl.static_range(CHOSEN):
            weight = tl.load(weights + places + choice, mask=rows < num_tokens, other=0.0)
            tl.store(weights + places + choice, weight / chosen_total, mask=rows < num_tokens)


@triton.jit(do_not_specialize=["num_routes", "num_route_programs"])
def _count(
    flat, order, ends, num_routes, num_experts, num_route_programs,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):
    """Find the places of ROWS routes, or the ends of ROWS experts, by comparing with all routes."""
    program = tl.program_id(0)
    is_ends = program >= num_route_programs
    rows = tl.where(is_ends, program - num_route_programs, program) * ROWS + tl.arange(0, ROWS)
    limit = tl.where(is_ends, num_experts, num_routes)
    own = tl.load(flat + rows, mask=(rows < num_routes) & (program < num_route_programs), other=0)
    own = tl.where(is_ends, rows, own)
    before = tl.where(is_ends, num_routes, rows)  # equal ones count if they come earlier
    found = tl.zeros([ROWS], tl.int32)
    for first in range(0, num_routes, TILE):
        others = first + tl.arange(0, TILE)
        other = tl.load(flat + others, mask=others < num_routes, other=2147483647)
        is_less = other[None, :] < own[:, None]
        is_equal = (other[None, :] == own[:, None]) & (others[None, :] < before[:, None])
        found += tl.sum((is_less | is_equal).to(tl.int32), 1)
    if is_ends:
        tl.store(ends + rows, found, mask=rows < limit)
    else:
        tl.store(order + found, rows, mask=rows < limit)
