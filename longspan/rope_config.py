"""What config.json says of the rotary frequencies.

transformers 4 states the base at the top level and the scaling in ``rope_scaling``, transformers 5
both in ``rope_parameters``. Where two places say it, they must agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from longspan.errors import CheckpointError
from longspan.fields import Fields

BLOCKS = ("rope_parameters", "rope_scaling")
KEYS = ("rope_type", "type", "rope_theta", "original_max_position_embeddings")
"""Keys that unscaled RoPE may have."""
LLAMA3_KEYS = ("low_freq_factor", "high_freq_factor")
KIND_KEYS: dict[str, tuple[str, ...]] = {
    "default": (), "linear": ("factor",), "llama3": ("factor", *LLAMA3_KEYS)}
"""Further keys of each kind that is supported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """Rotary frequencies that were divided before a checkpoint was trained to its length."""

    kind: Literal["linear", "llama3"]
    """``linear``: all of them; ``llama3``: those of long wavelengths."""
    factor: float
    """What frequencies are divided by."""
    low_freq_factor: float = 1.0
    """llama3: longer wavelengths than the trained length over this are divided by ``factor``."""
    high_freq_factor: float = 4.0
    """llama3: shorter wavelengths than the trained length over this stay; between the two, the
    divisor changes gradually."""
    original_max_position_embeddings: int = 8192
    """llama3: the trained length, tokens."""

    def __post_init__(self) -> None:
        if not self.factor >= 1:
            raise CheckpointError(f"rope scaling factor {self.factor:g} must be 1 or more")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise CheckpointError(
                f"low_freq_factor {self.low_freq_factor:g} must be between 0 and high_freq_factor "
                f"{self.high_freq_factor:g}; correct config.json")


def read_rope(need: Fields) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling. Raises `CheckpointError` for kinds that are not supported and for
    places that disagree."""
    blocks = [block for block in map(need.block, BLOCKS) if block.raw]
    scalings = [_scaling(block) for block in blocks]
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


def _scaling(block: Fields) -> RopeScaling | None:
    stated = [block.raw[key] for key in ("rope_type", "type") if block.raw.get(key) is not None]
    kind = stated[0] if stated else "default"
    for name in stated:
        if not isinstance(name, str) or name not in KIND_KEYS or name != kind:
            raise CheckpointError(
                f"{block.source} of type {name!r} is not supported; remove it, and for lengths "
                "beyond the trained one add a dual_chunk_attention_config")
    for key in block.raw:
        if key not in (*KEYS, *KIND_KEYS[kind]):
            raise CheckpointError(f"{block.source}: {key} is not supported")
    if kind == "linear":
        return RopeScaling(kind="linear", factor=block.number("factor"))
    if kind == "llama3":
        return RopeScaling(
            kind="llama3", factor=block.number("factor"),
            low_freq_factor=block.number("low_freq_factor"),
            high_freq_factor=block.number("high_freq_factor"),
            original_max_position_embeddings=block.integer("original_max_position_embeddings"))
    return None
