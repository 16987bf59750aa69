"""What copies of KV take by themselves: real scheduler, real places, and a runner without a model.

Nothing is computed, so a million tokens take seconds: blocks hold random numbers, steps take
`STEP_S`, and some blocks of each prompt are compared when it has come back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from longspan.attention.cache import allocate_cache
from longspan.attention.sparsity import needs_means
from longspan.bench.engine.cache_driver import Driver
from longspan.bench.engine.engine import ShapeEngine
from longspan.bench.session import CheckFailed
from longspan.bench.timing import rounded, synchronize
from longspan.engine.control.transport import LocalTransport, Transport
from longspan.engine.device.block_mover import BlockMover
from longspan.engine.device.block_store import BlockStore
from longspan.engine.device.launched_step import NEWS_S
from longspan.engine.request import Request
from longspan.engine.setup.engine_plan import ResolvedEngine
from longspan.engine.step import ScheduledBatch, StepResult
from longspan.model import TORCH_DTYPES
from longspan.ops.types import PagedKV
from longspan.units import GIB

STEP_S = 6e-3
"""A decode step of the 7B shape on an H200."""
NUM_COMPARED = 64
"""Blocks of a prompt that are compared."""
NUM_ROUNDS = 20


class CopyRunner:
    """Copies blocks, and answers any step with tokens that mean nothing."""

    def __init__(self, plan: ResolvedEngine, device: str) -> None:
        model, dtype = plan.model, plan.config.dtype
        assert dtype is not None
        self.caches = [allocate_cache(
            num_blocks=plan.memory.num_blocks, block_size=plan.config.block_size,
            num_kv_heads=model.num_kv_heads, head_dim=model.head_dim, dtype=TORCH_DTYPES[dtype],
            device=device, means=needs_means(plan.plan)) for _ in range(model.num_layers)]
        self.store = BlockStore(self.caches, plan.tiers.num_slots)
        assert self.store.block_bytes == plan.tiers.block_bytes
        self.mover, self._device = BlockMover(self.store, None), device

    def transport(self) -> Transport:
        """For a loop in this process."""
        return LocalTransport(self, max_in_flight=2 if self._device.startswith("cuda") else 1)

    def launch(self, batch: ScheduledBatch) -> _CopyStep:
        """Begin the copies of a step."""
        after = None
        if self._device.startswith("cuda"):
            after = torch.cuda.Event()
            after.record()
        self.mover.start(batch.transfers, batch.seen, after)
        return _CopyStep(batch, self.mover)

    def shuffle(self, blocks: Sequence[int] | None = None) -> None:
        """Write other random numbers into some blocks, or all."""
        for cache in self.caches:
            for part in cache.by_block().values():
                rows = part.view(torch.uint8)
                if blocks is None:
                    rows.random_(0, 256)
                else:
                    ids = torch.tensor(blocks, device=rows.device)
                    rows[ids] = torch.empty_like(rows[ids]).random_(0, 256)

    def close(self) -> None:
        """Give the memory back."""
        self.mover.close()
        self.caches = list[PagedKV]()


class _CopyStep:
    def __init__(self, batch: ScheduledBatch, mover: BlockMover) -> None:
        self._batch, self._mover = batch, mover
        self._end_s = time.monotonic() + (STEP_S * batch.repeats if batch.slices else 0.0)

    def wait_for(self, timeout_s: float) -> bool:
        """Wait up to ``timeout_s``; True if the step is over."""
        time.sleep(max(0.0, min(timeout_s, self._end_s - time.monotonic())))
        return time.monotonic() >= self._end_s

    def wait(self) -> StepResult:
        """Wait for the end of the step."""
        time.sleep(max(0.0, self._end_s - time.monotonic()))
        batch = self._batch
        num_tokens = batch.repeats * sum(item.sampling is not None for item in batch.slices)
        return StepResult(
            step_id=batch.step_id, epoch=batch.epoch, repeats=batch.repeats,
            token_ids=(1,) * num_tokens,  # no time: prefill is predicted to take what it would
            transfers=self._mover.results(0.0 if batch.slices else NEWS_S))


def measure_copies(
    plan: ResolvedEngine, device: str, length: int, turns: int, *, sparse: bool,
) -> dict[str, Any]:
    """Save one prompt, load it, and let two take turns. Raises `CheckFailed` when a block comes
    back with other numbers."""
    runner = CopyRunner(plan, device)
    try:
        driver = Driver(ShapeEngine(plan, runner), sparse=sparse)  # type: ignore[arg-type]
        runner.shuffle()
        driver.decode()
        _, _, first = driver.prefill("document", length, 2)
        wanted = {2: _sample(driver, first, runner.caches)}
        row, request = _saved_and_loaded(driver, runner, length)
        _check(driver, request, runner.caches, wanted[2])
        _, _, second = driver.prefill("other document", length, 3)
        runner.shuffle(_known(driver, second.block_hashes))
        wanted[3] = _sample(driver, second, runner.caches)
        driver.watch()
        taken, num_cached = list[float](), list[int]()
        for turn in range(turns):
            for seed in (2, 3):
                ttft_s, _, request = driver.prefill(f"{seed} again {turn}", length, seed)
                taken.append(ttft_s)
                num_cached.append(request.num_cached_tokens)
                _check(driver, request, runner.caches, wanted[seed])
        row |= {"turns_s": [rounded(seconds, 4) for seconds in taken],
                "cached_tokens": num_cached, "turns_pause": driver.longest_pause}
        driver.end()
        synchronize(device)
        return {**row, **_parts(runner, device)}
    finally:
        runner.close()


def _saved_and_loaded(
    driver: Driver, runner: CopyRunner, length: int,
) -> tuple[dict[str, Any], Request]:
    config = driver.scheduler.config
    gib = config.tiers.block_bytes * (length // config.block_size) / GIB
    driver.watch()
    save_s, host_s = driver.evict(length), runner.mover.host_s
    save_pause = driver.longest_pause
    driver.watch()
    ttft_s, _, request = driver.prefill("again", length, 2)
    if request.origin is None:
        raise CheckFailed("nothing was loaded")
    load_s = request.origin.load_s
    return {"gib": rounded(gib, 4), "save_s": rounded(save_s, 4), "load_s": rounded(load_s, 4),
            "gib_per_s": rounded(gib / load_s, 4), "ttft_s": rounded(ttft_s, 4),
            "save_host_s": rounded(host_s, 3), "load_host_s": rounded(
                runner.mover.host_s - host_s, 3),
            "save_pause": save_pause, "pause": driver.longest_pause,
            "pause_s": driver.longest_pause_s}, request


def _sample(driver: Driver, request: Request, caches: Sequence[PagedKV]) -> list[Tensor]:
    """Clone some blocks of a prompt out of the cache that holds it, from its first one on."""
    hashes = request.block_hashes[:: max(1, len(request.block_hashes) // NUM_COMPARED)]
    ids = torch.tensor(_known(driver, hashes), device=caches[0].k.device)
    return [part.view(torch.uint8).index_select(0, ids) for cache in caches
            for part in cache.by_block().values()]


def _known(driver: Driver, hashes: Sequence[bytes]) -> list[int]:
    """Return the device's blocks with these contents, up to the first that has none."""
    found = list[int]()
    for value in hashes:
        block = driver.scheduler.pool.find(value)
        if block is None:
            break
        found.append(block)
    return found


