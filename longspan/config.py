"""Every configuration as a frozen, keyword-only dataclass. Standard library only.

Model facts come from the checkpoint's ``config.json`` (`ModelConfig.from_hf`), engine choices from
`EngineConfig`. "auto" values are resolved once, into a new object, before anything starts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from longspan.dca_config import DcaConfig as DcaConfig
from longspan.dca_config import read_budgets, read_dca
from longspan.errors import CheckpointError, LongspanError
from longspan.expert_config import ExpertConfig, read_experts
from longspan.families import (
    ATTENTION_BIAS,
    FAMILIES,
    MLP_BIAS,
    find_architecture,
    refuse_unsupported,
)
from longspan.fields import Fields
from longspan.quantization import CheckpointQuantization, read_quantization
from longspan.rank_place import FLAGS, RankPlace, ranks_label
from longspan.rope_config import RopeScaling, read_rope

AttentionMode = Literal["auto", "dense", "sparse"]
PositionMode = Literal["auto", "rope", "dca", "dca+yarn"]
WeightSource = Literal["checkpoint", "random"]
Quantization = Literal["none", "fp8", "int4", "int8"]
KV_DTYPES = ("int8", "bfloat16", "float32")

MAX_THREADS = 1024
"""torch crashes if the operating system cannot give it as many threads as it was told to use."""
LONG_CONFIG = "config_1m.json"
"""A checkpoint's config.json for contexts longer than it usually claims."""
WEIGHT_FIELDS = ("architecture", "vocab_size", "hidden_size", "intermediate_size", "num_layers",
                 "num_heads", "num_kv_heads", "head_dim", "experts", "rope_theta",
                 "quantization", "tie_word_embeddings")
