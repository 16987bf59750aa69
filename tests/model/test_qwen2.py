"""Logits equal those of transformers, whatever the prefill chunks and pipeline stages."""

from __future__ import annotations

import itertools
import random
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan.attention.cache import allocate_cache
from longspan.attention.metadata import SequenceSlice, build_metadata
from longspan.attention.rope import build_rotary
from longspan.config import ModelConfig
from longspan.families import FAMILIES
from longspan.model import (
    MODELS,
    TORCH_DTYPES,
    CausalLM,
    build_model,
    layers,
    load_weights,
    random_weights,
)
from longspan.units import DTYPE_BYTES
from longspan.weight_form import PLAIN_FORMS

MAX_DIFFERENCE = 1e-4
BLOCK_SIZE = 16
FP32_CPU: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5_000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 5_000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 5_000.0, "factor": 4.0,
        "original_max_position_embeddings": 64}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 5_000.0, "factor": 2.0}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
           "head_dim": 24}
BIASES = {"attention_bias": True, "mlp_bias": True}
# Each case: family, and what its config.json says beyond the others'.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 24}),  # free of hidden_size
    "llama": ("Llama", {}),
    "llama-biases": ("Llama", BIASES),
    "llama-attention-bias": ("Llama", {"attention_bias": True, "head_dim": 24}),
    "llama-mlp-bias": ("Llama", {"mlp_bias": True}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "linear-rope": ("Llama", {"rope_parameters": LINEAR}),
    "qwen2-linear-rope": ("Qwen2", {"rope_parameters": LINEAR}),
    "yarn-rope": ("Llama", {"rope_parameters": YARN}),
    "qwen3-yarn-rope": ("Qwen3", {"head_dim": 24, "rope_parameters": YARN}),
    "dynamic-rope": ("Llama", {"rope_parameters": DYNAMIC}),
    "qwen3-attention-bias": ("Qwen3", {"head_dim": 24, "attention_bias": True}),
    "qwen2-moe": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 40}),
    "qwen2-moe-no-bias": ("Qwen2Moe", {
        **EXPERTS, "shared_expert_intermediate_size": 16, "qkv_bias": False,
        "norm_topk_prob": True, "decoder_sparse_step": 2}),
    "qwen3-moe": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": True}),
    "qwen3-moe-mixed": ("Qwen3Moe", {
        **EXPERTS, "mlp_only_layers": [0], "num_experts_per_tok": 3, "rope_parameters": YARN}),
    "qwen3-moe-bias": ("Qwen3Moe", {**EXPERTS, "attention_bias": True, "num_experts_per_tok": 6}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 24}),
}

# family, query heads, KV heads, tied embeddings: GQA 7:1, 5:1, 4:1, 1:1 as in Qwen2.5 and Qwen3
SHAPES = [
    pytest.param("qwen2", 7, 1, False, id="qwen2-gqa7-untied"),
    pytest.param("qwen2", 10, 2, True, id="qwen2-gqa5-tied"),
    pytest.param("qwen2", 4, 4, False, id="qwen2-gqa1-untied"),
    pytest.param("qwen3", 8, 2, False, id="qwen3-gqa4-untied"),
    pytest.param("qwen3", 7, 1, True, id="qwen3-gqa7-tied"),
    pytest.param("qwen3", 3, 3, True, id="qwen3-gqa1-tied"),
    pytest.param("llama", 9, 3, True, id="llama-gqa3-tied"),
    pytest.param("llama", 8, 2, False, id="llama-gqa4-untied"),
    pytest.param("llama-biases", 4, 4, False, id="llama-biases-gqa1-untied"),
    pytest.param("llama-attention-bias", 6, 2, True, id="llama-attention-bias-gqa3-tied"),
    pytest.param("llama-mlp-bias", 6, 3, True, id="llama-mlp-bias-gqa2-tied"),
    pytest.param("llama3-rope", 8, 2, False, id="llama3-rope-gqa4-untied"),
    pytest.param("linear-rope", 4, 1, True, id="linear-rope-gqa4-tied"),
    pytest.param("qwen2-linear-rope", 4, 2, False, id="qwen2-linear-rope-gqa2-untied"),
    pytest.param("yarn-rope", 8, 2, False, id="yarn-rope-gqa4-untied"),
    pytest.param("qwen3-yarn-rope", 6, 2, True, id="qwen3-yarn-rope-gqa3-tied"),
    pytest.param("dynamic-rope", 4, 2, True, id="dynamic-rope-gqa2-tied"),
    pytest.param("qwen3-attention-bias", 4, 2, True, id="qwen3-attention-bias-gqa2-tied"),
    pytest.param("qwen2-moe", 4, 4, False, id="qwen2-moe-gqa1-untied"),
    pytest.param("qwen2-moe-no-bias", 6, 2, True, id="qwen2-moe-no-bias-gqa3-tied"),
    pytest.param("qwen3-moe", 8, 2, False, id="qwen3-moe-gqa4-untied"),
    pytest.param("qwen3-moe-mixed", 7, 1, True, id="qwen3-moe-mixed-gqa7-tied"),
    pytest.param("qwen3-moe-bias", 4, 2, False, id="qwen3-moe-bias-gqa2-untied"),
    pytest.param("mistral", 8, 2, False, id="mistral-gqa4-untied"),
]


