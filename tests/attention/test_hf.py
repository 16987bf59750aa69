"""Our attention under transformers: equal to eager below one DCA chunk, to the engine's layer and
to a pair-by-pair computation above it."""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan.attention.cache import allocate_cache
from longspan.attention.hf import register, unrotate
from longspan.attention.metadata import SequenceSlice, build_metadata
from longspan.attention.rope import build_rotary, inverse_frequencies, yarn_temperature
from longspan.attention.sparsity import SparsityPlan
from longspan.config import DcaConfig, ModelConfig
from longspan.errors import InvalidRequestError, LongspanError, MissingDependencyError
from longspan.model import build_model, load_weights
from longspan.rope_config import RopeScaling

MAX_DIFFERENCE = 1e-4
DCA = DcaConfig(chunk_size=48, local_size=16)  # DCA chunks of 32 tokens
YARN = replace(DCA, original_max_position_embeddings=48)
RELEASED = [pytest.param(DcaConfig(chunk_size=chunk, local_size=local,
                                   original_max_position_embeddings=chunk), id=str(chunk - local))
            for chunk, local in ((262_144, 8_192), (131_072, 4_096))]
"""What million-token checkpoints have, by their stride."""
VOCAB_SIZE = 61


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random Qwen2 model on disk; 4 query heads, 2 KV heads."""
    return save_random(tmp_path_factory.mktemp("qwen2"), "Qwen2")


def save_random(path, family: str, **facts: Any):
    """Random transformers weights, large enough that attention is not flat. Returns ``path``."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{
        "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 2_000.0}, **facts})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    model.save_pretrained(path)
    return path


def hf_model(checkpoint, implementation: str, dtype: torch.dtype = torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        checkpoint, attn_implementation=implementation, dtype=dtype).eval()


def token_ids(count: int, batch: int = 1) -> Tensor:
    return torch.randint(VOCAB_SIZE, (batch, count), generator=torch.Generator().manual_seed(1))


def config_of(checkpoint, dca: DcaConfig | None) -> ModelConfig:
    return replace(ModelConfig.from_dir(checkpoint), dca=dca)


@torch.no_grad()
def logits_of(model, ids: Tensor, lens: list[int] | None = None) -> Tensor:
    """Logits [B, T, V], in one pass or in pieces over transformers' own cache."""
    from transformers import DynamicCache

    if lens is None:
        return model(ids).logits
    names = inspect.signature(type(model).forward).parameters
    # transformers up to 5.23 calls it by another name
    cache = {"cache" if "cache" in names else "past_key_values": DynamicCache(config=model.config)}
    return torch.cat([
        model(piece, **cache, use_cache=True).logits
        for piece in ids.split(lens, dim=1)], 1)


def engine_logits(checkpoint, config: ModelConfig, ids: Tensor, plan=None) -> Tensor:
    """The same through our own model and paged cache, whole prompt at once."""
    num_tokens = ids.shape[1]
    rotary = build_rotary(head_dim=config.head_dim, rope_theta=config.rope_theta,
                          max_model_len=512, dca=config.dca)
    kind: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    model = build_model(
        config, layers=range(config.num_layers), rotary=rotary, plan=plan, **kind)
    load_weights(model, checkpoint)
    caches = [allocate_cache(num_blocks=8, block_size=128, num_kv_heads=config.num_kv_heads,
                             head_dim=config.head_dim, means=plan is not None, **kind)
              for _ in model.layers]
    part = SequenceSlice(query_len=num_tokens, cached_len=0, prompt_len=num_tokens,
                         block_ids=range(8), sparse=plan is not None)
    metadata = build_metadata(
        [part], block_size=128, head_dim=config.head_dim, dca=config.dca, device="cpu")
    return model.logits(model(ids[0], metadata, caches))[None]


