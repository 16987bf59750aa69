"""BlockPool: runs, prefix hashes, LRU, and a fuzz against a model of the accounts."""

from __future__ import annotations

import random
from array import array

import pytest

from longspan.engine.blocks import BlockPool, extend_hashes


def hashes_of(tokens: list[int], block_size: int = 2, salt: bytes = b"") -> list[bytes]:
    hashes: list[bytes] = []
    extend_hashes(hashes, array("i", tokens), block_size, {0: salt})
    return hashes


def fill(pool: BlockPool, hashes: list[bytes]) -> list[int]:
    """Allocate, register and release blocks of these hashes."""
    blocks = pool.allocate(len(hashes))
    assert blocks is not None
    for block, value in zip(blocks, hashes, strict=True):
        pool.register(block, value)
    pool.release(blocks)
    return blocks


def test_hashes_chain_over_full_blocks_and_the_salt() -> None:
    first = hashes_of([1, 2, 3, 4, 5])
    assert len(first) == 2
    assert hashes_of([1, 2, 3, 4, 9, 9])[:2] == first
    assert hashes_of([9, 2, 3, 4])[1] != first[1]
    assert not set(hashes_of([1, 2, 3, 4], salt=b"sparse")) & set(first)
    late: list[bytes] = []
    extend_hashes(late, array("i", [1, 2, 3, 4, 5]), 2, {1: b"tail"})
    assert late[0] == first[0] and late[1] != first[1]
    grown = hashes_of([1, 2])
    extend_hashes(grown, array("i", [1, 2, 3, 4, 5]), 2, {})
    assert grown == first


def test_allocates_ascending_runs_and_refuses_too_many() -> None:
    pool = BlockPool(8)
    first, second = pool.allocate(3), pool.allocate(3)
    assert (first, second) == ([0, 1, 2], [3, 4, 5])
    assert pool.allocate(3) is None and pool.num_available == 2
    pool.release([0, 1, 2])
    assert pool.allocate(2) == [0, 1]
    assert pool.allocate(2) == [6, 7]
    assert pool.allocate(0) == []
    pool.check()


def test_extends_right_behind_a_block_when_it_can() -> None:
    pool = BlockPool(8)
    held = pool.allocate(6)
    assert held is not None
    pool.release([0, 1, 4, 5])
    assert pool.allocate(2, after=3) == [4, 5]
    assert pool.allocate(2, after=5) == [6, 7]
    assert pool.allocate(2, after=7) == [0, 1]


def test_scattered_blocks_when_no_run_is_left() -> None:
    pool = BlockPool(6)
    pool.allocate(6)
    pool.release([1])
    pool.release([3])
    pool.release([5])
    assert pool.allocate(2) == [1, 3]
    pool.check()


def test_matches_the_longest_known_prefix_and_holds_it() -> None:
    pool = BlockPool(4)
    hashes = hashes_of([1, 2, 3, 4, 5, 6])
    blocks = fill(pool, hashes[:2])
    assert pool.match(hashes) == blocks and pool.num_available == 4
    pool.acquire(blocks)
    pool.acquire(blocks)
    assert pool.num_available == 2 and pool.allocate(3) is None
    pool.release(blocks)
    assert pool.num_available == 2
    pool.release(blocks)
    assert pool.num_available == 4
    pool.check()


def test_free_blocks_go_before_cached_ones_and_old_before_new() -> None:
    pool = BlockPool(6)
    old = fill(pool, hashes_of([1, 2, 3, 4]))
    new_hashes = hashes_of([5, 6, 7, 8])
    held = pool.allocate(2)  # takes free blocks behind the cached ones
    assert (old, held) == ([0, 1], [2, 3])
    new = fill(pool, new_hashes)
    assert new == [4, 5]
    assert pool.allocate(2) == [0, 1]
    assert pool.match(new_hashes) == new and pool.match(hashes_of([1, 2])) == []
    pool.check()


def test_the_end_of_a_prefix_is_evicted_before_its_start() -> None:
    pool = BlockPool(3)
    hashes = hashes_of([1, 2, 3, 4, 5, 6])
    fill(pool, hashes)
    assert pool.allocate(1) == [2]
    assert pool.match(hashes) == [0, 1]


def test_a_second_copy_of_known_content_stays_private() -> None:
    pool = BlockPool(4)
    hashes = hashes_of([1, 2])
    for _ in range(2):
        blocks = pool.allocate(1)
        assert blocks is not None
        pool.register(blocks[0], hashes[0])
    assert pool.match(hashes) == [0]
    pool.release([1])
    pool.release([0])
    pool.check()


def test_releasing_twice_is_our_own_fault() -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    pool.release([0])
    with pytest.raises(AssertionError, match="released twice"):
        pool.release([0])


@pytest.mark.parametrize("seed", range(10))
def test_fuzz(seed: int) -> None:
    rng = random.Random(seed)
    pool = BlockPool(rng.randrange(1, 30))
    chains = [hashes_of([rng.randrange(9) for _ in range(20)]) for _ in range(4)]
    held: list[list[int]] = []
    for _ in range(300):
        if held and rng.random() < 0.5:
            pool.release(held.pop(rng.randrange(len(held))))
        else:
            _take(pool, rng.choice(chains), rng.randrange(12), held)
        pool.check()
        used = {block for blocks in held for block in blocks}
        assert pool.num_available == pool.num_blocks - len(used), f"seed {seed}"
    for blocks in held:
        pool.release(blocks)
    assert pool.num_available == pool.num_blocks


def _take(pool: BlockPool, chain: list[bytes], count: int, held: list[list[int]]) -> None:
    found = pool.match(chain)
    available = pool.num_available
    pool.acquire(found)
    new = pool.allocate(count, after=found[-1] if found else None)
    if new is None:
        pool.release(found)
        assert pool.num_available == available < count + len(found)
        return
    assert len(set(found + new)) == len(found) + count
    assert sorted(new) == new
    for block, value in zip(found + new, chain, strict=False):
        pool.register(block, value)
    held.append(found + new)
