"""BlockPool: runs, prefix hashes, LRU, and a fuzz against a model of the accounts."""

from __future__ import annotations

import random
from array import array

import pytest

from longspan.engine.control.blocks import SHORT_TAIL, BlockPool, extend_hashes


def hashes_of(tokens: list[int], block_size: int = 2, salt: bytes = b"") -> list[bytes]:
    hashes: list[bytes] = []
    extend_hashes(hashes, array("i", tokens), block_size, {0: salt})
    return hashes


def fill(pool: BlockPool, hashes: list[bytes]) -> list[int]:
    """Compute a prompt with these hashes and let go of it."""
    found = pool.match(hashes)
    pool.acquire(found)
    new = pool.allocate(len(hashes) - len(found), behind=found)
    assert new is not None
    register(pool, found + new, hashes)
    pool.release(found + new)
    return found + new


def register(pool: BlockPool, blocks: list[int], hashes: list[bytes]) -> None:
    for block, value, parent in zip(blocks, hashes, [b"", *hashes], strict=False):
        pool.register(block, value, parent)


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
    assert pool.allocate(2, behind=[3]) == [4, 5]
    assert pool.allocate(2, behind=[5]) == [6, 7]
    assert pool.allocate(2, behind=[7]) == [0, 1]


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


def test_what_stands_behind_a_prefix_stays_while_blocks_are_free() -> None:
    pool = BlockPool(20)
    first, second = hashes_of([1] * 8), hashes_of([2] * 8)
    assert fill(pool, first) + fill(pool, second) == list(range(8))
    pool.acquire(pool.match(first))
    assert pool.allocate(5, behind=[0, 1, 2, 3]) == [8, 9, 10, 11, 12]
    assert pool.match(second) == [4, 5, 6, 7]
    pool.check()


def test_scattered_free_blocks_go_before_cached_ones() -> None:
    """Where there is no run of free blocks, one of cached ones is no better."""
    pool = BlockPool(12)
    known = hashes_of([1] * 12)
    assert fill(pool, known) == [0, 1, 2, 3, 4, 5]
    held = pool.allocate(6)
    assert held is not None
    for block in (7, 9, 11):
        pool.release([block])
    assert pool.allocate(3) == [7, 9, 11]
    assert pool.match(known) == [0, 1, 2, 3, 4, 5]


def test_what_has_to_go_is_the_oldest_and_little_more() -> None:
    """A run may cost the content of twice the blocks that are missing, not more."""
    pool = BlockPool(8)
    old, new = hashes_of([1, 1]), hashes_of([2] * 8)
    fill(pool, old)
    assert pool.allocate(1) == [1]
    fill(pool, new)
    assert pool.allocate(1) == [6]
    assert pool.allocate(2) == [0, 7]  # the runs that there are would cost two newer ones
    assert pool.match(new) == [2, 3, 4, 5]
    assert pool.allocate(2) == [4, 5]
    assert pool.match(new) == [2, 3]
    pool.check()


def conversation(tail_len: int) -> tuple[BlockPool, list[int], list[bytes]]:
    """A pool of 40 blocks with a document of 32, held, and behind it what follows in the cache."""
    pool, document = BlockPool(40), [1] * 64
    hashes = hashes_of(document + list(range(2 * tail_len)))
    blocks = fill(pool, hashes)
    assert blocks == list(range(32 + tail_len))
    pool.acquire(blocks[:32])
    return pool, blocks[:32], hashes


def test_a_short_continuation_makes_way_for_another_one() -> None:
    pool, held, hashes = conversation(2)
    assert pool.allocate(4, behind=held) == [32, 33, 34, 35]
    assert pool.match(hashes) == held
    pool.check()


def test_a_long_continuation_stays() -> None:
    pool, held, hashes = conversation(3)
    assert pool.allocate(4, behind=held) == [35, 36, 37, 38]
    assert len(pool.match(hashes)) == 35


def test_a_continuation_that_goes_on_elsewhere_stays() -> None:
    """It would cut off what does not stand in the way."""
    pool, held, hashes = conversation(2)
    pool.release(held)
    assert pool.allocate(1) == [34]
    longer = hashes_of([1] * 64 + [0, 1, 2, 3, 5, 5, 5, 5])
    assert fill(pool, longer) == [*range(34), 35, 36]
    pool.acquire(held)
    assert longer[:34] == hashes
    assert pool.allocate(2, behind=held) == [37, 38]
    assert len(pool.match(longer)) == 36


@pytest.mark.parametrize("seed", range(10))
def test_fuzz(seed: int) -> None:
    rng = random.Random(seed)
    pool = BlockPool(rng.randrange(1, 150))
    stem = [rng.randrange(9) for _ in range(80)]
    chains = [hashes_of(stem[:rng.choice([20, 80, 80])] + rng.choices(range(9), k=length))
              for length in (2, 4, 4, 20, 60, 60)]
    held: list[list[int]] = []
    for _ in range(300):
        if held and rng.random() < 0.5:
            pool.release(held.pop(rng.randrange(len(held))))
        else:
            _take(pool, rng.choice(chains), chains, rng.randrange(45), held)
        pool.check()
        used = {block for blocks in held for block in blocks}
        assert pool.num_available == pool.num_blocks - len(used), f"seed {seed}"
    for blocks in held:
        pool.release(blocks)
    assert pool.num_available == pool.num_blocks


def _take(
    pool: BlockPool, chain: list[bytes], chains: list[list[bytes]], count: int,
    held: list[list[int]],
) -> None:
    found = pool.match(chain)
    available = pool.num_available
    pool.acquire(found)
    before, num_free = set(pool._block_of), pool._free.count(1)
    new = pool.allocate(count, behind=found)
    if new is None:
        pool.release(found)
        assert pool.num_available == available < count + len(found)
        return
    assert len(set(found + new)) == len(found) + count
    assert sorted(new) == new
    lost = before - set(pool._block_of)
    if lost and count <= num_free:
        depth = len(found)
        assert depth and lost <= {value for other in chains if other[:depth] == chain[:depth]
                                  for value in other[depth:]}
        assert len(lost) <= depth // SHORT_TAIL
    register(pool, found + new, chain)
    held.append(found + new)
