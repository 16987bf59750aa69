"""Models known by their shape: real sizes with random weights, and the budgets they run with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from typing import Any, get_args

from longspan.attention.sparsity import SelectionMode, SparsityPlan
from longspan.config import ModelConfig
from longspan.errors import LongspanError
from longspan.model.weights import BUNDLED_MODEL, resolve_checkpoint

_QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "vocab_size": 152_064, "rms_norm_eps": 1e-5,
    "rope_theta": 1e7, "max_position_embeddings": 1_010_000, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "dual_chunk_attention_config": {
        "chunk_size": 262_144, "local_size": 8192, "original_max_position_embeddings": 262_144},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": {
        **_QWEN, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4},
    "qwen2.5-14b": {
        **_QWEN, "hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 48,
        "num_attention_heads": 40, "num_key_value_heads": 8},
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 151_936, "rms_norm_eps": 1e-6,
        "rope_theta": 1e7, "max_position_embeddings": 1_010_000, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "moe_intermediate_size": 768, "dual_chunk_attention_config": {
            "chunk_size": 131_072, "local_size": 4096,
            "original_max_position_embeddings": 131_072}},
}
"""config.json of Qwen2.5-7B-Instruct-1M, Qwen2.5-14B-Instruct-1M and Qwen3-30B-A3B-2507 as its
config_1m.json has it, what matters here."""
EXPERT_SHAPE = "qwen3-30b-a3b"
BUDGET_FILES = {"qwen2.5-7b": "qwen2.5-7b-instruct-1m.sparsity.json",
                "qwen2.5-14b": "qwen2.5-14b-instruct-1m.sparsity.json"}
SHAPES = (*CONFIGS, BUNDLED_MODEL)
DEFAULTS = {item.name: item.default for item in fields(SparsityPlan)}
POLICY_FIELDS: Mapping[str, Callable[[str], Any]] = {
    "vertical": int, "slash": int, "budget_share": float, "mean_near_len": int,
    "mean_correction": lambda value: bool(int(value)), "num_scouts": int, "most_scouts": int,
    "scout_threshold": float, "scout_tiles": int, "probe_last": int,
    "probe_strided": int, "tail_len": int, "recall_target": float, "mode": str}


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """Changes to a shape's own budgets and policy; None leaves them."""

    vertical: int | None = None
    """The same columns for every head."""
    slash: int | None = None
    """The same diagonals for every head, tokens."""
    mode: str = "tile"
    policy: str = ""
    """Fields of the plan in tile mode, such as ``num_scouts=128,tail_len=0``; vertical and
    slash for every head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One model's sizes and how it prefills sparsely."""

    name: str
    model: ModelConfig
    plan: SparsityPlan
    plan_label: str
    """The plan's name in result rows."""

    @classmethod
    def make(cls, name: str, options: PlanOptions | None = None) -> Shape:
        """Make a shape. Raises `LongspanError` for one that is not known or options out of
        range."""
        model = _model(name)
        options = options or PlanOptions()
        plan, source = _plan(name, model, options)
        return cls(name=name, model=model, plan=plan, plan_label=label_plan(plan, source))

    def cut(self, num_layers: int | None) -> Shape:
        """Keep the first layers only; None: all. Raises `LongspanError` when there are not so
        many."""
        total = self.model.num_layers
        if num_layers is None or num_layers == total:
            return self
        if not 1 <= num_layers <= total:
            raise LongspanError(f"--layers {num_layers}: {self.name} has {total} layers")
        plan = replace(self.plan, vertical=self.plan.vertical[:num_layers],
                       slash=self.plan.slash[:num_layers])
        model = replace(self.model, num_layers=num_layers, sparse_budgets=None)
        return replace(self, model=model, plan=plan)


