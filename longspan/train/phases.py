"""The progressive schedule as data: length, RoPE base, tokens, learning rate of each phase.

Lengths and bases are the report's (Qwen2.5-1M section 3); tokens and rates are nano's own.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from longspan.errors import LongspanError

TOKENS_PER_STEP = 262_144
ROW_MULTIPLE = 128

Shape = tuple[int, int]
"""(number of rows, row length in tokens) of one optimizer step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One phase of progressive training."""

    name: str
    seq_len: int
    """Longest row, in tokens."""
    rope_theta: float
    num_tokens: int
    """Tokens to train on, rounded down to whole steps."""
    learning_rate: float
    shorter: tuple[int, ...] = ()
    """Row lengths that share what ``full_share`` leaves of the sequences."""
    full_share: float = 1.0
    """Share of the sequences at ``seq_len``."""
    tokens_per_step: int = TOKENS_PER_STEP
    tasks: Mapping[str, float] | None = field(default=None, repr=False)
    """Shares of the tasks of its rows, where they are not those of the other phases."""

    def __post_init__(self) -> None:
        for length in (self.seq_len, *self.shorter):
            if length % ROW_MULTIPLE or self.tokens_per_step % length:
                raise LongspanError(
                    f"phase {self.name}: row length {length} must be a multiple of "
                    f"{ROW_MULTIPLE} and divide tokens_per_step {self.tokens_per_step}")
        if self.num_tokens < self.tokens_per_step:
            raise LongspanError(
                f"phase {self.name}: {self.num_tokens} tokens is less than one step "
                f"({self.tokens_per_step}): raise num_tokens")
        if not 0 < self.full_share <= 1 or bool(self.shorter) != (self.full_share < 1):
            raise LongspanError(
                f"phase {self.name}: full_share {self.full_share} with {len(self.shorter)} "
                "shorter lengths: give shorter lengths exactly when full_share is below 1")
        if any(length >= self.seq_len for length in self.shorter):
            raise LongspanError(f"phase {self.name}: shorter lengths must be below {self.seq_len}")

    @property
    def num_steps(self) -> int:
        """Optimizer steps."""
        return self.num_tokens // self.tokens_per_step

    def schedule(self, seed: int = 0) -> list[Shape]:
        """Return the shape of every step. Shorter rows come in whole steps, so that ``full_share``
        of the sequences (not of the steps) is at full length; the last step is always full."""
        shapes = [(self.tokens_per_step // n, n) for n in (self.seq_len, *self.shorter)]
        rest = (1 - self.full_share) / max(1, len(self.shorter))
        sequences = [self.full_share, *[rest] * len(self.shorter)]
        share = [s / rows for s, (rows, _) in zip(sequences, shapes, strict=True)]
        counts = [math.ceil(self.num_steps * s / sum(share) - 0.5) for s in share[1:]]
        short = [shape for shape, n in zip(shapes[1:], counts, strict=True) for _ in range(n)]
        plan = short + [shapes[0]] * (self.num_steps - len(short))
        random.Random(f"{seed}/{self.name}").shuffle(plan)
        if shapes[0] in plan:
            last = plan.index(shapes[0])
            plan[last], plan[-1] = plan[-1], plan[last]
        return plan


def validate_phases(phases: Sequence[Phase]) -> None:
    """Refuse an empty schedule, and lengths or RoPE bases that fall."""
    if not phases:
        raise LongspanError("no phases: give at least one")
    for before, after in zip(phases, phases[1:], strict=False):
        if after.seq_len < before.seq_len or after.rope_theta < before.rope_theta:
            raise LongspanError(
                f"phase {after.name} falls back from length {before.seq_len}, base "
                f"{before.rope_theta:g} to {after.seq_len}, {after.rope_theta:g}: order phases "
                "by length and base")


LADDER = ((4096, 1e4), (32_768, 1e6), (65_536, 1e6), (131_072, 5e6), (262_144, 1e7))
"""The report's lengths and the RoPE base that each was trained with."""
MIN_SHORTER = 4096
"""Shorter rows of an extension are not below this, unless the checkpoint's own length is."""


def ladder_base(length: int) -> float:
    """Return the report's RoPE base for rows of a length. Raises `LongspanError` beyond its own."""
    for most, base in LADDER:
        if length <= most:
            return base
    raise LongspanError(f"rows of {length:,} tokens: the report's bases end at {LADDER[-1][0]:,}; "
                        "train to that, longer prompts are DCA's part, or name a base by --phase")


def extension(
    start_len: int, rope_theta: float, to: int, *, num_tokens: int, learning_rate: float,
    tokens_per_step: int | None = None,
) -> list[Phase]:
    """Return phases that double the length up to ``to``, with the report's bases and 75/25 mixture.

    The tokens are shared out equally. Raises `LongspanError` for a length that is not beyond
    ``start_len``.
    """
    if to <= start_len:
        raise LongspanError(f"the checkpoint already has {start_len:,} tokens of context, "
                            f"{to:,} is no extension: ask for more")
    lengths = [to]
    while lengths[0] % 2 == 0 and lengths[0] // 2 > start_len:
        lengths.insert(0, lengths[0] // 2)
    step = tokens_per_step or to * max(1, TOKENS_PER_STEP // to)
    phases: list[Phase] = []
    for length in lengths:
        rope_theta = max(rope_theta, ladder_base(length))
        phases.append(Phase(
            name=short_length(length), seq_len=length, rope_theta=rope_theta,
            num_tokens=num_tokens // len(lengths), learning_rate=learning_rate,
            shorter=shorter_lengths(length, min(start_len, MIN_SHORTER)), full_share=0.75,
            tokens_per_step=step))
    return phases


def shorter_lengths(length: int, least: int) -> tuple[int, ...]:
    """Return halves, quarters and so on of a length, down to ``least`` and three at most."""
    found = [length >> k for k in (1, 2, 3) if length >> k >= max(least, ROW_MULTIPLE)]
    return tuple(n for n in found if n % ROW_MULTIPLE == 0 and length % n == 0)


def short_length(length: int) -> str:
    """Name a length: 32k for 32,768, 500 for 500."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def with_tokens(phases: Sequence[Phase], num_tokens: Mapping[str, int]) -> list[Phase]:
    """Return phases with new numbers of tokens, by name. Raises `LongspanError` for other names."""
    names = [phase.name for phase in phases]
    unknown = [name for name in num_tokens if name not in names]
    if unknown:
        raise LongspanError(f"no phase named {unknown[0]}: choose from {', '.join(names)}")
    return [replace(p, num_tokens=num_tokens.get(p.name, p.num_tokens)) for p in phases]


def learning_rate(
    phases: Sequence[Phase], index: int, step: int, num_steps: int, warmup_steps: int,
    final_lr: float,
) -> float:
    """Rate at ``step`` of ``num_steps`` of phase ``index``: warm-up in the first phase, a short
    linear glide at each later phase's start, constant else, linear decay over the last phase's
    second 60 %."""
    phase = phases[index]
    rate = phase.learning_rate
    if index == 0:
        rate *= min(1.0, (step + 1) / max(1, warmup_steps))
    else:
        glide = min(1.0, (step + 1) / 10)
        rate = phases[index - 1].learning_rate * (1 - glide) + rate * glide
    if index == len(phases) - 1:
        progress = (step + 1) / num_steps
        rate += (final_lr - rate) * max(0.0, (progress - 0.4) / 0.6)
    return rate
