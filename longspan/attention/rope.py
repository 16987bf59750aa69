"""RoPE tables and the YaRN attention temperature.

Sources: RoFormer (RoPE); transformers `modeling_rope_utils.py` (scaled frequencies); YaRN eq. 21-22
for the temperature; the report's section 5.1 uses only the temperature of YaRN, never its frequency
interpolation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longspan.config import DcaConfig
from longspan.ops.types import QueryRotary
from longspan.rope_config import RopeScaling


def inverse_frequencies(
    head_dim: int, rope_theta: float, scaling: RopeScaling | None = None
) -> Tensor:
    """Compute theta^(-2i/D) for i in 0..D/2-1, scaled, as transformers computes it. Returns [D/2]
    fp32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / (rope_theta**exponents)
    if scaling is None or scaling.kind == "dynamic":
        return plain
    if scaling.kind == "yarn":
        return _yarn_frequencies(plain, head_dim, rope_theta, scaling)
    divided = plain / scaling.factor
    if scaling.kind == "linear":
        return divided
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings / (2 * math.pi / plain)
    share = (turns - low) / (high - low)  # of the plain frequency, between the two borders
    between = (1 - share) * plain / scaling.factor + share * plain
    return torch.where(turns < low, divided, torch.where(turns > high, plain, between))


def _yarn_frequencies(
    plain: Tensor, head_dim: int, rope_theta: float, scaling: RopeScaling
) -> Tensor:
    """Divide the slow frequencies (YaRN, "NTK-by-parts"). plain: [D/2]; returns the same."""
    trained = scaling.original_max_position_embeddings

    def border(turns: float) -> float:
        """Dimension, as a fraction, whose frequency turns so often over the trained length."""
        return (head_dim * math.log(trained / (turns * 2 * math.pi))) / (2 * math.log(rope_theta))

    low, high = border(scaling.beta_fast), border(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # no division by zero
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)
    kept = 1 - ramp.clamp(0, 1)  # share of the plain frequency
    powers = rope_theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    return 1.0 / (scaling.factor * powers) * (1 - kept) + plain * kept


def build_rotary(
    *, head_dim: int, rope_theta: float, max_model_len: int, dca: DcaConfig | None,
    scaling: RopeScaling | None = None, device: torch.device | str = "cpu",
) -> QueryRotary:
    """Build the rotation tables for contexts up to ``max_model_len``.

    Without a DCA config the stride is ``max_model_len``, so that every pair lies in the intra
    zone: plain RoPE. Memory: R * D * 4 bytes, R = min(max_model_len, chunk_size + 1).
    """
    stride = dca.dca_chunk_len if dca else max_model_len
    clamp = dca.chunk_size if dca else max_model_len
    num_rows = min(max_model_len, clamp + 1)
    inv_freq = inverse_frequencies(head_dim, rope_theta, scaling)
    angles = torch.outer(torch.arange(num_rows, dtype=torch.float32), inv_freq)
    return QueryRotary(
        cos=angles.cos().to(device), sin=angles.sin().to(device), inv_freq=inv_freq.to(device),
        stride=stride, clamp=clamp,
    )


def yarn_temperature(length: int, trained_len: int) -> float:
    """Compute m = max(1, 0.1 ln(length / trained_len) + 1); logits are multiplied by m^2.

    ``trained_len`` 0 means no temperature (released configs without the key).
    """
    if trained_len <= 0 or length <= trained_len:
        return 1.0
    return 0.1 * math.log(length / trained_len) + 1.0