def save_model(path: Path, family: str, num_heads: int, num_kv_heads: int, tied: bool):
    """A random transformers model with biases and norms that matter, saved to `path`."""
    import transformers

    name, facts = KINDS[family]
    torch.manual_seed(num_heads)
    config = getattr(transformers, f"{name}Config")(**{
        "vocab_size": 101, "hidden_size": 16 * num_heads, "intermediate_size": 72,
        "num_hidden_layers": 3, "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads, "rms_norm_eps": 1e-5, "max_position_embeddings": 256,
        "tie_word_embeddings": tied, "rope_theta": 5_000.0, "attn_implementation": "eager",
        **facts})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(path)
    return model


def load(path: Path, cuts: tuple[int, ...] = ()) -> list[CausalLM]:
    """The checkpoint as pipeline stages cut at the given layers."""
    config = ModelConfig.from_dir(path)
    rotary = build_rotary(
        head_dim=config.head_dim, rope_theta=config.rope_theta,
        scaling=config.rope_scaling, max_model_len=256, dca=None)
    edges = (0, *cuts, config.num_layers)
    stages = []
    for start, stop in itertools.pairwise(edges):
        stage = build_model(
            config, layers=range(start, stop), rotary=rotary, plan=None, **FP32_CPU,
            forms=config.quantization.forms if config.quantization else PLAIN_FORMS)
        load_weights(stage, path)
        stages.append(stage)
    return stages


class Driver:
    """One request through all stages; KV blocks in shuffled order."""

    def __init__(self, stages: list[CausalLM], prompt_len: int, seed: int = 0) -> None:
        self.stages, self.prompt_len, self.cached_len = stages, prompt_len, 0
        config = stages[0].config
        self.head_dim = config.head_dim
        self.block_ids = random.Random(seed).sample(range(20), 16)
        self.caches = [
            [allocate_cache(
                num_blocks=20, block_size=BLOCK_SIZE, num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim, means=False, **FP32_CPU) for _ in stage.layers]
            for stage in stages
        ]

    def step(self, ids: Tensor, num_outputs: int | None = None) -> Tensor:
        """Logits [T, V] of the next T tokens, or of the last `num_outputs` of them."""
        part = SequenceSlice(query_len=len(ids), cached_len=self.cached_len,
                             prompt_len=self.prompt_len, block_ids=self.block_ids,
                             num_outputs=num_outputs)
        metadata = build_metadata(
            [part], block_size=BLOCK_SIZE, head_dim=self.head_dim, dca=None, device="cpu")
        hidden = ids
        for stage, caches in zip(self.stages, self.caches, strict=True):
            hidden = stage(hidden, metadata, caches)
        self.cached_len += len(ids)
        return self.stages[-1].logits(hidden)


def chunk_plan(prompt_len: int, seed: int) -> list[int]:
    """Random prefill chunk lengths, unaligned to KV blocks, some of one token."""
    lens, source = [], random.Random(seed)
    while sum(lens) < prompt_len:
        lens.append(min(source.choice([1, 5, 16, 29, 40]), prompt_len - sum(lens)))
    return lens


def run_planned(stages: list[CausalLM], ids: Tensor, prompt_len: int, seed: int) -> Tensor:
    """Prefill in random chunks, then decode token by token. Returns [T, V]."""
    driver = Driver(stages, prompt_len, seed)
    lens = chunk_plan(prompt_len, seed) + [1] * (len(ids) - prompt_len)
    return torch.cat([driver.step(piece) for piece in ids.split(lens)])


def token_ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(101, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("family", "num_heads", "num_kv_heads", "tied"), SHAPES)
def test_logits_equal_transformers(tmp_path, family, num_heads, num_kv_heads, tied):
    reference = save_model(tmp_path, family, num_heads, num_kv_heads, tied)
    ids = token_ids(107)
    with torch.no_grad():
        expected = reference(ids[None]).logits[0]
    assert expected.std() > 0.5  # a comparison of near-zeros would prove nothing
    stages = load(tmp_path)
    for seed in range(3):
        logits = run_planned(stages, ids, prompt_len=95, seed=seed)
        assert logits.dtype == torch.float32
        assert (logits - expected).abs().max() <= MAX_DIFFERENCE