@pytest.mark.parametrize("lens", [None, [20, 1, 1, 8]], ids=["one-pass", "pieces"])
@pytest.mark.parametrize("batch", [1, 3])
def test_plain_rope_equals_eager(checkpoint, batch, lens):
    ids = token_ids(200 if lens is None else 30, batch)
    name = register(config_of(checkpoint, None))
    expected = logits_of(hf_model(checkpoint, "eager"), ids)
    assert expected.std() > 0.5
    ours = logits_of(hf_model(checkpoint, name), ids, lens)
    assert (ours - expected).abs().max() <= MAX_DIFFERENCE


def test_yarn_equals_eager(tmp_path):
    """transformers has its factor in the rotated queries and keys."""
    path = save_random(tmp_path, "Qwen3", head_dim=16, rope_parameters={
        "rope_type": "yarn", "rope_theta": 2_000.0, "factor": 4.0,
        "original_max_position_embeddings": 128})
    ids = token_ids(200)
    ours = logits_of(hf_model(path, register(config_of(path, None))), ids)
    assert (ours - logits_of(hf_model(path, "eager"), ids)).abs().max() <= MAX_DIFFERENCE


def test_dca_equals_eager_up_to_one_dca_chunk(checkpoint):
    ids = token_ids(33)
    name = register(config_of(checkpoint, DCA))
    ours = logits_of(hf_model(checkpoint, name), ids)
    expected = logits_of(hf_model(checkpoint, "eager"), ids)
    assert (ours - expected)[:, :32].abs().max() <= MAX_DIFFERENCE
    # token 33 sees its past through the succ zone; with position 32 nothing is clamped yet
    assert (ours - expected).abs().max() <= MAX_DIFFERENCE


@pytest.mark.parametrize("dca", [DCA, YARN], ids=["dca", "dca+yarn"])
def test_long_context_equals_the_engine(checkpoint, dca):
    ids = token_ids(150)
    config = config_of(checkpoint, dca)
    ours = logits_of(hf_model(checkpoint, register(config)), ids)
    assert (ours - engine_logits(checkpoint, config, ids)).abs().max() <= MAX_DIFFERENCE
    plain = logits_of(hf_model(checkpoint, "eager"), ids)
    assert (ours - plain).abs().max() > 0.1  # the DCA zones do matter here


def test_pieces_and_decode_equal_one_pass(checkpoint):
    ids = token_ids(150)
    model = hf_model(checkpoint, register(config_of(checkpoint, DCA)))
    pieces = logits_of(model, ids, [70, 1, 31, 45, 1, 1, 1])
    assert (pieces - logits_of(model, ids)).abs().max() <= MAX_DIFFERENCE


