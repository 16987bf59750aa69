"""What config.json says of Dual Chunk Attention and its sparsity budgets. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longspan.errors import CheckpointError
from longspan.fields import Fields

BLOCK, BUDGETS = "dual_chunk_attention_config", "sparse_attention_config"
TILE = 128
"""DCA chunks that are made here are multiples of it, so that no sparse tile lies in two."""
LOCAL_SHARE = 32
"""The local window is a share of the trained window, as in the released checkpoints: 1/32."""
DCA_REACH = 4
"""Windows that a model with DCA claims: what the released ones do, 262,144 to 1,010,000, and what
the report's table 4 measures without training for it, 32,768 to 131,072."""
OTHER_BUDGETS = {
    "config_groups": "ModelOpt's skip-softmax", "threshold_scale_factor": "ModelOpt's skip-softmax",
    "use_sparse_attention": "MiniMax's block-sparse attention",
    "sparse_topk_blocks": "MiniMax's block-sparse attention",
    "sparse_block_size": "MiniMax's block-sparse attention"}
"""Keys by which other meanings of ``sparse_attention_config`` are known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DcaConfig:
    """Dual Chunk Attention as released checkpoints describe it (`dual_chunk_attention_config`)."""

    chunk_size: int
    """Clamp of relative positions (c in the paper), tokens; not the DCA chunk's length."""
    local_size: int
    """Local window w, tokens."""
    original_max_position_embeddings: int = 0
    """Trained length for the YaRN attention temperature, tokens; 0 means no temperature."""

    def __post_init__(self) -> None:
        if not 0 < self.local_size < self.chunk_size:
            raise CheckpointError(
                f"dual_chunk_attention_config: local_size {self.local_size} must be between 1 and "
                f"chunk_size - 1 = {self.chunk_size - 1}; correct config.json"
            )

    @property
    def dca_chunk_len(self) -> int:
        """Length s of one DCA chunk, tokens: chunk_size - local_size."""
        return self.chunk_size - self.local_size


def derive_dca(window: int) -> DcaConfig:
    """Make DCA for weights that were trained on ``window`` tokens with plain RoPE: no position
    beyond the window, and a local window of 1/32 of it, or a little more."""
    stride = window - max(1, window // LOCAL_SHARE)
    stride = stride // TILE * TILE or stride
    return DcaConfig(chunk_size=window, local_size=window - stride,
                     original_max_position_embeddings=window)


def read_dca(need: Fields) -> DcaConfig | None:
    """Read the block ``dual_chunk_attention_config``; None where it is empty or absent."""
    if not need.raw:
        return None
    return DcaConfig(
        chunk_size=need.integer("chunk_size", 8192),
        local_size=need.integer("local_size", 1024),
        original_max_position_embeddings=int(need.number("original_max_position_embeddings", 0)),
    )


def read_budgets(need: Fields, dca: Fields, num_layers: int) -> tuple[dict[str, Any], ...] | None:
    """Read released per-head budgets, in the DCA block or beside it; None: there are none.

    Raises `CheckpointError` for those of another model, and for what others mean by the name.
    """
    of_dca = None if dca.raw.get("sparse_attention_enabled") is False else dca.raw.get(BUDGETS)
    stated = of_dca or need.raw.get(BUDGETS)
    if not stated:
        return None
    if not isinstance(stated, list) or not all(isinstance(layer, dict) for layer in stated):
        raise CheckpointError(f"{need.source}: {BUDGETS} {_meaning(stated)}")
    if len(stated) != num_layers:
        raise CheckpointError(f"{need.source}: {BUDGETS} is for {len(stated)} layers, "
                              f"the model has {num_layers}; they do not belong together")
    return tuple(stated)


def _meaning(stated: object) -> str:
    """Say what a value under the name is, if it is not ours."""
    if isinstance(stated, Mapping):
        known = next((OTHER_BUDGETS[key] for key in stated if key in OTHER_BUDGETS), None)
        if known is not None:
            return (f"describes {known}, which is not supported; remove it to run the checkpoint "
                    "densely, or with longspan's own sparse prefill")
    return "must be a list of objects, one a layer"