@pytest.mark.parametrize("cuts", [(1,), (2,), (1, 2)], ids=["1+2", "2+1", "1+1+1"])
@pytest.mark.parametrize(("family", "tied"), [
    ("qwen2", False), ("qwen2", True), ("llama-biases", True)])
def test_pipeline_stages_equal_the_whole_model(tmp_path, cuts, family, tied):
    save_model(tmp_path, family, 4, 2, tied)
    ids = token_ids(61)
    whole = run_planned(load(tmp_path), ids, prompt_len=55, seed=1)
    stages = load(tmp_path, cuts)
    assert torch.equal(run_planned(stages, ids, prompt_len=55, seed=1), whole)
    assert not hasattr(stages[0], "lm_head") and not hasattr(stages[-1], "embed_tokens")


@pytest.mark.parametrize("family", KINDS)
def test_stages_hold_only_their_own_weights(tmp_path, family):
    save_model(tmp_path, family, 4, 2, tied=False)
    whole, *stages = load(tmp_path) + load(tmp_path, (1, 2))
    counts = [sum(p.numel() for p in m.parameters()) for m in (whole, *stages)]
    assert counts[0] == sum(counts[1:]) == whole.config.num_parameters


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_active_parameters_are_those_of_the_layers_matrices(tmp_path, family):
    save_model(tmp_path, family, 4, 2, tied=False)
    (model,) = load(tmp_path)
    matrices = [p.numel() for p in model.layers.parameters() if p.dim() == 2]
    assert sum(matrices) == model.config.num_active_parameters


@pytest.mark.parametrize("family", ["qwen2-moe", "qwen3-moe", "qwen3-moe-mixed"])
def test_active_parameters_are_of_the_chosen_experts(tmp_path, family):
    save_model(tmp_path, family, 4, 2, tied=False)
    (model,) = load(tmp_path)
    experts = model.config.experts
    names = dict(model.layers.named_parameters())
    routed = sum(p.numel() for name, p in names.items() if ".experts." in name)
    matrices = sum(p.numel() for p in names.values() if p.dim() == 2) - routed
    active = matrices + routed * experts.num_chosen // experts.num_experts
    assert active == model.config.num_active_parameters < matrices + routed


@pytest.mark.parametrize("cuts", [(), (1,)], ids=["whole", "stages"])
@pytest.mark.parametrize(("family", "tied"), [
    ("qwen2", False), ("qwen3", False), ("qwen3", True), ("llama-biases", False),
    ("qwen2-moe", False), ("qwen3-moe-mixed", True)])
def test_every_weight_is_filled_from_one_place(tmp_path, family, tied, cuts):
    save_model(tmp_path, family, 4, 2, tied)
    for stage in load(tmp_path, cuts):
        targets = stage.weight_targets()
        for parameter in stage.parameters():
            parameter.zero_()
        for number, target in enumerate(targets.values(), start=1):
            target.fill(torch.full(target.shape, float(number)))
        filled = torch.cat([p.flatten() for p in stage.parameters()])
        sizes = torch.tensor([prod(target.shape) for target in targets.values()])
        assert torch.equal(torch.bincount(filled.long())[1:], sizes) and filled.all()
        assert targets.keys() <= stage.checkpoint_names()


def test_a_pass_in_pieces_pauses_between_them_only(tmp_path):
    """Keys and values, the selection and the parts of the rows, in all layers but the last."""
    save_model(tmp_path, "qwen2", 4, 2, tied=False)
    stages, ids = load(tmp_path), token_ids(40)
    whole = Driver(stages, 40).step(ids, num_outputs=1)
    driver = Driver(stages, 40)
    part = SequenceSlice(query_len=40, cached_len=0, prompt_len=40, num_outputs=1,
                         block_ids=driver.block_ids)
    metadata = build_metadata(
        [part], block_size=BLOCK_SIZE, head_dim=16, dca=None, device="cpu")
    work = stages[0].forward_in_pieces(ids, metadata, driver.caches[0], (0, 16, 32, 40))
    num_pauses = 0
    while True:
        try:
            next(work)
            num_pauses += 1
        except StopIteration as end:
            hidden = end.value
            break
    assert num_pauses + 1 == 2 * (2 + 3) + 1
    assert (stages[0].logits(hidden) - whole).abs().max() <= MAX_DIFFERENCE


