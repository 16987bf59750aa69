"""The architectures that run, and what their config.json may not ask for. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longspan.errors import CheckpointError
from longspan.fields import Fields

ATTENTION_BIAS, MLP_BIAS = "attention_bias", "mlp_bias"


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Facts of an architecture that its config.json leaves unsaid."""

    qkv_bias: bool = False
    """Bias on the q, k and v projections, and on no other, whatever config.json says."""
    biases: tuple[str, ...] = ()
    """Keys of config.json that put a bias on all projections of a part."""
    reads_qkv_bias: bool = False
    """A false ``qkv_bias`` in config.json takes that one away."""
    qk_norm: bool = False
    """RMSNorm on each query and key head."""
    head_dim: int | None = None
    """Where config.json names none; None: the model dim over the heads."""
    sliding_window: int | None = None
    """Where config.json has no such key, tokens; None: every token is seen."""
    has_experts: bool = False
    """Routed experts (`longspan.expert_config`)."""
    has_shared_expert: bool = False
    """One expert besides that every token takes."""
    has_window_switch: bool = False
    """A ``sliding_window`` counts only beside a true ``use_sliding_window``."""


FAMILIES = {
    "Qwen2ForCausalLM": Family(qkv_bias=True, has_window_switch=True),
    "Qwen3ForCausalLM": Family(qk_norm=True, head_dim=128, has_window_switch=True,
                               biases=(ATTENTION_BIAS,)),
    "LlamaForCausalLM": Family(biases=(ATTENTION_BIAS, MLP_BIAS)),
    "MistralForCausalLM": Family(sliding_window=4096),
    "Qwen2MoeForCausalLM": Family(qkv_bias=True, reads_qkv_bias=True, has_window_switch=True,
                                  has_experts=True, has_shared_expert=True),
    "Qwen3MoeForCausalLM": Family(qk_norm=True, has_window_switch=True, has_experts=True,
                                  biases=(ATTENTION_BIAS,)),
}
"""By class name in config.json. `longspan.model.MODELS` has the class of each."""


def find_architecture(raw: Mapping[str, Any], source: str) -> str:
    """Return the first architecture that is known. Raises `CheckpointError` without one."""
    names = raw.get("architectures") or []
    if not isinstance(names, list):
        raise CheckpointError(f"{source}: architectures is {names!r}, a list of names is needed")
    for name in names:
        if name in FAMILIES:
            return str(name)
    raise CheckpointError(
        f"{source}: architecture {', '.join(map(str, names)) or 'missing'} is not supported; "
        f"supported: {', '.join(FAMILIES)}"
    )


def refuse_unsupported(need: Fields, architecture: str) -> None:
    """Raise `CheckpointError` for what config.json asks for and the models here do not do."""
    raw, source = need.raw, need.source
    kinds = raw.get("layer_types") or []
    if not isinstance(kinds, list):
        raise need.wrong("layer_types", "a list of names")
    others = [kind for kind in kinds if kind != "full_attention"]
    if need.boolean("use_sliding_window") or "sliding_attention" in others:
        raise CheckpointError(f"{source}: sliding window attention is not supported")
    family = FAMILIES[architecture]
    _refuse_window(need, family)
    if others:
        raise CheckpointError(f"{source}: layer_types names {others[0]!r}, which is not supported")
    for key in (ATTENTION_BIAS, MLP_BIAS):
        is_known = key in family.biases or family.qkv_bias and key == ATTENTION_BIAS
        if need.boolean(key) and not is_known:
            raise CheckpointError(f"{source}: {key} is true, not supported for {architecture}")
    if need.number("partial_rotary_factor", 1.0) != 1.0:
        raise need.wrong("partial_rotary_factor", "1")
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(f"{source}: hidden_act {activation!r} is not supported, only silu")


def _refuse_window(need: Fields, family: Family) -> None:
    """Refuse a window that the architecture applies without being told so by another key."""
    window = need.raw.get("sliding_window", family.sliding_window)
    if family.has_window_switch or window is None:
        return
    stated = "is" if "sliding_window" in need.raw else "is not there, which means"
    raise CheckpointError(
        f"{need.source}: sliding_window {stated} {window!r}, and sliding window attention is not "
        "supported; write null if the checkpoint was trained without one")