def pair_by_pair(q: Tensor, k: Tensor, v: Tensor, config: ModelConfig) -> Tensor:
    """DCA from its definition, one relative distance for each (query, key) pair.

    q: [T, H, D], the last of S rows, k, v: [S, K, D], not rotated. Rotations cancel to one at the
    distance.
    """
    dca, num_tokens = config.dca, k.shape[0]
    stride, clamp = dca.chunk_size - dca.local_size, dca.chunk_size
    i, j = torch.arange(num_tokens)[-len(q):, None], torch.arange(num_tokens)[None, :]
    gap = i // stride - j // stride
    query = torch.where(gap == 0, i % stride, torch.where(
        gap == 1, (i % stride + stride).clamp(max=clamp), min(2 * stride - 1, clamp)))
    angles = (query - j % stride)[..., None] * inverse_frequencies(
        config.head_dim, config.rope_theta, config.rope_scaling).double()
    pairs = torch.view_as_complex(torch.stack(q.double().chunk(2, -1), -1).contiguous())
    keys = torch.view_as_complex(torch.stack(k.double().chunk(2, -1), -1).contiguous())
    keys = keys.repeat_interleave(q.shape[1] // k.shape[1], 1)
    turned = torch.polar(torch.ones_like(angles), angles)
    scores = torch.einsum("thd,shd,tsd->hts", pairs, keys.conj(), turned).real
    temperature = yarn_temperature(num_tokens, dca.original_max_position_embeddings)
    scores = scores * temperature**2 / config.head_dim**0.5
    weights = scores.masked_fill(j > i, float("-inf")).softmax(-1)
    return torch.einsum("hts,shd->thd", weights,
                        v.double().repeat_interleave(q.shape[1] // v.shape[1], 1))


@pytest.mark.parametrize("dca", [DCA, YARN, DcaConfig(chunk_size=30, local_size=5)],
                         ids=["dca", "dca+yarn", "clamp-2s"])
@pytest.mark.parametrize("scaling", [None, RopeScaling(kind="linear", factor=4.0)],
                         ids=["plain", "linear"])
def test_one_layer_equals_the_definition(checkpoint, dca, scaling):
    from transformers import AttentionInterface

    config = replace(config_of(checkpoint, dca), rope_scaling=scaling)
    attend = AttentionInterface()[register(config, name="longspan_definition")]
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(140, n, 16, generator=generator) for n in (4, 2, 2))
    angles = torch.arange(140)[:, None].float() * inverse_frequencies(
        16, config.rope_theta, scaling)

    out, weights = attend(
        module(), hand_over(q, angles), hand_over(k, angles), v.transpose(0, 1)[None], None)
    assert weights is None and out.shape == (1, 140, 4, 16)
    assert (out[0] - pair_by_pair(q, k, v, config)).abs().max() <= 1e-5


def hand_over(x: Tensor, angles: Tensor) -> Tensor:
    """Rotated at true positions, [1, heads, T, D], as transformers does."""
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).transpose(0, 1)[None]


def module() -> torch.nn.Module:
    """The first layer's."""
    found = torch.nn.Module()
    found.__dict__["layer_idx"] = 0
    return found


@pytest.mark.parametrize("dca", RELEASED)
def test_one_layer_equals_the_definition_behind_released_strides(checkpoint, dca):
    """The last row of the second DCA chunk and the first of the third, after all keys before. With
    this base frequencies are powers of two, so that angles are exact in fp32 at any position."""
    from transformers import AttentionInterface

    config = replace(config_of(checkpoint, dca), num_heads=1, num_kv_heads=1, rope_theta=256.0)
    attend = AttentionInterface()[register(config, name="longspan_released")]
    length = 2 * (dca.chunk_size - dca.local_size) + 1
    generator = torch.Generator().manual_seed(2)
    k, v = (torch.randn(length, 1, 16, generator=generator) for _ in range(2))
    q = 3 * torch.randn(2, 1, 16, generator=generator)
    angles = torch.arange(length)[:, None].float() * inverse_frequencies(16, config.rope_theta)
    out, _ = attend(module(), hand_over(q, angles[-2:]), hand_over(k, angles),
                    v.transpose(0, 1)[None], None)
    expected = pair_by_pair(q, k, v, config)
    assert expected.abs().max() > 0.05
    assert (out[0] - expected).abs().max() <= 1e-5


def test_generate_equals_eager(checkpoint):
    ids = token_ids(25)
    name = register(config_of(checkpoint, None))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    ours = hf_model(checkpoint, name).generate(ids, **options)
    assert torch.equal(ours, hf_model(checkpoint, "eager").generate(ids, **options))


@pytest.mark.parametrize("is_sparse", [False, True])
def test_experts_behind_dca_equal_the_engine(tmp_path, is_sparse):
    """transformers' own router and experts, our attention; and all of it ours."""
    path = save_random(tmp_path, "Qwen3Moe", num_experts=6, num_experts_per_tok=2,
                       moe_intermediate_size=24, head_dim=16)
    config = replace(config_of(path, DcaConfig(chunk_size=160, local_size=32)),
                     sparse_threshold=256)
    plan = replace(SparsityPlan.default(2, 4, vertical=8, slash=128), num_scouts=4,
                   scout_threshold=1.0) if is_sparse else None
    ids = token_ids(400)
    ours = logits_of(hf_model(path, register(config, plan=plan)), ids)
    assert (ours - engine_logits(path, config, ids, plan)).abs().max() <= MAX_DIFFERENCE
    if is_sparse:
        dense = logits_of(hf_model(path, register(config)), ids)
        assert (ours - dense).abs().max() > MAX_DIFFERENCE


def test_sparse_plan_equals_the_engine(checkpoint):
    config = replace(config_of(checkpoint, None), sparse_threshold=256)
    plan = replace(SparsityPlan.default(2, 4, vertical=8, slash=128), num_scouts=4,
                   scout_threshold=1.0)
    ids = token_ids(512)
    model = hf_model(checkpoint, register(config, plan=plan))
    ours = logits_of(model, ids)
    assert (ours - engine_logits(checkpoint, config, ids, plan)).abs().max() <= MAX_DIFFERENCE
    dense = engine_logits(checkpoint, config, ids)
    assert (ours - dense).abs().max() > MAX_DIFFERENCE  # it is sparse
    short = logits_of(model, ids[:, :256])  # at the threshold: dense
    assert (short - dense[:, :256]).abs().max() <= MAX_DIFFERENCE


def test_plan_of_another_model_is_refused(checkpoint):
    with pytest.raises(LongspanError, match="sparsity plan is for 3 layers"):
        register(config_of(checkpoint, DCA), plan=SparsityPlan.default(3, 4))


def test_bfloat16_stays_close(checkpoint):
    ids = token_ids(150)
    name = register(config_of(checkpoint, None))
    narrow = logits_of(hf_model(checkpoint, name, torch.bfloat16), ids).float()
    eager = logits_of(hf_model(checkpoint, "eager", torch.bfloat16), ids).float()
    assert (narrow - eager).norm() / eager.norm() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unrotate_inverts_transformers(dtype):
    inv_freq = inverse_frequencies(16, 10_000.0)
    positions = torch.tensor([0, 1, 77, 4_097, 999_983])
    x = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(3))
    angles = positions[:, None].float() * inv_freq
    cos, sin = (t.to(dtype).float()[:, None] for t in (angles.cos(), angles.sin()))
    a, b = x.chunk(2, -1)
    rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(dtype)
    error = (unrotate(rotated, positions, inv_freq).float() - x).abs().max()
    assert error <= (1e-6 if dtype == torch.float32 else 3e-2)


