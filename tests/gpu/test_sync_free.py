"""No step waits for the device: prefill (dense, sparse, mixed with decodes) and decode run while
every synchronising call is an error."""

from __future__ import annotations

from array import array

import pytest
import torch
from torch import Tensor

from longspan.attention.cache import allocate_cache
from longspan.attention.rope import build_rotary
from longspan.attention.sparsity import SparsityPlan
from longspan.config import DcaConfig, ModelConfig
from longspan.engine.device.batch import build_batch
from longspan.engine.step import RowSampling, ScheduledBatch, ScheduledSlice
from longspan.model import CausalLM, build_model, random_weights
from longspan.ops.sampling.sample import sample
from longspan.ops.types import PagedKV
from tests.gpu.syncs import no_syncs

pytestmark = pytest.mark.gpu

BLOCK, NUM_BLOCKS, PROMPT_LEN = 128, 80, 4096
DCA = DcaConfig(chunk_size=1536, local_size=256, original_max_position_embeddings=2048)
MODEL = ModelConfig(
    architecture="Qwen2ForCausalLM", vocab_size=1000, hidden_size=256, intermediate_size=512,
    num_layers=2, num_heads=14, num_kv_heads=2, head_dim=128, rms_norm_eps=1e-6, rope_theta=1e6,
    max_position_embeddings=8192, tie_word_embeddings=False, attention_bias=True, qk_norm=False)
PLAN = SparsityPlan(
    vertical=((64,) * 14,) * 2, slash=((300,) * 14,) * 2, tail_len=256)
GREEDY = RowSampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
WARM = RowSampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=7)


def make_model(plan: SparsityPlan) -> tuple[CausalLM, list[PagedKV]]:
    rotary = build_rotary(head_dim=128, rope_theta=1e6, max_model_len=8192, dca=DCA, device="cuda")
    model = build_model(MODEL, layers=range(2), rotary=rotary, plan=plan, dtype=torch.bfloat16,
                        device="cuda")
    random_weights(model, 0)
    caches = [allocate_cache(num_blocks=NUM_BLOCKS, block_size=BLOCK, num_kv_heads=2, head_dim=128,
                             dtype=torch.bfloat16, device="cuda", means=True) for _ in range(2)]
    return model, caches


def part(
    request: int, cached_len: int, query_len: int, *, sparse: bool,
    sampling: RowSampling | None = None,
) -> ScheduledSlice:
    """Tokens of request 0 or 1, each with half of the blocks."""
    blocks = range(request * NUM_BLOCKS // 2, (request + 1) * NUM_BLOCKS // 2)
    tokens = array("i", [(7 * position) % 1000 for position in range(query_len)])
    return ScheduledSlice(
        request_id=str(request), token_ids=tokens, cached_len=cached_len, prompt_len=PROMPT_LEN,
        block_ids=blocks, sparse=sparse, sampling=sampling, slot=request)


def steps(sparse: bool) -> list[tuple[ScheduledSlice, ...]]:
    """A prompt in odd prefill chunks over DCA borders, a second one beside the first's decodes."""
    return [
        (part(0, 0, 1100, sparse=sparse),),
        (part(0, 1100, 2000, sparse=sparse),),
        (part(0, 3100, 996, sparse=sparse, sampling=WARM),),
        (part(1, 0, 1024, sparse=sparse), part(0, 4096, 1, sparse=False, sampling=WARM)),
        (part(1, 1024, 3072, sparse=sparse, sampling=GREEDY),
         part(0, 4097, 1, sparse=False, sampling=GREEDY)),
        (part(0, 4098, 1, sparse=False, sampling=WARM),
         part(1, 4096, 1, sparse=False, sampling=GREEDY)),
    ]


def run(model: CausalLM, caches: list[PagedKV], slices: tuple[ScheduledSlice, ...]) -> Tensor:
    inputs = build_batch(ScheduledBatch(step_id=0, slices=slices), block_size=BLOCK, head_dim=128,
                         dca=DCA, device="cuda")
    hidden = model(inputs.token_ids, inputs.metadata, caches)
    if not hidden.shape[0]:
        return hidden
    return sample(model.logits(hidden), inputs.sampling, all_greedy=inputs.all_greedy)


@pytest.mark.parametrize("plan", [PLAN, PLAN.paper()], ids=["tile", "paper"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_no_step_waits_for_the_device(sparse: bool, plan: SparsityPlan) -> None:
    with torch.inference_mode():
        model, caches = make_model(plan)
        for slices in steps(sparse):  # compiles what is compiled
            run(model, caches, slices)
        with no_syncs():
            tokens = [run(model, caches, slices) for slices in steps(sparse)]
        assert all(0 <= token < 1000 for row in tokens[2:] if row.ndim == 1
                   for token in row.tolist())
    kept, causal = model.attention_stats()
    assert 0 < kept <= causal and (kept < causal) is sparse
