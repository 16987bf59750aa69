"""What `longspan bench cache` is asked for, and the figures that its rows have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.bench.engine.cache_driver import sizes_for
from longspan.bench.engine.engine import plan_engine
from longspan.bench.session import CheckFailed
from longspan.bench.shapes import Shape
from longspan.bench.timing import rounded
from longspan.engine.prefix_origin import PrefixOrigin
from longspan.engine.setup.engine_plan import ResolvedEngine
from longspan.errors import LongspanError
from longspan.units import GIB

PLACES = ("host", "disk", "turns", "copies", "cancelled")
SPARE = 1.03
"""Room in a place, as a share of the prompt's KV."""
BLOCK_LEN, BESIDE_BLOCKS = 128, 64
"""Tokens of a block, and blocks for what decodes beside a prompt."""
SWAP_GIB = {"cpu": 0.05, "cuda": 8.0}
"""Host memory besides one prompt, through which two change places."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheOptions:
    """What was asked for on the command line."""

    lengths: tuple[int, ...]
    """Prompt lengths, tokens."""
    places: tuple[str, ...]
    """Some of `PLACES`."""
    folder: Path
    """Empty or missing; on the disk that is measured."""
    chunk_len: int | None = None
    attention: str = "sparse"
    turns: int = 2
    """Times that each of two prompts is asked again."""
    host_gib: float | None = None
    """Host memory where two take turns; None: for one of them and a little."""

    def __post_init__(self) -> None:
        for name in self.places:
            if name not in PLACES:
                raise LongspanError(f"--places: {name!r} is not one of {', '.join(PLACES)}")
        if self.attention not in ("dense", "sparse"):
            raise LongspanError(f"--attention: {self.attention!r} is not one of dense, sparse")
        if self.folder.exists() and any(self.folder.iterdir()):
            raise LongspanError(f"--dir: {self.folder} is not empty; name another folder")
        if self.turns < 1:
            raise LongspanError(f"--turns must be 1 or more, not {self.turns}")


def document_bytes(device: str, shape: Shape, options: CacheOptions, length: int) -> int:
    """Return the size of a prompt's KV, with what decodes beside it."""
    plan = _plan(device, shape, options, length)
    return plan.tiers.block_bytes * (length // BLOCK_LEN + BESIDE_BLOCKS)


def written_bytes(device: str, shape: Shape, options: CacheOptions, length: int) -> int:
    """Return the room for all that ``disk`` writes: the prompt, and for a further question up to a
    chunk once more. Files that had to make way for that could not be read in the end."""
    plan = _plan(device, shape, options, length)
    question_len = min(length, plan.config.prefill_chunk_len or length)
    num_blocks = (length + question_len) // BLOCK_LEN + 2 * BESIDE_BLOCKS
    return int(SPARE * plan.tiers.block_bytes * num_blocks)


def check_token(again: int, token: int, place: str) -> None:
    """Raise `CheckFailed` when a prompt's token is another one with KV that came back."""
    if again != token:
        raise CheckFailed(f"the token is {again} with KV from {place}, and was {token}")


def figures(
    prefill_s: float, ttft_s: float, origin: PrefixOrigin | None, block_bytes: int,
) -> dict[str, Any]:
    """Return a row's figures. Raises `CheckFailed` when nothing was loaded."""
    if origin is None:
        raise CheckFailed("nothing was loaded: the prompt was computed again")
    num_tokens = origin.num_host_tokens + origin.num_disk_tokens
    num_bytes = num_tokens // BLOCK_LEN * block_bytes
    return {"prefill_s": rounded(prefill_s, 5), "load_s": rounded(origin.load_s, 5),
            "ttft_s": rounded(ttft_s, 5), "loaded_tokens": num_tokens,
            "gib": rounded(num_bytes / GIB, 5), "gib_per_s": rounded(
                num_bytes / GIB / origin.load_s, 4),
            "ttft_over_prefill": rounded(ttft_s / prefill_s, 4)}


def _plan(device: str, shape: Shape, options: CacheOptions, length: int) -> ResolvedEngine:
    return plan_engine(shape, device, sizes_for(length, options.chunk_len, kv_host_gib=1.0))
