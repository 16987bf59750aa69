"""Decoder models and their weights: ``build_model``, then ``load_weights``."""

from __future__ import annotations

import torch

from longspan.attention.sparsity import SparsityPlan
from longspan.config import ModelConfig
from longspan.model.qwen2 import CausalLM
from longspan.model.tensor_share import WHOLE, ModelPart
from longspan.model.weights import load_weights, random_weights, resolve_checkpoint
from longspan.ops.types import QueryRotary
from longspan.units import DTYPE_BYTES
from longspan.weight_form import PLAIN_FORMS, WeightForms

__all__ = ["MODELS", "TORCH_DTYPES", "CausalLM", "build_model", "load_weights", "random_weights",
           "resolve_checkpoint"]

MODELS: dict[str, type[CausalLM]] = dict.fromkeys(
    ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM",
     "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"), CausalLM)
"""Class of each architecture in `longspan.families.FAMILIES`."""
TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_BYTES}


def build_model(
    config: ModelConfig, *, layers: range, rotary: QueryRotary, plan: SparsityPlan | None,
    dtype: torch.dtype, device: torch.device | str, forms: WeightForms = PLAIN_FORMS,
    part: ModelPart = WHOLE,
) -> CausalLM:
    """Allocate a pipeline stage; its weights are not yet filled.

    Args:
        layers: the stage's layers, ``range(config.num_layers)`` for the whole model.
        rotary: rotation tables, already on `device`.
        plan: budgets for sparse prefill; None: dense.
        forms: what the layers' matrices are held in.
        part: what this process has of those layers.
    """
    model = MODELS[config.architecture](
        config, layers=layers, rotary=rotary, plan=plan, dtype=dtype, device=device,
        forms=forms, part=part)
    return model.eval()