def label_plan(plan: SparsityPlan, source: str) -> str:
    """Budgets and policy in one word, such as
    ``released-tile-correction-strided64-tail2048``."""
    parts = [source if plan.budget_share == 1 else f"{source}x{plan.budget_share:g}", plan.mode]
    if plan.mean_correction:
        parts.append("correction")
    if plan.probe_strided:
        parts.append(f"strided{plan.probe_strided}")
    if plan.num_scouts:
        parts.append(f"scouts{plan.num_scouts}")
    if plan.num_scouts and plan.scout_threshold != DEFAULTS["scout_threshold"]:
        parts.append(f"above{plan.scout_threshold:g}")
    if plan.mean_correction and plan.mean_near_len != DEFAULTS["mean_near_len"]:
        parts.append(f"near{plan.mean_near_len}")
    if plan.mode == "tile" and plan.tail_len != DEFAULTS["tail_len"]:
        parts.append(f"owntail{plan.tail_len}")
    return "-".join(parts)


def _model(name: str) -> ModelConfig:
    if name == BUNDLED_MODEL:
        return ModelConfig.from_dir(resolve_checkpoint(name))
    if name not in CONFIGS:
        raise LongspanError(f"--shape {name!r} is not known; there are {', '.join(SHAPES)}")
    return ModelConfig.from_hf(CONFIGS[name], source=name)


def _plan(name: str, model: ModelConfig, options: PlanOptions) -> tuple[SparsityPlan, str]:
    if (options.vertical is None) != (options.slash is None):
        raise LongspanError("--vertical and --slash: give both or neither")
    if options.vertical is not None and options.slash is not None:
        plan = SparsityPlan.default(
            model.num_layers, model.num_heads, options.vertical, options.slash)
        source = f"v{options.vertical}-s{options.slash}"
    elif name in BUDGET_FILES:
        plan, source = SparsityPlan.from_released(released_budgets(name)), "released"
    elif name in CONFIGS:
        plan, source = SparsityPlan.default(model.num_layers, model.num_heads), "default"
    else:
        plan = SparsityPlan.load(resolve_checkpoint(name) / "sparsity_plan.json")
        source = "bundled"
    plan.check_fits(model.num_layers, model.num_heads)
    if options.mode == "paper":
        return plan.paper(), source
    if options.mode != "tile":
        raise LongspanError(f"--mode {options.mode!r} is not tile or paper")
    return changed(plan, options.policy), source


def changed(plan: SparsityPlan, policy: str) -> SparsityPlan:
    """Return the plan with the changes of `PlanOptions.policy`; ``mode=paper`` is all of
    MInference's policy. Raises `LongspanError` for a name or number that is none."""
    changes = _changes(policy)
    mode = changes.pop("mode", plan.mode)
    if mode not in get_args(SelectionMode):
        raise LongspanError(f"--policy: mode {mode!r} is not one of "
                            + ", ".join(get_args(SelectionMode)))
    if mode == "paper":
        plan = plan.paper()
    for name in ("vertical", "slash"):
        if name in changes:
            changes[name] = tuple((changes[name],) * len(row) for row in plan.vertical)
    return replace(plan, **changes)


def scaled(plan: SparsityPlan, factor: float) -> SparsityPlan:
    """Return the plan with all budgets multiplied."""
    def rows(values: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(max(1, round(factor * value)) for value in row) for row in values)
    return replace(plan, vertical=rows(plan.vertical), slash=rows(plan.slash))


def _changes(policy: str) -> dict[str, Any]:
    """Parse --policy."""
    changes = {}
    for item in filter(None, policy.split(",")):
        name, equals, value = item.partition("=")
        if name not in POLICY_FIELDS or not equals:
            raise LongspanError(f"--policy {item!r}: name=value is needed, with one of "
                                + ", ".join(POLICY_FIELDS))
        try:
            changes[name] = POLICY_FIELDS[name](value)
        except ValueError:
            raise LongspanError(f"--policy {item!r}: {value!r} is no number") from None
    return changes


def released_budgets(name: str) -> list[dict[str, Any]]:
    """Read the budgets released for a shape: one {head: [type, vertical, slash, score]} a layer."""
    file = files("longspan.bench") / "data" / BUDGET_FILES[name]
    budgets: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return budgets


def shape_label(row: Mapping[str, Any]) -> str:
    """Name a row's shape, and its weights and its KV cache where they are quantised."""
    kv_dtype = f"{row['kv_dtype']} KV" if "kv_dtype" in row else None
    return " ".join([row["shape"], *filter(None, [row.get("quantization"), kv_dtype])])
