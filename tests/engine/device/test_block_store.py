"""Copies between caches and host slots: every byte, from any blocks to any slots and back."""

from __future__ import annotations

from array import array

import pytest
import torch

from longspan.attention.cache import allocate_cache
from longspan.engine.device import block_link
from longspan.engine.device.block_mover import BlockMover
from longspan.engine.device.block_store import BlockStore
from longspan.engine.transfer import Transfer
from longspan.errors import NotEnoughMemoryError
from longspan.ops.types import PagedKV

LAYERS, BLOCKS, SIZE = 3, 20, 8
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def caches(device: str, dtype: torch.dtype, *, means: bool) -> list[PagedKV]:
    """Caches of three layers, full of different numbers."""
    found = [allocate_cache(num_blocks=BLOCKS, block_size=SIZE, num_kv_heads=2, head_dim=6,
                            dtype=dtype, device=device, means=means) for _ in range(LAYERS)]
    for cache in found:
        for part in cache:
            if part is not None:
                part.copy_(torch.randn(part.shape).to(dtype))
    return found


def content(caches: list[PagedKV], block: int) -> list[torch.Tensor]:
    """All of one block."""
    return [part[block].float().cpu().clone() for cache in caches for part in cache
            if part is not None]


def transfer(number: int, kind: str, blocks: list[int], slots: list[int]) -> Transfer:
    return Transfer(transfer_id=number, kind=kind,  # type: ignore[arg-type]
                    blocks=array("i", blocks), slots=array("i", slots))


def wait(mover: BlockMover, number: int) -> None:
    """Until a transfer has ended."""
    while number not in {result.transfer_id for result in mover.results(0.1)}:
        pass


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("means", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_blocks_come_back_as_they_were(
    device: str, dtype: torch.dtype, means: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:
    kv = caches(device, dtype, means=means)
    first = BlockStore(kv, 1)
    monkeypatch.setattr(block_link, "STAGE_BYTES", 3 * first.block_bytes)
    first.close()
    store = BlockStore(kv, 12)  # on GPUs its stages hold three blocks now
    mover = BlockMover(store, None)
    saved, slots, back = [3, 7, 8, 9, 0, 19, 4], [11, 0, 1, 2, 7, 5, 6], [1, 2, 19, 5, 8, 0, 3]
    before = [content(kv, block) for block in range(BLOCKS)]
    mover.start([transfer(0, "save", saved, slots)], ())
    wait(mover, 0)
    for cache in kv:
        for part in cache:
            if part is not None:
                part.fill_(0)
    mover.start([transfer(1, "load", back, slots)], ())
    wait(mover, 1)
    for block in range(BLOCKS):
        wanted = before[saved[back.index(block)]] if block in back else None
        for index, found in enumerate(content(kv, block)):
            assert torch.equal(found, torch.zeros_like(found) if wanted is None else wanted[index])
    expected = sum(part.numel() * part.element_size() for cache in kv for part in cache
                   if part is not None) // BLOCKS
    assert store.block_bytes == expected
    mover.close()


@pytest.mark.parametrize("device", DEVICES)
def test_a_transfer_is_done_once_and_told_until_it_was_seen(device: str) -> None:
    kv = caches(device, torch.float32, means=False)
    mover = BlockMover(BlockStore(kv, 4), None)
    save = transfer(0, "save", [1], [2])
    mover.start([save], ())
    wait(mover, 0)
    old = content(kv, 1)
    kv[0].k[1].fill_(5)
    mover.start([save, transfer(1, "load", [1], [2])], ())
    wait(mover, 1)
    assert all(torch.equal(a, b) for a, b in zip(content(kv, 1), old, strict=True))
    assert [result.transfer_id for result in mover.results()] == [0, 1]
    mover.start((), (0,))
    assert [result.transfer_id for result in mover.results()] == [1]
    mover.close()


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_are_saved_before_others_are_loaded_into_them(
    device: str, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two sets of blocks change places again and again, without a wait between save and load."""
    kv = caches(device, torch.bfloat16, means=True)
    store = BlockStore(kv, BLOCKS)
    monkeypatch.setattr(block_link, "STAGE_BYTES", 2 * store.block_bytes)
    store.close()
    store = BlockStore(kv, BLOCKS)
    mover, generator = BlockMover(store, None), torch.Generator().manual_seed(11)
    wanted = [content(kv, block) for block in range(BLOCKS)]
    slots, free = list(range(7)), list(range(7, BLOCKS))
    chosen = torch.randperm(BLOCKS, generator=generator)[:7].tolist()
    mover.start([transfer(0, "save", chosen, slots)], ())
    wait(mover, 0)
    inside, number = [wanted[block] for block in chosen], 1
    for _ in range(20):
        blocks = torch.randperm(BLOCKS, generator=generator)[:7].tolist()
        there = [free[index] for index in torch.randperm(len(free), generator=generator)[:7]]
        mover.start([transfer(number, "save", blocks, there),
                     transfer(number + 1, "load", blocks, slots)], ())
        for one in (number, number + 1):
            wait(mover, one)
        old = [wanted[block] for block in blocks]
        for block, value in zip(blocks, inside, strict=True):
            wanted[block] = value
        inside, free, slots = old, [*slots, *(slot for slot in free if slot not in there)], there
        number += 2
    for block in range(BLOCKS):
        assert all(map(torch.equal, content(kv, block), wanted[block])), block
    mover.close()


@pytest.mark.gpu
def test_copies_wait_for_what_was_queued_before() -> None:
    kv = caches("cuda", torch.bfloat16, means=True)
    mover = BlockMover(BlockStore(kv, 4), None)
    torch.cuda._sleep(200_000_000)
    kv[0].k[1].fill_(7)
    event = torch.cuda.Event()
    event.record()
    mover.start([transfer(0, "save", [1], [2])], (), event)
    wait(mover, 0)
    torch.cuda.synchronize()
    kv[0].k[1].fill_(1)
    mover.start([transfer(1, "load", [1], [2])], ())
    wait(mover, 1)
    assert (kv[0].k[1] == 7).all()
    mover.close()


def test_memory_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("mmap.mmap", refuse)
    with pytest.raises(NotEnoughMemoryError, match="lower kv_host_gib"):
        BlockStore(caches("cpu", torch.float32, means=False), 4)
