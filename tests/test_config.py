"""config.json of the released checkpoints, every sparse-config variant, and what is refused."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from longspan.config import DcaConfig, EngineConfig, ModelConfig
from longspan.errors import CheckpointError, LongspanError
from longspan.expert_config import ExpertConfig
from longspan.rope_config import RopeScaling

RELEASED_DCA = {
    "chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
QWEN2_5_7B_1M = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "dual_chunk_attention_config": RELEASED_DCA, "eos_token_id": 151645, "hidden_act": "silu",
    "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
    "max_position_embeddings": 1010000, "model_type": "qwen2", "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 10000000.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN2_5_14B_1M = QWEN2_5_7B_1M | {
    "hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40,
    "num_hidden_layers": 48, "num_key_value_heads": 8,
}
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 12288,
    "max_position_embeddings": 40960, "model_type": "qwen3", "num_attention_heads": 32,
    "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
}
# The first entries of the released file for the 7B model (Qwen2.5-7B-Instruct-1M, layer 0).
BUDGETS_LAYER = {
    "0": ["vertical_and_slash", 9192, 14288, 0.6920984983444214],
    "1": ["vertical_and_slash", 1000, 6096, 0.9862403869628906],
    "6": ["vertical_and_slash", 30, 800, None],
}
RELEASED_FILES = Path(__file__).resolve().parents[2] / "shared" / "data"


def small(**changes: Any) -> dict[str, Any]:
    """A 2-layer Qwen2 config with a DCA block."""
    raw = copy.deepcopy(QWEN2_5_7B_1M) | {"num_hidden_layers": 2}
    return raw | changes


def small_dca(**changes: Any) -> dict[str, Any]:
    return small(dual_chunk_attention_config=RELEASED_DCA | changes)


def write(path: Path, raw: Any, sparse: Any = None) -> Path:
    (path / "config.json").write_text(json.dumps(raw))
    if sparse is not None:
        (path / "sparse_attention_config.json").write_text(json.dumps(sparse))
    return path


def test_qwen2_5_7b_1m_by_name():
    config = ModelConfig.from_hf(QWEN2_5_7B_1M)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (28, 28, 4)
    assert (config.hidden_size, config.intermediate_size, config.head_dim) == (3584, 18944, 128)
    assert (config.rope_theta, config.rms_norm_eps) == (1e7, 1e-5)
    assert (config.vocab_size, config.max_position_embeddings) == (152064, 1_010_000)
    assert config.attention_bias and not config.qk_norm and not config.tie_word_embeddings
    assert config.sparse_budgets is None
    assert config.dca is not None and config.dca.dca_chunk_len == 253_952
    assert config.dca.original_max_position_embeddings == 262_144
    assert (config.sparse_threshold, config.sparse_probe_len) == (32_768, 64)


@pytest.mark.parametrize(("raw", "billions", "non_embedding", "kv_bytes"), [
    pytest.param(QWEN2_5_7B_1M, 7.61, 6.53, 57_344, id="7b"),
    pytest.param(QWEN2_5_14B_1M, 14.77, 13.2, 196_608, id="14b"),
])
def test_sizes_agree_with_the_model_cards(raw, billions, non_embedding, kv_bytes):
    config = ModelConfig.from_hf(raw)
    embeddings = 2 * config.vocab_size * config.hidden_size
    assert config.num_parameters / 1e9 == pytest.approx(billions, abs=0.01)
    assert (config.num_parameters - embeddings) / 1e9 == pytest.approx(non_embedding, abs=0.02)
    assert 2 * config.kv_elements_per_token == kv_bytes


def test_qwen3_with_an_inlined_sparse_config():
    """The form of config_1m.json in the Qwen3-2507 checkpoints."""
    block = RELEASED_DCA | {
        "sparse_attention_enabled": True, "sparse_attention_threshold": 65_536,
        "sparse_attention_last_q": 128, "sparse_attention_config": [BUDGETS_LAYER] * 36}
    config = ModelConfig.from_hf(QWEN3_8B | {
        "max_position_embeddings": 1_010_000, "dual_chunk_attention_config": block})
    assert config.qk_norm and not config.attention_bias and config.head_dim == 128
    assert config.sparse_budgets == (BUDGETS_LAYER,) * 36
    assert (config.sparse_threshold, config.sparse_probe_len) == (65_536, 128)


def test_qwen3_head_dim_does_not_follow_the_model_dim():
    raw = {key: value for key, value in QWEN3_8B.items() if key != "head_dim"}
    assert ModelConfig.from_hf(raw | {"hidden_size": 2560}).head_dim == 128


def test_plain_checkpoint_has_no_dca():
    raw = {key: value for key, value in small().items() if key != "dual_chunk_attention_config"}
    for block in ({}, {"dual_chunk_attention_config": None}, {"dual_chunk_attention_config": {}}):
        assert ModelConfig.from_hf(raw | block).dca is None


@pytest.mark.parametrize(("rope", "theta"), [
    ({"rope_theta": 5e5}, 5e5),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
    ({"rope_theta": None, "rope_parameters": {"rope_theta": 5e5}}, 5e5),
    ({}, 1e4),
], ids=["transformers-4", "transformers-5", "both-keys", "absent"])
def test_rope_theta_in_both_places(rope, theta):
    raw = {key: value for key, value in small().items() if key != "rope_theta"}
    assert ModelConfig.from_hf(raw | rope).rope_theta == theta


def test_budgets_in_their_own_file(tmp_path):
    budgets = [BUDGETS_LAYER, {"0": ["vertical_and_slash", 1000, 6096, 0.9]}]
    config = ModelConfig.from_dir(write(tmp_path, small(), budgets))
    assert config.sparse_budgets == tuple(budgets)


def test_inlined_budgets_win_over_the_file(tmp_path):
    inlined = [BUDGETS_LAYER] * 2
    raw = small_dca(sparse_attention_config=inlined)
    config = ModelConfig.from_dir(write(tmp_path, raw, [{}, {}]))
    assert config.sparse_budgets == tuple(inlined)


def test_sparse_attention_enabled_false(tmp_path):
    raw = small_dca(sparse_attention_enabled=False)
    assert ModelConfig.from_dir(write(tmp_path, raw, [BUDGETS_LAYER] * 2)).sparse_budgets is None


@pytest.mark.parametrize("enabled", [{}, {"sparse_attention_enabled": True}], ids=["", "true"])
def test_enabled_without_budgets(tmp_path, enabled):
    assert ModelConfig.from_dir(write(tmp_path, small_dca(**enabled))).sparse_budgets is None


def test_budgets_without_dca_are_not_read(tmp_path):
    """The engines read the file only for dual chunk checkpoints."""
    raw = small(dual_chunk_attention_config=None)
    assert ModelConfig.from_dir(write(tmp_path, raw, [BUDGETS_LAYER] * 2)).sparse_budgets is None


LONG_DCA = {"chunk_size": 131_072, "local_size": 4_096, "original_max_position_embeddings": 131_072}


def write_long(path, **changes):
    """Qwen3-2507: config.json claims 262,144 tokens, config_1m.json a million, with DCA."""
    write(path, QWEN3_30B)
    (path / "config_1m.json").write_text(json.dumps(
        QWEN3_30B | {"max_position_embeddings": 1_010_000, "dual_chunk_attention_config": LONG_DCA}
        | changes))
    return path


def test_the_config_of_a_million_is_read_when_it_is_wanted(tmp_path):
    path = write_long(tmp_path)
    for wanted in (None, 262_144):
        config = ModelConfig.from_dir(path, wanted_len=wanted)
        assert config.dca is None and config.max_position_embeddings == 262_144
    for options in ({"wanted_len": 262_145}, {"wants_dca": True}):
        config = ModelConfig.from_dir(path, **options)
        assert config.max_position_embeddings == 1_010_000
        assert config.dca == DcaConfig(**LONG_DCA) and config.dca.dca_chunk_len == 126_976
    (path / "config_1m.json").unlink()
    assert ModelConfig.from_dir(path, wanted_len=500_000).dca is None


@pytest.mark.parametrize(("changes", "name"), [
    ({"num_experts": 64}, "experts"), ({"num_hidden_layers": 36}, "num_layers"),
    ({"rope_theta": 5e6}, "rope_theta")])
def test_the_config_of_another_model_is_refused(tmp_path, changes, name):
    path = write_long(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=f"config_1m.json: another {name} than in config"):
        ModelConfig.from_dir(path, wanted_len=500_000)


@pytest.mark.parametrize(("stated", "what"), [
    ({"config_groups": {}, "threshold_scale_factor": 1.0}, "ModelOpt's skip-softmax"),
    ({"use_sparse_attention": True, "sparse_topk_blocks": 16, "sparse_block_size": 128},
     "MiniMax's block-sparse attention"),
    ({"x": 1}, "must be a list of objects"), ("on", "must be a list of objects")])
@pytest.mark.parametrize("is_inner", [False, True])
def test_other_meanings_of_sparse_attention_config(stated, what, is_inner):
    raw = small_dca(sparse_attention_config=stated) if is_inner else small(
        sparse_attention_config=stated)
    with pytest.raises(CheckpointError, match=f"config.json: sparse_attention_config .*{what}"):
        ModelConfig.from_hf(raw)


def test_budgets_are_known_by_their_shape_where_they_stand():
    budgets = [BUDGETS_LAYER] * 2
    for raw in (small_dca(sparse_attention_config=budgets), small(sparse_attention_config=budgets)):
        assert ModelConfig.from_hf(raw).sparse_budgets == tuple(budgets)
    assert ModelConfig.from_hf(small(sparse_attention_config={})).sparse_budgets is None


def test_missing_dca_keys_take_the_engines_defaults():
    dca = ModelConfig.from_hf(small(dual_chunk_attention_config={"chunk_size": 65_536})).dca
    assert dca is not None
    assert (dca.chunk_size, dca.local_size, dca.original_max_position_embeddings) == (
        65_536, 1024, 0)
    defaults = ModelConfig.from_hf(
        small_dca(sparse_attention_threshold=None, sparse_attention_last_q=None))
    assert (defaults.sparse_threshold, defaults.sparse_probe_len) == (32_768, 64)


def test_threshold_zero_means_always():
    assert ModelConfig.from_hf(small_dca(sparse_attention_threshold=0)).sparse_threshold == 0


@pytest.mark.parametrize(("name", "raw"), [("7b", QWEN2_5_7B_1M), ("14b", QWEN2_5_14B_1M)])
def test_released_budget_files(tmp_path, name, raw):
    """The whole released files where they are at hand, a file of their form elsewhere."""
    released = RELEASED_FILES / f"qwen2.5-{name}-instruct-1m.sparsity.json"
    layers, heads = raw["num_hidden_layers"], raw["num_attention_heads"]
    entry = ["vertical_and_slash", 1000, 6096, 0.98]
    budgets = [{str(head): entry for head in range(heads)}] * layers
    if released.is_file():
        budgets = json.loads(released.read_text())
    config = ModelConfig.from_dir(write(tmp_path, raw, budgets))
    assert config.sparse_budgets is not None and len(config.sparse_budgets) == layers
    assert all(set(layer) == set(map(str, range(heads))) for layer in config.sparse_budgets)


@pytest.mark.parametrize("dca", [RELEASED_DCA, None], ids=["dca", "plain"])
@pytest.mark.parametrize("kind", ["longrope", "proportional", "mrope"])
@pytest.mark.parametrize(("block", "key"), [
    ("rope_scaling", "type"), ("rope_scaling", "rope_type"), ("rope_parameters", "rope_type")])
def test_scaled_rope_is_refused(dca, kind, block, key):
    """Beside DCA too: some engines ignore it there, transformers does not."""
    raw = small(dual_chunk_attention_config=dca) | {block: {key: kind, "factor": 4.0}}
    with pytest.raises(CheckpointError, match=f"{block} of type '{kind}' is not supported; remove"):
        ModelConfig.from_hf(raw)


LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}
LLAMA3_1_8B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {**LLAMA3_ROPE, "rope_type": "llama3"}, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 128256,
}
MISTRAL_NEMO = {
    "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 14336,
    "max_position_embeddings": 131072, "model_type": "mistral", "num_attention_heads": 32,
    "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
    "vocab_size": 131072,
}


@pytest.mark.parametrize(("raw", "billions"), [(LLAMA3_1_8B, 8.03), (MISTRAL_NEMO, 12.25)])
def test_llama_shapes(raw, billions):
    config = ModelConfig.from_hf(raw)
    assert config.num_parameters / 1e9 == pytest.approx(billions, abs=0.01)
    assert (config.head_dim, config.num_kv_heads) == (128, 8)
    assert not (config.attention_bias or config.output_bias or config.mlp_bias or config.qk_norm)


@pytest.mark.parametrize("dca", [RELEASED_DCA, None], ids=["dca", "plain"])
@pytest.mark.parametrize(("block", "key"), [
    ("rope_scaling", "type"), ("rope_scaling", "rope_type"), ("rope_parameters", "rope_type")])
@pytest.mark.parametrize(("kind", "values", "expected"), [
    ("linear", {"factor": 4}, RopeScaling(kind="linear", factor=4.0)),
    ("llama3", LLAMA3_ROPE, RopeScaling(kind="llama3", factor=8.0)),
    ("llama3", LLAMA3_ROPE | {"factor": 32.0, "low_freq_factor": 2, "high_freq_factor": 9,
                              "original_max_position_embeddings": 4096},
     RopeScaling(kind="llama3", factor=32.0, low_freq_factor=2.0, high_freq_factor=9.0,
                 original_max_position_embeddings=4096)),
    ("default", {}, None),
])
def test_scaled_rope_is_read(dca, block, key, kind, values, expected):
    """In every spelling, and as well beside DCA, whose positions turn by the same frequencies."""
    raw = LLAMA3_1_8B | {"rope_scaling": None, "dual_chunk_attention_config": dca}
    config = ModelConfig.from_hf(raw | {block: {key: kind, **values}})
    assert config.rope_scaling == expected and config.rope_theta == 5e5


YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
PLAIN = small(dual_chunk_attention_config=None)
M4 = 0.1 * math.log(4.0) + 1.0


@pytest.mark.parametrize(("block", "key"), [
    ("rope_scaling", "type"), ("rope_scaling", "rope_type"), ("rope_parameters", "rope_type")])
@pytest.mark.parametrize(("values", "attention_factor"), [
    (YARN, M4),
    (YARN | {"attention_factor": 1.3, "beta_fast": 32, "beta_slow": 1.0, "finetuned": True}, 1.3),
    (YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
    (YARN | {"mscale": 2.0, "attention_factor": None}, M4),
    (YARN | {"truncate": False}, M4)])
def test_yarn_is_read(block, key, values, attention_factor):
    """As transformers does, and to the length that it reaches, also where the claim is shorter."""
    config = ModelConfig.from_hf(PLAIN | {block: {key: "yarn", **values}})
    assert config.rope_scaling == RopeScaling(
        kind="yarn", factor=4.0, original_max_position_embeddings=32768,
        attention_factor=config.rope_scaling.attention_factor,
        truncate=values.get("truncate", True))
    assert config.rope_scaling.attention_factor == pytest.approx(attention_factor, rel=1e-12)
    assert config.query_factor == pytest.approx(attention_factor**2)
    assert config.max_position_embeddings == max(131072, PLAIN["max_position_embeddings"])


def test_the_trained_length_of_yarn_may_stand_elsewhere():
    raw = PLAIN | {"max_position_embeddings": 131072, "original_max_position_embeddings": 16384}
    scaling = ModelConfig.from_hf(raw | {"rope_scaling": {"type": "yarn"}}).rope_scaling
    assert (scaling.factor, scaling.original_max_position_embeddings) == (8.0, 16384)
    with pytest.raises(CheckpointError, match="is 32768 in .*rope_scaling and 16384 beside it"):
        ModelConfig.from_hf(raw | {"rope_scaling": {"type": "yarn", **YARN}})


def test_dynamic_rope_is_plain_as_far_as_it_goes_here():
    raw = PLAIN | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    assert ModelConfig.from_hf(raw).rope_scaling == RopeScaling(kind="dynamic", factor=2.0)


@pytest.mark.parametrize("kind", ["yarn", "dynamic"])
def test_two_ways_beyond_the_trained_length_are_one_too_many(kind):
    raw = small(dual_chunk_attention_config=RELEASED_DCA, rope_scaling={"type": kind, **YARN})
    with pytest.raises(CheckpointError, match=f"stands beside rope scaling of type '{kind}'"):
        ModelConfig.from_hf(raw)


QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "decoder_sparse_step": 1,
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
    "max_position_embeddings": 262144, "max_window_layers": 48, "mlp_only_layers": [],
    "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True,
    "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000000,
    "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
    "use_sliding_window": False, "vocab_size": 151936,
}


def test_a_model_of_experts():
    config = ModelConfig.from_hf(QWEN3_30B)
    assert config.num_parameters / 1e9 == pytest.approx(30.53, abs=0.01)
    assert config.num_active_parameters / 1e9 == pytest.approx(2.73, abs=0.01)
    assert config.experts == ExpertConfig(
        num_experts=128, num_chosen=8, expert_size=768, is_normed=True)
    renamed = without(QWEN3_30B, "num_experts") | {"num_local_experts": 128}
    assert ModelConfig.from_hf(renamed) == config
    mixed = ModelConfig.from_hf(QWEN3_30B | {"decoder_sparse_step": 2, "mlp_only_layers": [1, 46]})
    assert [idx for idx in range(8) if mixed.experts.is_routed(idx)] == [3, 5, 7]
    assert mixed.experts.num_routed(48) == 23


def test_biases_are_those_of_config_json():
    config = ModelConfig.from_hf(LLAMA3_1_8B | {"attention_bias": True})
    assert config.attention_bias and config.output_bias and not config.mlp_bias
    config = ModelConfig.from_hf(LLAMA3_1_8B | {"mlp_bias": True})
    assert config.mlp_bias and not config.attention_bias and not config.output_bias


@pytest.mark.parametrize("window", [4096, None])
def test_a_window_that_is_switched_off_counts_for_nothing(window):
    assert ModelConfig.from_hf(small(use_sliding_window=False, sliding_window=window))


def without(raw: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in raw.items() if name != key}


@pytest.mark.parametrize("block", ["rope_parameters", "rope_scaling"])
def test_two_bases_must_agree(block):
    raw = small() | {block: {"rope_type": "default", "rope_theta": 1e7}}
    assert ModelConfig.from_hf(raw).rope_theta == 1e7
    raw[block]["rope_theta"] = 5e5
    with pytest.raises(CheckpointError, match=f"rope_theta is 1e\\+07 in config.json and 500000 in "
                                              f"config.json: {block}; correct config.json"):
        ModelConfig.from_hf(raw)


@pytest.mark.parametrize("name", [
    "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("has_base", [True, False])
def test_an_adapter_is_refused(tmp_path, name, has_base):
    if has_base:
        write(tmp_path, small())
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=f"holds an adapter .{name}., which is not applied"):
        ModelConfig.from_dir(tmp_path)


REFUSED = [
    (small(architectures=["Phi3ForCausalLM"]), "architecture Phi3ForCausalLM is not supported"),
    (MISTRAL_NEMO | {"sliding_window": 4096}, "sliding_window is 4096, and sliding window"),
    (LLAMA3_1_8B | {"sliding_window": 4096}, "sliding_window is 4096, and sliding window"),
    (without(MISTRAL_NEMO, "sliding_window"), "sliding_window is not there, which means 4096"),
    (MISTRAL_NEMO | {"attention_bias": True}, "attention_bias is true, not supported for Mistral"),
    (small(mlp_bias=True), "mlp_bias is true, not supported for Qwen2ForCausalLM"),
    (LLAMA3_1_8B | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, 1 is needed"),
    (LLAMA3_1_8B | {"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is None"),
    (LLAMA3_1_8B | {"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor 0.5 must be 1"),
    (LLAMA3_1_8B | {"rope_scaling": {"type": "linear", "rope_type": "llama3", **LLAMA3_ROPE}},
     "rope_scaling of type 'linear' is not supported"),
    (LLAMA3_1_8B | {"rope_scaling": {"type": "linear", **LLAMA3_ROPE}},
     "rope_scaling: low_freq_factor is not supported"),
    (LLAMA3_1_8B | {"rope_scaling": {"type": "llama3", **LLAMA3_ROPE, "low_freq_factor": 4.0}},
     "low_freq_factor 4 must be between 0 and high_freq_factor 4"),
    (small(rope_scaling={"type": "yarn", "factor": 4.0, "beta_fast": 1.0, "beta_slow": 2.0}),
     "beta_slow 2 must be between 0 and beta_fast 1"),
    (small(rope_scaling={"type": "yarn", "factor": 4.0, "attention_factor": 0.0}),
     "attention_factor 0 must be above 0"),
    (LLAMA3_1_8B | {"rope_parameters": {"rope_type": "linear", "factor": 8.0}},
     "rope_parameters and rope_scaling are of different kinds"),
    (small(architectures=None), "architecture missing is not supported"),
    (small(use_sliding_window=True), "sliding window"),
    (small(layer_types=["full_attention", "sliding_attention"]), "sliding window"),
    (small(quantization_config={"quant_method": "aqlm"}), "quant_method 'aqlm' is not supported"),
    (small(quantization_config={"quant_method": "awq", "bits": 8}), "bits 8 is not supported"),
    (small(quantization_config={"quant_method": "awq", "bits": 4, "version": "gemv"}),
     "version 'gemv' is not supported, only the gemm layout"),
    (small(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 0}),
     "group_size is 0, -1 or a positive integer is needed"),
    (small(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128,
                                "checkpoint_format": "marlin"}),
     "checkpoint_format 'marlin' is not supported, only gptq or gptq_v2"),
    (small(quantization_config={"quant_method": "fp8", "fmt": "e5m2"}), "fmt 'e5m2'"),
    (small(quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]}),
     "weight_block_size [64, 64] is not supported, only [128, 128]"),
    (small(quantization_config={"quant_method": "fp8", "modules_to_not_convert": "lm_head"}),
     "modules_to_not_convert is 'lm_head', a list of names is needed"),
    (small(quantization_config={"quant_method": "compressed-tensors", "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"type": "int", "num_bits": 8}}}}),
     "8 bits of type 'int' are not supported"),
    (small(quantization_config={"quant_method": "compressed-tensors", "config_groups": {
        "group_0": {"targets": ["Conv"], "weights": {"type": "float", "num_bits": 8}}}}),
     "targets ['Conv'] is not supported"),
    (small(quantization_config={"quant_method": "compressed-tensors", "config_groups": {},
                                "sparsity_config": {"format": "sparse-24"}}),
     "sparsity_config is not supported"),
    (small(hidden_act="gelu"), "hidden_act 'gelu'"),
    (small(layer_types=["linear_attention"] * 2), "layer_types names 'linear_attention'"),
    (small(layer_types=5), "layer_types is 5, a list of names is needed"),
    (small(compression_config={"format": "pack-quantized"}), "quant_method None"),
    (small(rope_scaling="yarn"), "rope_scaling is 'yarn', a JSON object is needed"),
    (small(rope_parameters=[1]), "rope_parameters is [1], a JSON object is needed"),
    (small(rope_parameters={"full_attention": {"rope_theta": 1e6}}),
     "rope_parameters: full_attention is not supported"),
    (small(rope_scaling={"factor": 4.0}), "rope_scaling: factor is not supported"),
    (small(rope_theta=0), "rope_theta is 0, a number > 0 is needed"),
    (small(rope_theta=True), "rope_theta is True, a number >= 0"),
    (small(rope_theta=float("nan")), "rope_theta is nan"),
    (small(rms_norm_eps=float("inf")), "rms_norm_eps is inf"),
    (small(vocab_size=True), "vocab_size is True, a positive integer"),
    (small(tie_word_embeddings="false"), "tie_word_embeddings is 'false', true or false"),
    (small(architectures="Qwen2ForCausalLM"), "architectures is 'Qwen2ForCausalLM', a list"),
    (small(hidden_size=None), "hidden_size is None, a positive integer is needed"),
    (small(num_hidden_layers="28"), "num_hidden_layers is '28', a positive integer is needed"),
    (small(num_key_value_heads=3), "28 is not a multiple of num_key_value_heads 3"),
    (small(head_dim=127), "head_dim 127 must be even"),
    (small(rope_theta="x"), "rope_theta is 'x', a number >= 0 is needed"),
    (small(vocab_size=True), "vocab_size is True, a positive integer is needed"),
    (small(rms_norm_eps=float("nan")), "rms_norm_eps is nan, a number >= 0 is needed"),
    (small(rope_theta=float("inf")), "rope_theta is inf, a number >= 0 is needed"),
    (small(rope_theta=True), "rope_theta is True, a number >= 0 is needed"),
    (small_dca(sparse_attention_threshold=float("inf")), "sparse_attention_threshold is inf"),
    (small(dual_chunk_attention_config=[1]), "dual_chunk_attention_config is [1]"),
    (small_dca(chunk_size=8192), "local_size 8192 must be between 1 and chunk_size - 1 = 8191"),
    (small_dca(chunk_size="x"), "dual_chunk_attention_config: chunk_size is 'x'"),
    (small_dca(sparse_attention_config={"0": []}), "must be a list of objects, one a layer"),
    (small_dca(sparse_attention_config=[{}] * 3), "is for 3 layers, the model has 2"),
    (QWEN3_8B | {"mlp_bias": True}, "mlp_bias is true"),
    (QWEN3_30B | {"num_experts_per_tok": 129}, "num_experts_per_tok 129 is more than num_experts"),
    (QWEN3_30B | {"num_local_experts": 64}, "num_experts is 128 and num_local_experts 64"),
    (QWEN3_30B | {"mlp_only_layers": [True]}, "mlp_only_layers is [True], a list of layers"),
    (without(QWEN3_30B, "num_experts"), "num_experts is None, a positive integer"),
    (without(QWEN3_30B, "moe_intermediate_size"), "moe_intermediate_size is None"),
    ([], "a JSON object is needed, not list"),
]


@pytest.mark.parametrize(("raw", "text"), REFUSED, ids=[text[:32] for _, text in REFUSED])
def test_refused(tmp_path, raw, text):
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_dir(write(tmp_path, raw))
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_empty_directory(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json there; name a directory"):
        ModelConfig.from_dir(tmp_path)


def test_corrupt_json(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": [')
    with pytest.raises(CheckpointError, match="not valid JSON .*; fetch the file again"):
        ModelConfig.from_dir(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        ModelConfig.from_dir(tmp_path)


@pytest.mark.parametrize(("field", "value"), [
    ("max_model_len", 0), ("block_size", -1), ("memory_gib", 0.0), ("num_threads", 0),
    ("max_num_requests", 0), ("memory_gib", float("nan")), ("step_budget_s", float("nan")),
])
def test_engine_config_refuses_what_is_not_positive(field, value):
    with pytest.raises(LongspanError, match=f"{field} must be positive, not {value}"):
        EngineConfig(model="nano", **{field: value})


@pytest.mark.parametrize(("field", "value", "kind"), [
    ("max_model_len", 4096.0, "an integer"), ("block_size", True, "an integer"),
    ("max_num_requests", "8", "an integer"), ("prefill_chunk_len", 1e4, "an integer"),
    ("num_threads", 1.5, "an integer"), ("memory_gib", "4", "a number"),
    ("step_budget_s", True, "a number"),
])
def test_engine_config_refuses_numbers_of_another_kind(field, value, kind):
    with pytest.raises(LongspanError) as caught:
        EngineConfig(model="nano", **{field: value})
    assert str(caught.value) == f"{field} is {value!r}, {kind} is needed"


@pytest.mark.parametrize(("field", "value", "text"), [
    ("max_model_len", 1.5, "max_model_len is 1.5, an integer is needed"),
    ("memory_gib", "8", "memory_gib is '8', a number is needed"),
    ("attention", "flash", "attention 'flash' is not one of auto, dense, sparse"),
    ("weights", "dummy", "weights 'dummy' is not one of checkpoint, random"),
    ("positions", "alibi", "positions 'alibi' is not one of auto, rope, dca, dca\\+yarn"),
    ("memory_gib", float("inf"), "memory_gib must be finite"),
    ("num_threads", 10**8, "num_threads is 100000000, at most 1024; leave it out"),
])
def test_engine_config_refuses_what_there_is_not(field, value, text):
    """Before anything is started: a server's engine is told its configuration by a message."""
    with pytest.raises(LongspanError, match=text):
        EngineConfig(model="nano", **{field: value})


def test_prefill_chunk_is_a_multiple_of_the_block():
    with pytest.raises(LongspanError, match=r"multiple of block_size 128; use 256"):
        EngineConfig(model="nano", prefill_chunk_len=200)
    assert EngineConfig(model="nano", prefill_chunk_len=256).prefill_chunk_len == 256
