"""A shape small enough for a CPU, with all zones of Dual Chunk Attention inside 2,048 tokens."""

from __future__ import annotations

from longspan.attention.sparsity import SparsityPlan
from longspan.bench.shapes import Shape, label_plan
from longspan.config import DcaConfig, ModelConfig
from tests.doubles import MODEL


def tiny_shape(**plan: int | bool) -> Shape:
    """Three layers of 4:2 heads of 16."""
    model = ModelConfig(**{
        **MODEL, "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_layers": 3,
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "dca": DcaConfig(chunk_size=640, local_size=128, original_max_position_embeddings=512)})
    budgets = SparsityPlan(
        vertical=((40, 60, 20, 30),) * 3, slash=((256, 384, 256, 128),) * 3, probe_last=16,
        probe_strided=16, num_scouts=16, tail_len=64)
    return Shape(name="tiny", model=model, plan=budgets, plan_label=label_plan(budgets, "test"))