def _check(
    driver: Driver, request: Request, caches: Sequence[PagedKV], wanted: Sequence[Tensor],
) -> None:
    """Compare what a prompt found in the cache; what is behind that was not computed."""
    step = max(1, len(request.block_hashes) // NUM_COMPARED)
    count = -(-(request.num_cached_tokens // driver.scheduler.config.block_size) // step)
    if not count:
        raise CheckFailed("nothing came back")
    for here, there in zip(_sample(driver, request, caches), wanted, strict=True):
        if not torch.equal(here[:count], there[:count]):
            raise CheckFailed("a block came back with other numbers")


def _parts(runner: CopyRunner, device: str) -> dict[str, Any]:
    """Time the parts of a copy alone: the link, the kernel, and a launch for each tensor."""
    if not device.startswith("cuda"):
        return {}
    from longspan.ops.block_rows import row_table, unpack_blocks

    store, slots = runner.store, runner.store.memory[:8]
    stage = torch.empty(slots.shape, dtype=torch.uint8, device=device)
    blocks = torch.arange(len(slots), device=device)
    places = [(rows, part.start + layer * part.row_bytes)
              for part in store.parts for layer, rows in enumerate(part.rows)]
    table = row_table([rows for rows, _ in places], [start for _, start in places],
                      store.block_bytes)
    words = {rows.dtype: stage.view(rows.dtype) for rows, _ in places}

    def plainly() -> None:
        for rows, start in places:
            first = start // rows.element_size()
            rows.index_copy_(0, blocks, words[rows.dtype][:, first:first + rows.shape[1]])

    def load() -> None:
        stage.copy_(slots, non_blocking=True)

    def save() -> None:
        slots.copy_(stage, non_blocking=True)

    gib = stage.numel() / GIB
    return {f"{name}_gib_per_s": rounded(gib / _seconds(run), 4) for name, run in (
        ("link_load", load), ("link_save", save),
        ("kernel", lambda: unpack_blocks(table, blocks, stage)), ("plain", plainly))}


def _seconds(run: Callable[[], None]) -> float:
    """Time one of many runs, on GPUs."""
    run()
    torch.cuda.synchronize()
    begun_s = time.perf_counter()
    for _ in range(NUM_ROUNDS):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - begun_s) / NUM_ROUNDS
