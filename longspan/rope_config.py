"""What config.json says of the rotary frequencies.

transformers 4 states the base at the top level and the scaling in ``rope_scaling``, transformers 5
both in ``rope_parameters``. Where two places say it, they must agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from longspan.errors import CheckpointError
from longspan.fields import Fields

BLOCKS = ("rope_parameters", "rope_scaling")
TRAINED = "original_max_position_embeddings"
KEYS = ("rope_type", "type", "rope_theta", TRAINED)
"""Keys that unscaled RoPE may have."""
LLAMA3_KEYS = ("low_freq_factor", "high_freq_factor")
YARN_KEYS = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate",
             "finetuned")
KIND_KEYS: dict[str, tuple[str, ...]] = {
    "default": (), "linear": ("factor",), "dynamic": ("factor", "finetuned"),
    "llama3": ("factor", *LLAMA3_KEYS), "yarn": ("factor", *YARN_KEYS)}
"""Further keys of each kind that is supported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """How rotary frequencies differ from those of the base alone."""

    kind: Literal["linear", "llama3", "yarn", "dynamic"]
    """``linear``: all of them are divided; ``llama3`` and ``yarn``: those of long wavelengths;
    ``dynamic``: none up to the trained length, which is as far as it goes here: beyond, the
    rotation of a cached key would depend on the request's length."""
    factor: float
    """What frequencies are divided by."""
    low_freq_factor: float = 1.0
    """llama3: longer wavelengths than the trained length over this are divided by ``factor``."""
    high_freq_factor: float = 4.0
    """llama3: shorter wavelengths than the trained length over this stay; between the two, the
    divisor changes gradually."""
    original_max_position_embeddings: int = 8192
    """llama3 and yarn: the trained length, tokens."""
    beta_fast: float = 32.0
    """yarn: frequencies that turn more often than this over the trained length stay."""
    beta_slow: float = 1.0
    """yarn: those that turn less often are divided by ``factor``."""
    truncate: bool = True
    """yarn: the two borders are rounded to whole dimensions."""
    attention_factor: float = 1.0
    """yarn: both queries and keys are multiplied by it."""

    def __post_init__(self) -> None:
        if not self.factor >= 1:
            raise CheckpointError(f"rope scaling factor {self.factor:g} must be 1 or more")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise CheckpointError(
                f"low_freq_factor {self.low_freq_factor:g} must be between 0 and high_freq_factor "
                f"{self.high_freq_factor:g}; correct config.json")
        if not 0 < self.beta_slow <= self.beta_fast:
            raise CheckpointError(f"beta_slow {self.beta_slow:g} must be between 0 and beta_fast "
                                  f"{self.beta_fast:g}; correct config.json")
        if not self.attention_factor > 0:
            raise CheckpointError(
                f"attention_factor {self.attention_factor:g} must be above 0; correct config.json")


def read_rope(need: Fields) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling. Raises `CheckpointError` for kinds that are not supported and for
    places that disagree."""
    blocks = [block for block in map(need.block, BLOCKS) if block.raw]
    scalings = [_scaling(need, block) for block in blocks]
    if len(set(scalings)) > 1:
        raise CheckpointError(f"{need.source}: rope_parameters and rope_scaling are of different "
                              "kinds or sizes; correct config.json so that they agree")
    return _theta(need, blocks), scalings[0] if scalings else None


def _theta(need: Fields, blocks: list[Fields]) -> float:
    holders = [holder for holder in (need, *blocks) if holder.raw.get("rope_theta") is not None]
    stated = [holder.number("rope_theta", 10_000.0) for holder in holders or [need]]
    if len(set(stated)) > 1:
        places = " and ".join(f"{value:g} in {holder.source}"
                              for holder, value in zip(holders, stated, strict=True))
        raise CheckpointError(f"rope_theta is {places}; correct config.json so that they agree")
    if not stated[0]:
        raise holders[0].wrong("rope_theta", "a number > 0")
    return stated[0]


def _scaling(need: Fields, block: Fields) -> RopeScaling | None:
    stated = [block.raw[key] for key in ("rope_type", "type") if block.raw.get(key) is not None]
    kind = stated[0] if stated else "default"
    for name in stated:
        if not isinstance(name, str) or name not in KIND_KEYS or name != kind:
            raise CheckpointError(
                f"{block.source} of type {name!r} is not supported; remove it, and for lengths "
                "beyond the trained one use positions 'dca'")
    for key in block.raw:
        if key not in (*KEYS, *KIND_KEYS[kind]):
            raise CheckpointError(f"{block.source}: {key} is not supported")
    if kind == "linear":
        return RopeScaling(kind="linear", factor=block.number("factor"))
    if kind == "dynamic":
        return RopeScaling(kind="dynamic", factor=block.number("factor"))
    if kind == "llama3":
        return RopeScaling(
            kind="llama3", factor=block.number("factor"),
            low_freq_factor=block.number("low_freq_factor"),
            high_freq_factor=block.number("high_freq_factor"),
            original_max_position_embeddings=_trained_len(need, block))
    return _yarn(need, block) if kind == "yarn" else None


def _yarn(need: Fields, block: Fields) -> RopeScaling:
    trained = _trained_len(need, block)
    factor = block.number("factor", need.integer("max_position_embeddings") / trained)
    stated = block.number("attention_factor", 0.0)
    scales = [block.number(key, 0.0) for key in ("mscale", "mscale_all_dim")]
    if not all(scales):
        scales = [1.0, 0.0]
    above, below = (0.1 * scale * math.log(max(1.0, factor)) + 1.0 for scale in scales)
    has_factor = block.raw.get("attention_factor") is not None
    return RopeScaling(
        kind="yarn", factor=factor, original_max_position_embeddings=trained,
        beta_fast=block.number("beta_fast", 0.0) or 32.0,
        beta_slow=block.number("beta_slow", 0.0) or 1.0,
        truncate=block.raw.get("truncate") is None or block.boolean("truncate"),
        attention_factor=stated if has_factor else above / below)


def _trained_len(need: Fields, block: Fields) -> int:
    """Read the trained length: in the block, beside it, or the longest context claimed."""
    stated = [holder.integer(TRAINED) for holder in (block, need)
              if holder.raw.get(TRAINED) is not None]
    if len(set(stated)) > 1:
        raise CheckpointError(f"{TRAINED} is {stated[0]} in {block.source} and {stated[1]} beside "
                              "it; correct config.json so that they agree")
    return stated[0] if stated else need.integer("max_position_embeddings")
