"""Pure tensor functions. `reference` is the specification; what is exported here is the fastest
path that fits the device, with the same signatures and results.

Today both CPUs and GPUs take the eager paths over PyTorch's fused attention.
"""

from longspan.ops.eager_dense import decode_attention, prefill_attention
from longspan.ops.eager_sparse import sparse_prefill_attention
from longspan.ops.reference import rms_norm, rotate, silu_mul, write_kv
from longspan.ops.select import select_vertical_slash
from longspan.ops.types import PagedKV, QueryRotary, Selection

__all__ = [
    "PagedKV",
    "QueryRotary",
    "Selection",
    "decode_attention",
    "prefill_attention",
    "rms_norm",
    "rotate",
    "select_vertical_slash",
    "silu_mul",
    "sparse_prefill_attention",
    "write_kv",
]
