"""KV blocks: which are held by requests, and which content free ones still have. No torch.

Every block is in exactly one state::

    free   (nobody holds it, content worthless)
      |  allocate            ^ evicted by an allocation
      v                      |
    used   (refs >= 1) --- release, when a hash is known ---> cached (refs 0, content known)
      ^                                                         |
      +------------------------ acquire ------------------------+

**What a prefix-cache hit means.** A block's hash chains over all token ids from the first one to
the block's last, and over a salt that names the attention settings, so equal hashes mean equal
token prefixes under equal settings. That makes the cached keys and values *the same numbers* the
request would compute itself if they are a pure function of those tokens:

- Dense: they are (up to floating-point order).
- Sparse: the selection is made once per prefill chunk, from the chunk's own queries, so a block's
  numbers depend on tokens up to the end of its chunk: all of them are salted into the chunk's
  first hash. Cuts lie at absolute multiples of ``prefill_chunk_len`` and where a prompt's tail
  starts, and chunks are shared as a whole (`chunking.cacheable_len`). Prompts of nearly the same
  length (another question about one document) have their tails start at the same place
  (`chunking.tail_start`), so that they share everything before it.
- YaRN's attention temperature grows with a request's whole length beyond the trained length. It
  stands on the query side, so cached *first-layer* keys do not depend on it, but deeper layers see
  it through the hidden states. A hit from a prompt of another length, beyond the trained length,
  is therefore close and not exact: 0.1 ln(ratio of the lengths) in the temperature.

Contiguity: the CPU attention path reads a request's cache without a copy when its table is one
ascending run, so `BlockPool.allocate` looks for runs, right after the blocks already held first. A
copy of a table in pieces takes milliseconds a step and a lost prefix of a million tokens takes
minutes, so a run is worth little cached content: see `BlockPool.allocate`.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

SHORT_TAIL = 16
"""A cached continuation may make way for another one if the prefix is this many times as long: for
example an earlier question about the same document."""
SPARE_FACTOR = 2
"""A run of blocks may cost the content of at most this many times the blocks that must be evicted.
"""


def extend_hashes(
    hashes: list[bytes], tokens: array[int], block_size: int, salts: Mapping[int, bytes],
) -> None:
    """Append the chain hashes of the full blocks of ``tokens`` (all tokens, from the first).

    Args:
        salts: by block index, what this block and all after it depend on besides the tokens.
    """
    data, size = memoryview(tokens).cast("B"), block_size * tokens.itemsize
    parent = hashes[-1] if hashes else b""
    for index in range(len(hashes), len(tokens) // block_size):
        block = blake2b(parent + salts[index] if index in salts else parent, digest_size=16)
        block.update(data[index * size:(index + 1) * size])
        parent = block.digest()
        hashes.append(parent)


class BlockPool:
    """Reference-counted KV blocks with a prefix cache in the free ones.

    Args:
        num_blocks: blocks in the KV cache, ids 0 to num_blocks - 1.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._refs = array("i", [0]) * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._parent_of: list[bytes | None] = [None] * num_blocks
        self._num_children: dict[bytes, int] = {}
        # Release time of cached blocks, 0 for all others: the least valuable is the smallest.
        self._stamps = array("q", [0]) * num_blocks
        self._clock = 0
        # One byte for each block, 1 where it is free: runs are found at memory speed.
        self._free = bytearray(b"\x01" * num_blocks)
        self._num_used = 0
        self.num_evictions = 0
        """Blocks whose content was lost so far: what `match` found before may have ended since."""
        self.notes_evicted = False
        """Whether `take_evicted` is called after each allocation."""
        self._evicted: list[tuple[int, int, bytes]] = []

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could hand out: free and cached ones."""
        return self.num_blocks - self._num_used

    def match(self, hashes: Sequence[bytes], start: int = 0) -> list[int]:
        """Return the blocks that hold the longest known prefix of this hash chain, in order.

        Args:
            start: leading blocks that were found before; only what follows them is returned.
        """
        found: list[int] = []
        for index in range(start, len(hashes)):
            block = self._block_of.get(hashes[index])
            if block is None:
                break
            found.append(block)
        return found

    def num_cached(self, block_ids: array[int]) -> int:
        """Count the blocks among these that no request holds, which `acquire` would make
        unavailable."""
        refs = np.frombuffer(self._refs, np.int32)
        return int((refs[np.frombuffer(block_ids, np.int32)] == 0).sum()) if block_ids else 0

    def find(self, value: bytes) -> int | None:
        """Return the block that holds the content with this hash, if there is one."""
        return self._block_of.get(value)

    def take_evicted(self) -> list[tuple[int, int, bytes]]:
        """Return what the latest allocation evicted, where that is noted: time of its release,
        block, hash. The blocks hold it until they are written."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def knows(self, value: bytes) -> bool:
        """Tell whether some block holds the content with this hash."""
        return value in self._block_of

    def acquire(self, block_ids: Sequence[int]) -> None:
        """Hold known blocks (from `match`) for one more request; cached ones become used."""
        for block in block_ids:
            if self._refs[block] == 0:
                assert self._hash_of[block] is not None
                self._num_used += 1
                self._stamps[block] = 0
            self._refs[block] += 1

    def allocate(self, count: int, behind: Sequence[int] = ()) -> list[int] | None:
        """Take ``count`` blocks, in one ascending run if there is one; None if too few are left.

        Args:
            behind: the blocks of the prefix that they will follow, held by the same request.

        No cached content is lost while enough blocks are free, in a run or not, except a short
        continuation of the prefix itself (`SHORT_TAIL`) that stands right behind it. Where free
        blocks do not suffice, the content released longest ago is lost.
        """
        if count > self.num_available:
            return None
        blocks = self._choose(count, behind)
        for block in blocks:
            self._forget(block)
            self._refs[block] = 1
            self._free[block] = 0
            self._stamps[block] = 0
        self._num_used += count
        return blocks

    def register(self, block_id: int, value: bytes, parent: bytes = b"") -> None:
        """Make a held block's content findable. A second copy of known content stays private.

        Args:
            value: the content's chain hash.
            parent: that of the block before it; empty for a chain's first block.
        """
        assert self._refs[block_id] > 0
        if value not in self._block_of and self._hash_of[block_id] is None:
            self._block_of[value] = block_id
            self._hash_of[block_id] = value
            self._parent_of[block_id] = parent
            self._num_children[parent] = self._num_children.get(parent, 0) + 1

    def release(self, block_ids: Sequence[int]) -> None:
        """Let go of blocks of one request, given in table order.

        Deeper blocks count as older: a prefix without its end is worth more than the reverse.
        """
        for block in reversed(block_ids):
            assert self._refs[block] > 0, "released twice"
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._num_used -= 1
                self._retire(block)

    def check(self) -> None:
        """Recount everything. Raises AssertionError when the accounts disagree."""
        used = sum(refs > 0 for refs in self._refs)
        free = sum(self._free)
        cached = sum(refs == 0 and value is not None
                     for refs, value in zip(self._refs, self._hash_of, strict=True))
        assert used == self._num_used, f"{used} blocks are used, {self._num_used} counted"
        assert free + cached + used == self.num_blocks, (free, cached, used, self.num_blocks)
        assert min(self._refs, default=0) >= 0
        known = {value: block for block, value in enumerate(self._hash_of) if value is not None}
        assert known == self._block_of, "hashes and blocks disagree"
        parents = Counter(value for value in self._parent_of if value is not None)
        assert parents == self._num_children, "parents and children disagree"
        for block, stamp in enumerate(self._stamps):
            is_cached = self._refs[block] == 0 and self._hash_of[block] is not None
            assert (stamp > 0) == is_cached, f"block {block}: stamp {stamp}"
            assert not (self._free[block] and self._refs[block]), f"block {block} free and used"

    def _retire(self, block: int) -> None:
        if self._hash_of[block] is None:
            self._free[block] = 1
            return
        self._clock += 1
        self._stamps[block] = self._clock

    def _forget(self, block: int) -> None:
        value, parent = self._hash_of[block], self._parent_of[block]
        if value is not None and parent is not None:
            del self._block_of[value]
            self._hash_of[block] = self._parent_of[block] = None
            self.num_evictions += 1
            if self.notes_evicted:
                self._evicted.append((self._stamps[block], block, value))
            self._num_children[parent] -= 1
            if not self._num_children[parent]:
                del self._num_children[parent]

    def _choose(self, count: int, behind: Sequence[int]) -> list[int]:
        start = behind[-1] + 1 if behind else self.num_blocks
        if not self._continues(start, count, len(behind) // SHORT_TAIL):
            start = self._free.find(b"\x01" * count)
        return list(range(start, start + count)) if start >= 0 else self._least_valuable(count)

    def _continues(self, start: int, count: int, most_lost: int) -> bool:
        """Tell whether the run that starts here may be taken: all of it is free, except at most
        ``most_lost`` blocks at its start that continue the block before it, and that nothing else
        in the cache continues."""
        if start + count > self.num_blocks or any(self._refs[start:start + count]):
            return False
        end = start
        while end < self.num_blocks and self._parent_of[end] == self._hash_of[end - 1] is not None:
            has_others = self._num_children.get(self._hash_of[end] or b"", 0) > 1
            end += 1
            if has_others or end - start > most_lost:
                return False
        goes_on = end > start and self._hash_of[end - 1] in self._num_children
        return not goes_on and all(self._free[end:start + count])

    def _least_valuable(self, count: int) -> list[int]:
        """Choose free blocks and, where they do not suffice, cached ones released longest ago."""
        stamps = np.frombuffer(self._stamps, np.int64)
        available = np.flatnonzero(np.frombuffer(self._refs, np.int32) == 0)
        by_value = available[np.argsort(stamps[available], kind="stable")]
        num_free = self._free.count(1)
        num_spare = num_free + SPARE_FACTOR * max(0, count - num_free)
        start = self._cheapest_run(count, by_value[:num_spare])
        return list(range(start, start + count)) if start >= 0 else \
            sorted(by_value[:count].tolist())

    def _cheapest_run(self, count: int, blocks: NDArray[np.intp]) -> int:
        """Find the run of these blocks with the least and oldest content; its start, or -1."""
        stamps = np.frombuffer(self._stamps, np.int64)
        is_usable = np.zeros(self.num_blocks, np.bool_)
        is_usable[blocks] = True
        num_usable = np.cumsum(np.concatenate(([0], is_usable)))
        costs = np.cumsum(np.concatenate(([0], stamps)))
        is_run = num_usable[count:] - num_usable[:-count] == count
        if not is_run.any():
            return -1
        most = np.iinfo(costs.dtype).max
        return int(np.where(is_run, costs[count:] - costs[:-count], most).argmin())