def test_every_family_has_a_class_and_every_type_a_size():
    assert MODELS.keys() == FAMILIES.keys()
    assert {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()} == DTYPE_BYTES


def test_tied_embeddings_are_stored_once(tmp_path):
    save_model(tmp_path, "qwen3", 4, 2, tied=True)
    (model,) = load(tmp_path)
    assert model.lm_head is model.embed_tokens
    assert sum(p.numel() for p in model.parameters()) == model.config.num_parameters


def test_packed_requests_do_not_see_each_other(tmp_path):
    save_model(tmp_path, "qwen2", 4, 2, tied=False)
    stages = load(tmp_path)
    first, second = token_ids(37, seed=1), token_ids(23, seed=2)
    alone = [Driver(stages, len(ids)).step(ids) for ids in (first, second)]
    driver = Driver(stages, 0)
    parts = [
        SequenceSlice(query_len=37, cached_len=0, prompt_len=37, block_ids=driver.block_ids[:3]),
        SequenceSlice(query_len=23, cached_len=0, prompt_len=23, block_ids=driver.block_ids[3:5]),
    ]
    metadata = build_metadata(
        parts, block_size=BLOCK_SIZE, head_dim=16, dca=None, device="cpu")
    hidden = stages[0](torch.cat((first, second)), metadata, driver.caches[0])
    assert (stages[0].logits(hidden) - torch.cat(alone)).abs().max() <= MAX_DIFFERENCE


@pytest.mark.parametrize("family", ["qwen2", "qwen2-moe"])
def test_mlp_row_pieces_change_nothing(tmp_path, monkeypatch, family):
    save_model(tmp_path, family, 4, 2, tied=False)
    stages, ids = load(tmp_path), token_ids(50)
    whole = Driver(stages, 50).step(ids)
    monkeypatch.setattr(layers, "MLP_ROWS_CPU", 7)
    assert (Driver(stages, 50).step(ids) - whole).abs().max() <= MAX_DIFFERENCE


@pytest.mark.parametrize("cuts", [(), (2,)], ids=["whole", "2+1"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama-biases", "qwen2-moe"])
def test_last_layer_computes_only_the_wanted_rows(tmp_path, family, cuts):
    save_model(tmp_path, family, 4, 2, tied=False)
    stages, ids = load(tmp_path, cuts), token_ids(53)
    everything = run_planned(stages, ids, prompt_len=50, seed=0)
    driver = Driver(stages, 50)
    assert driver.step(ids[:30], num_outputs=0).shape == (0, 101)  # not the last prefill chunk
    for piece in ids[30:].split([20, 1, 1, 1]):
        logits = driver.step(piece, num_outputs=1)
        assert logits.shape == (1, 101)
        assert (logits - everything[driver.cached_len - 1]).abs().max() <= MAX_DIFFERENCE


def test_attention_stats_count_causal_pairs(tmp_path):
    save_model(tmp_path, "qwen2", 4, 2, tied=False)
    stages = load(tmp_path)
    stages[0].reset_attention_stats()
    Driver(stages, 40).step(token_ids(40))
    kept, causal = stages[0].attention_stats()
    assert kept == causal == 3 * 4 * 40 * 41 / 2  # layers, heads, pairs
    stages[0].reset_attention_stats()
    assert stages[0].attention_stats() == (0.0, 0.0)


def test_bfloat16_stays_close(tmp_path):
    save_model(tmp_path, "qwen2", 4, 2, tied=False)
    ids = token_ids(40)
    (wide,) = load(tmp_path)
    expected = Driver([wide], 40).step(ids)
    model = build_model(
        wide.config, layers=range(3), plan=None, dtype=torch.bfloat16, device="cpu",
        rotary=wide.decoder_layers()[0].self_attn.core.rotary)
    load_weights(model, tmp_path)
    driver = Driver([model], 40)
    driver.caches = [[cache._replace(k=cache.k.bfloat16(), v=cache.v.bfloat16())
                      for cache in driver.caches[0]]]
    logits = driver.step(ids)
    assert logits.dtype == torch.float32
    assert ((logits - expected).norm() / expected.norm()) < 0.03


def test_random_weights_are_reproducible_and_finite(tmp_path):
    save_model(tmp_path, "qwen3", 4, 2, tied=True)
    (model,) = load(tmp_path)
    random_weights(model, seed=7)
    first = Driver([model], 30).step(token_ids(30))
    load_weights(model, tmp_path)
    random_weights(model, seed=7)
    assert torch.equal(Driver([model], 30).step(token_ids(30)), first)
    assert first.isfinite().all() and first.std() > 0