def test_padding_is_refused(checkpoint):
    model = hf_model(checkpoint, register(config_of(checkpoint, DCA)))
    mask = torch.ones(2, 20, dtype=torch.int64)
    with torch.no_grad():
        model(token_ids(20, 2), attention_mask=mask)
        mask[1, :3] = 0
        with pytest.raises(InvalidRequestError, match="the attention mask has zeros") as caught:
            model(token_ids(20, 2), attention_mask=mask)
    assert "\n" not in str(caught.value)


def test_ready_made_mask_is_refused(checkpoint):
    model = hf_model(checkpoint, register(config_of(checkpoint, DCA)))
    with torch.no_grad(), pytest.raises(InvalidRequestError, match="ready-made attention mask"):
        model(token_ids(8), attention_mask=torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("positions", [torch.arange(5, 25), torch.arange(20) % 10],
                         ids=["shifted", "packed"])
def test_other_positions_are_refused(checkpoint, positions):
    model = hf_model(checkpoint, register(config_of(checkpoint, DCA)))
    with torch.no_grad(), pytest.raises(InvalidRequestError, match="consecutive positions from 0"):
        model(token_ids(20), position_ids=positions[None])


def test_training_is_refused(checkpoint):
    model = hf_model(checkpoint, register(config_of(checkpoint, DCA)))
    with pytest.raises(LongspanError, match=r"use torch\.no_grad"):
        model(token_ids(8))


def test_too_long_for_plain_rope_is_refused(checkpoint):
    model = hf_model(checkpoint, register(config_of(checkpoint, None)))
    with torch.no_grad(), pytest.raises(InvalidRequestError, match="context of 513 tokens"):
        model(token_ids(513))


def test_without_transformers(checkpoint, monkeypatch):
    config = config_of(checkpoint, DCA)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match="pip install transformers"):
        register(config)