"""Facts of the weights, the same in both."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """What a decoder-only checkpoint states about itself."""

    architecture: str
    """Class name in config.json, one of `FAMILIES`."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    """Longest context that the checkpoint claims, tokens."""
    tie_word_embeddings: bool
    attention_bias: bool
    """Bias on the q, k and v projections."""
    qk_norm: bool
    """See `Family`."""
    output_bias: bool = False
    """Bias on the attention's output projection."""
    mlp_bias: bool = False
    """Bias on the MLP's three projections."""
    experts: ExpertConfig | None = None
    """Routed experts in place of MLPs; None: there are none."""
    quantization: CheckpointQuantization | None = None
    """How the checkpoint's matrices are quantised; None: not at all."""
    rope_scaling: RopeScaling | None = None
    """How the rotary frequencies differ from those of ``rope_theta``; None: not at all."""
    dca: DcaConfig | None = None
    sparse_budgets: tuple[dict[str, Any], ...] | None = None
    """Released per-head budgets: one {head: [type, vertical, slash, score]} for each layer."""
    sparse_threshold: int = 32_768
    """Prompts longer than this use sparse prefill, tokens."""
    sparse_probe_len: int = 64
    """Last queries of a prefill chunk that estimate the pattern."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"num_attention_heads {self.num_heads} is not a multiple of num_key_value_heads "
                f"{self.num_kv_heads}; correct config.json"
            )
        if self.experts and self.quantization and self.quantization.form.has_order:
            raise CheckpointError("quantization_config orders inputs by activation (desc_act, "
                                  "actorder), which is not supported for routed experts; use the "
                                  "bf16 checkpoint")
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim {self.head_dim} must be even for RoPE")

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """Read a Hugging Face config. Raises `CheckpointError` naming what is not supported."""
        if not isinstance(raw, Mapping):
            raise CheckpointError(f"{source}: a JSON object is needed, not {type(raw).__name__}")
        need = Fields(raw, source)
        architecture = find_architecture(raw, source)
        family = FAMILIES[architecture]
        refuse_unsupported(need, architecture)
        hidden_size, num_heads = need.integer("hidden_size"), need.integer("num_attention_heads")
        num_layers = need.integer("num_hidden_layers")
        dca_need = need.block("dual_chunk_attention_config")
        rope_theta, rope_scaling = read_rope(need)
        _refuse_two_extensions(dca_need, rope_scaling)
        has_bias = ATTENTION_BIAS in family.biases and need.boolean(ATTENTION_BIAS)
        without = family.reads_qkv_bias and need.raw.get("qkv_bias") is False
        return cls(
            architecture=architecture,
            vocab_size=need.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=need.integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=need.integer("num_key_value_heads", num_heads),
            head_dim=need.integer("head_dim", family.head_dim or hidden_size // num_heads),
            rms_norm_eps=need.number("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_position_embeddings=_claimed_len(need, rope_scaling),
            tie_word_embeddings=need.boolean("tie_word_embeddings"),
            attention_bias=family.qkv_bias and not without or has_bias,
            output_bias=has_bias,
            mlp_bias=MLP_BIAS in family.biases and need.boolean(MLP_BIAS),
            qk_norm=family.qk_norm,
            experts=(read_experts(need, has_shared=family.has_shared_expert)
                     if family.has_experts else None),
            quantization=read_quantization(need),
            dca=read_dca(dca_need),
            sparse_budgets=read_budgets(need, dca_need, num_layers),
            sparse_threshold=int(dca_need.number("sparse_attention_threshold", 32_768)),
            sparse_probe_len=dca_need.integer("sparse_attention_last_q", 64),
        )

    @classmethod
    def from_dir(
        cls, path: Path, *, wanted_len: int | None = None, wants_dca: bool = False
    ) -> ModelConfig:
        """Read ``config.json`` and, beside it, ``sparse_attention_config.json`` where present.

        Args:
            wanted_len: contexts longer than ``config.json`` claims are wanted: ``config_1m.json``
                is read instead, where the checkpoint has one (Qwen3-2507).
            wants_dca: the same where ``config.json`` has no DCA.
        """
        adapter = next((name for name in ADAPTER_FILES if (path / name).is_file()), None)
        if adapter is not None:
            raise CheckpointError(
                f"{path}: holds an adapter ({adapter}), which is not applied; merge it into its "
                "base model with peft's merge_and_unload, or move it away to run the base alone")
        file = path / "config.json"
        if not file.is_file():
            raise CheckpointError(
                f"{path}: no config.json there; name a directory that holds a Hugging Face "
                "checkpoint, or a hub id such as Qwen/Qwen2.5-7B-Instruct-1M"
            )
        config, longer = cls._from_file(file), path / LONG_CONFIG
        is_wanted = wants_dca and config.dca is None or (
            wanted_len is not None and wanted_len > config.max_position_embeddings)
        if not is_wanted or not longer.is_file():
            return config
        found = cls._from_file(longer)
        differing = [name for name in WEIGHT_FIELDS
                     if getattr(found, name) != getattr(config, name)]
        if differing:
            raise CheckpointError(f"{longer}: another {differing[0]} than in config.json; fetch "
                                  "both files again")
        return found

    @classmethod
    def _from_file(cls, file: Path) -> ModelConfig:
        raw = read_json(file)
        sparse_file = file.with_name("sparse_attention_config.json")
        dca_raw = raw.get("dual_chunk_attention_config") if isinstance(raw, dict) else None
        inlined = isinstance(dca_raw, dict) and "sparse_attention_config" in dca_raw
        if isinstance(dca_raw, dict) and dca_raw and not inlined and sparse_file.is_file():
            raw = {**raw, "dual_chunk_attention_config":
                   {**dca_raw, "sparse_attention_config": read_json(sparse_file)}}
        return cls.from_hf(raw, source=str(file))

    @property
    def query_factor(self) -> float:
        """What queries are multiplied by: YaRN's factor for queries and keys, all of it here, so
        that it does not stand in cached keys."""
        return self.rope_scaling.attention_factor**2 if self.rope_scaling else 1.0

    @property
    def kv_elements_per_token(self) -> int:
        """Numbers in the keys and values of one token, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Weights that memory holds, tied embeddings counted once."""
        vectors = 2 * self.hidden_size
        vectors += self._qkv_size if self.attention_bias else 0
        vectors += self.hidden_size if self.output_bias else 0
        vectors += 2 * self.intermediate_size + self.hidden_size if self.mlp_bias else 0
        vectors += 2 * self.head_dim if self.qk_norm else 0
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        matrices = self.num_layers * self._attention_matrices + self._mlp_matrices(active=False)
        return matrices + self.num_layers * vectors + embeddings + self.hidden_size

    @property
    def num_active_parameters(self) -> int:
        """Weights of the layers' matrices that one token is multiplied by: twice as many
        operations. Embedding and head are not among them."""
        return self.num_layers * self._attention_matrices + self._mlp_matrices(active=True)

    @property
    def num_routed_parameters(self) -> int:
        """Weights of all layers' routed experts, shared ones not counted."""
        experts = self.experts
        if experts is None:
            return 0
        one = 3 * self.hidden_size * experts.expert_size
        return experts.num_routed(self.num_layers) * experts.num_held * one

    def routed_share(self, num_tokens: int) -> float:
        """Estimate the share of the routed experts that some of so many tokens takes, if all are as
        likely: the weights that a decode step reads."""
        experts = self.experts
        if experts is None:
            return 0.0
        return 1.0 - (1.0 - experts.num_chosen / experts.num_experts) ** num_tokens

    @property
    def _qkv_size(self) -> int:
        return self.head_dim * (self.num_heads + 2 * self.num_kv_heads)

    @property
    def _attention_matrices(self) -> int:
        return self.hidden_size * (self._qkv_size + self.head_dim * self.num_heads)

    def _mlp_matrices(self, *, active: bool) -> int:
        """Count the MLPs' weights, of experts all or only those that one token takes."""
        experts, hidden = self.experts, self.hidden_size
        num_routed = experts.num_routed(self.num_layers) if experts else 0
        dense = (self.num_layers - num_routed) * 3 * hidden * self.intermediate_size
        if experts is None:
            return dense
        count = experts.num_chosen if active else experts.num_held
        return dense + num_routed * experts.parameters(hidden, count)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Choices of one engine. ``None`` means: decide from the machine and the checkpoint."""

    model: str
    """Directory, hub id, or ``nano`` for the bundled model."""
    device: str | None = None
    """``cpu`` or ``cuda``; default: cuda when there is one."""
    dtype: str | None = None
    """``float32`` or ``bfloat16``; default: float32 on CPUs, bfloat16 on GPUs."""
    max_model_len: int | None = None
    """Longest prompt plus completion accepted, tokens; default: what the checkpoint and the
    memory allow."""
    attention: AttentionMode = "auto"
    """Sparse or dense prefill; ``auto``: sparse above the checkpoint's threshold."""
    positions: PositionMode = "auto"
    """``auto``: DCA with the YaRN temperature when the checkpoint has a DCA config."""
    sparsity_plan: str | None = None
    """JSON file of budgets; default: the plan beside the checkpoint, else the built-in policy."""
    recall: float | None = None
    """Share of attention mass that sparse prefill should keep in every head and chunk, above 0 and
    below 1: budgets grow and shrink to reach it. Default: the plan's budgets as they are."""
    weights: WeightSource = "checkpoint"
    """``random``: the checkpoint's sizes with random weights; none are downloaded or read. For
    measuring time and memory."""
    quantization: Quantization | None = None
    """What plain matrices are quantised to while they are loaded: ``fp8``, ``int4``, ``int8``
    (CPUs), or ``none``, they stay as the checkpoint has them. Default: none, but on CPUs int8 for
    models above 1 GiB in fp32, unless there is a ``dtype``."""
    kv_dtype: str | None = None
    """``int8``: keys and values are kept in eight bits, with a scale for each token and head;
    ``bfloat16`` or ``float32``: in that type. Arithmetic stays in ``dtype``. Default: ``dtype``,
    but on CPUs bfloat16 beside weights in eight bits or four."""
    prefill_chunk_len: int | None = None
    """Prompt tokens of one request computed in one step; default: the most that the memory allows,
    up to 131,072 on GPUs and 16,384 on CPUs (`longspan.engine.setup.step_sizes`)."""
    step_budget_s: float | None = None
    """Longest step while prompts are computed, seconds: how long decoding may pause, and half of
    what a short prompt may wait; default: 0.1 on GPUs, 1 on CPUs, without a limit for `LLM`
    (``math.inf``: prefill chunks are computed whole)."""
    max_num_requests: int | None = None
    """Requests computed together at the most; default: 64, and fewer where the memory is short."""
    block_size: int = 128
    """Tokens in one KV block."""
    memory_gib: float | None = None
    """Memory that weights, KV cache and workspace may use; default: 90 % of what is free, on GPUs
    all but 6 GiB where that is more. GPUs use all of it: the KV cache takes what the others
    leave."""
    num_threads: int | None = None
    """CPU threads for the tensor library; default: all cores the process may use, shared by the
    ranks of a machine."""
    context_parallel: int = 1
    """Ranks, each on a GPU of its own or as a process on CPUs, that share the rows of each prefill
    chunk; every one of them holds the weights, and the whole KV cache or a part of it."""
    divides_kv: bool | None = None
    """Those ranks hold a part of each KV block alone. Default: where a context of full length does
    not fit otherwise."""
    pipeline_parallel: int = 1
    """Ranks that share the layers: each holds the weights and the KV cache of its own alone."""
    tensor_parallel: int = 1
    """Ranks that share each layer's heads and the width of its MLP, and hold those weights and the
    KV cache of those heads alone. The three may stand together: their numbers multiply."""
    place: RankPlace | None = None
    """Place among ranks that are there already; None: they are started."""
    kv_host_gib: float = 0.0
    """Host memory for KV blocks that the cache has no room for, besides ``memory_gib``."""
    kv_dir: str | None = None
    """Directory that keeps the KV blocks of prompts across restarts; one for each engine."""
    kv_disk_gib: float | None = None
    """Most that its files may take; default: half of what is free on that disk."""

    @property
    def num_ranks(self) -> int:
        """Processes that compute together."""
        return self.context_parallel * self.pipeline_parallel * self.tensor_parallel

    @property
    def ranks_label(self) -> str:
        """How many ranks there are and what they share, for reports; empty: there is one."""
        return ranks_label({name: getattr(self, name) for name in FLAGS})

    @property
    def kv_parts(self) -> int:
        """Ranks that divide each KV block among themselves. ``divides_kv`` is decided."""
        return self.context_parallel if self.divides_kv else 1

    def __post_init__(self) -> None:
        for name in ("max_model_len", "prefill_chunk_len", "max_num_requests", "block_size",
                     "num_threads", "context_parallel", "pipeline_parallel", "tensor_parallel",
                     "memory_gib", "step_budget_s", "kv_host_gib", "kv_disk_gib"):
            value = getattr(self, name)
            kind = (int, float) if name.endswith(("_gib", "_s")) else int
            if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
                raise LongspanError(f"{name} is {value!r}, "
                                    f"{'an integer' if kind is int else 'a number'} is needed")
            if value is not None and not value > 0 and (name, value) != ("kv_host_gib", 0):  # nan
                raise LongspanError(f"{name} must be positive, not {value}")
        if self.num_threads is not None and self.num_threads > MAX_THREADS:
            raise LongspanError(f"num_threads is {self.num_threads}, at most {MAX_THREADS}; leave "
                                "it out for all cores")
        if self.recall is not None:
            check_recall(self.recall)
            if self.attention == "dense":
                raise LongspanError(f"recall {self.recall:g} is for sparse prefill, and attention "
                                    "is 'dense'; leave one of them out")
        for name in ("memory_gib", "kv_host_gib", "kv_disk_gib"):
            if getattr(self, name) == math.inf:
                raise LongspanError(f"{name} must be finite; leave it out for what is free")
        if self.num_ranks > 1 and (self.kv_dir is not None or self.kv_host_gib):
            raise LongspanError(
                f"{self.num_ranks} ranks keep no KV in host memory or on "
                "disk; leave kv_host_gib and kv_dir out, or use one rank")
        if self.kv_dir is not None and not self.kv_dir.strip():
            raise LongspanError("kv_dir is empty; name a directory, or leave it out")
        if self.kv_dir is None and self.kv_disk_gib is not None:
            raise LongspanError("kv_disk_gib says how much kv_dir may hold; name a kv_dir")
        for name, modes in (("attention", AttentionMode), ("positions", PositionMode),
                            ("weights", WeightSource)):
            value = getattr(self, name)
            if value not in get_args(modes):
                raise LongspanError(
                    f"{name} {value!r} is not one of {', '.join(get_args(modes))}")
        if self.quantization is not None and self.quantization not in get_args(Quantization):
            raise LongspanError(f"quantization {self.quantization!r} is not one of "
                                f"{', '.join(get_args(Quantization))}; leave it out "
                                "for the default")
        if self.kv_dtype not in (None, *KV_DTYPES):
            raise LongspanError(f"kv_dtype {self.kv_dtype!r} is not one of "
                                f"{', '.join(KV_DTYPES)}; leave it out for the default")
        if self.prefill_chunk_len is not None and self.prefill_chunk_len % self.block_size:
            raise LongspanError(
                f"prefill_chunk_len {self.prefill_chunk_len} must be a multiple of block_size "
                f"{self.block_size}; use "
                f"{-(-self.prefill_chunk_len // self.block_size) * self.block_size}"
            )


def check_recall(value: object) -> None:
    """Raise `LongspanError` unless this is a recall that can be asked for."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise LongspanError(f"recall is {value!r}; it must be above 0 and below 1, for example "
                            "0.95")


def read_json(file: Path) -> Any:
    """Parse a JSON file. Raises `CheckpointError` with the place of the fault."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); fetch the file again") from None


def _claimed_len(need: Fields, scaling: RopeScaling | None) -> int:
    """Return the longest context: YaRN checkpoints often state the trained length."""
    claim = need.integer("max_position_embeddings")
    if scaling is None or scaling.kind != "yarn":
        return claim
    return max(claim, int(scaling.factor * scaling.original_max_position_embeddings))


def _refuse_two_extensions(dca: Fields, scaling: RopeScaling | None) -> None:
    if dca.raw and scaling is not None and scaling.kind in ("yarn", "dynamic"):
        raise CheckpointError(
            f"{dca.source} stands beside rope scaling of type {scaling.kind!r}, and both reach "
            "beyond the trained length; remove one of them from config.json")
