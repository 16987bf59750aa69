"""An engine as it is decided before any weight is read; from it, the runner."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import msgspec
import torch

from longspan.attention.sparsity import SparsityPlan, needs_means
from longspan.config import DcaConfig, EngineConfig, ModelConfig
from longspan.engine.control.chunking import piece_rows, unit_len
from longspan.engine.control.copy_queue import TierConfig
from longspan.engine.control.scheduler import SchedulerConfig
from longspan.engine.device.memory import DeviceMemory, MemoryPlan
from longspan.engine.device.runner import Runner
from longspan.engine.device.stage import StagePlace
from longspan.engine.device.stage_link import DistributedLink
from longspan.engine.device.stage_runner import StageRunner
from longspan.engine.intake import Intake
from longspan.engine.kv_file import KvFolder
from longspan.engine.ranks.hub import Hub
from longspan.engine.resolve import (
    check_tiles,
    check_window,
    extend_window,
    may_be_sparse,
    model_name,
    resolve_config,
    resolve_forms,
    resolve_kv_dtype,
    resolve_positions,
    resolve_quantization,
)
from longspan.engine.setup.cache_key import cache_key
from longspan.engine.setup.group import join_group
from longspan.engine.setup.kv_division import check_selection_share, choose_division
from longspan.engine.setup.lead_runner import LeadRunner, RankThread, abort_collectives
from longspan.engine.setup.mesh import RankMesh
from longspan.engine.setup.prior_costs import prior_costs, sparse_border
from longspan.engine.setup.stage_layers import largest_stage, stage_layers
from longspan.engine.setup.tier_plan import memory_besides, plan_tiers
from longspan.errors import LongspanError
from longspan.model import TORCH_DTYPES
from longspan.model.fingerprint import weights_fingerprint
from longspan.model.int8 import has_int8_product
from longspan.model.tensor_share import check_share, model_of_rank
from longspan.model.weights import resolve_checkpoint

MEASURED_LEN = {"cpu": 1_024, "cuda": 8_192}
"""Tokens of a server's first prompts: less than a second of them on a small model."""
BURST_S = 2.5e-3
"""GPUs are sent several decode steps shorter than this at a time: a small model's step takes less
than the host needs to send it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedEngine:
    """One engine's choices, all of them made."""

    path: Path
    """Directory of the checkpoint."""
    config: EngineConfig
    """Resolved, with the step sizes and the length that memory allows."""
    model: ModelConfig
    dca: DcaConfig | None
    """DCA settings in effect; None: plain RoPE."""
    has_plan: bool
    """The user or the checkpoint brought budgets."""
    plan: SparsityPlan | None
    """Budgets in effect; None: every prefill is dense."""
    memory: MemoryPlan
    sizes_reason: str = ""
    """Why prefill chunks are not longer and requests not more; empty: they are as asked for, or as
    large as they get."""
    tiers: TierConfig = TierConfig()
    """Host memory and disk for KV blocks."""
    cache_key: bytes = b""
    """What all KV blocks depend on besides tokens, where there are other places than the device."""

    @classmethod
    def resolve(
        cls, asked: EngineConfig, *, must_fit: bool = True, device: DeviceMemory | None = None,
    ) -> Self:
        """Decide everything that was left open.

        Args:
            device: what every rank of a group has; None: this process's memory.
            must_fit: False: decide also if memory does not suffice; ``memory`` says what lacks.

        Raises:
            CheckpointError: the checkpoint is missing, incomplete or of an unknown architecture.
            NotEnoughMemoryError: it does not fit; the message says what to change.
            LongspanError: a field is out of range.
        """
        config = resolve_config(asked, has_cuda=torch.cuda.is_available())
        path = resolve_checkpoint(config.model, with_weights=config.weights == "checkpoint")
        model = ModelConfig.from_dir(
            path, wanted_len=config.max_model_len,
            wants_dca=config.positions in ("dca", "dca+yarn"))
        return cls.of(model, asked, path=path, plan=resolve_plan(path, model, config),
                      must_fit=must_fit, device=device)

    @classmethod
    def of(
        cls, model: ModelConfig, asked: EngineConfig, *, path: Path, plan: SparsityPlan | None,
        must_fit: bool = True, device: DeviceMemory | None = None,
    ) -> Self:
        """Decide everything for a model whose facts are known; nothing is read.

        Args:
            path: where weights and tokenizer are read later, if ever: not where weights are random
                and requests are token ids.
            plan: the budgets that there are; None: the built-in ones where prefill is sparse.
            must_fit: as in `resolve`; errors too.
            device: memory of another machine, which has the device that is asked for; None: this
                machine.
        """
        config = resolve_config(asked, has_cuda=device is not None or torch.cuda.is_available())
        assert config.device is not None
        config = replace(config, quantization=resolve_quantization(
            asked, model, device=config.device, has_int8=has_int8_product()))
        config = replace(config, kv_dtype=resolve_kv_dtype(config))
        model = extend_window(config.positions, model)
        dca = resolve_positions(config.positions, model)
        in_effect = plan_in_effect(config, model, plan, has_dca=dca is not None)
        tiers = plan_tiers(model, config, means=needs_means(in_effect))
        # tables grow with the context where there is no DCA
        check_share(model, resolve_forms(config, model), config.tensor_parallel)
        check_selection_share(model, config, in_effect)
        stage = model_of_rank(
            largest_stage(replace(model, dca=dca), in_effect, config.pipeline_parallel),
            config.tensor_parallel)
        sizes = choose_division(
            stage, config, means=needs_means(in_effect), must_fit=must_fit,
            is_sparse=in_effect is not None, device=device or memory_besides(config, tiers))
        memory = sizes.memory
        check_window(model, dca, max_model_len=memory.max_model_len)
        if in_effect is not None and in_effect.mode == "tile":
            check_tiles(dca, block_size=config.block_size, max_model_len=memory.max_model_len)
        key = b"" if not tiers.num_slots else cache_key(
            path, model, config, dca=dca, plan=in_effect)
        return cls(
            path=path, config=replace(sizes.config, max_model_len=memory.max_model_len),
            model=model, dca=dca, has_plan=plan is not None, plan=in_effect, memory=memory,
            sizes_reason=sizes.reason, tiers=tiers, cache_key=key)

    def load_runner(self, hub: Hub | None = None) -> Runner | StageRunner | LeadRunner:
        """Read the weights and allocate the caches, on all ranks where there are others.

        Args:
            hub: of the other ranks; None: there are none. It is closed where this fails.

        Raises `CheckpointError`, `LongspanError` when the folder of KV files is another process's,
        or there is too little host memory, and `RankLostError`.
        """
        if hub is None:
            return self.load_alone()
        thread, store = RankThread(hub), hub.store
        hub.on_failure = abort_collectives
        try:
            hub.welcome(msgspec.msgpack.encode(self, enc_hook=str))
            runner = thread.do(lambda: self.load_alone(join_group(0, self.config, store)))
            hub.wait_joined()
        except BaseException as error:
            hub.close(str(error) or type(error).__name__)
            raise
        return LeadRunner(runner, hub, thread)

    def load_alone(self, mesh: RankMesh | None = None) -> Runner | StageRunner:
        """Load this rank's runner; see `load_runner`."""
        if mesh is not None and self.config.pipeline_parallel > 1:
            return self._load_stage(mesh)
        folder = (KvFolder(Path(self.tiers.folder), model_name(self.config.model))
                  if self.tiers.folder else None)
        try:
            runner = Runner.load(
                self.path, self.model, self.config, self.memory, dca=self.dca, plan=self.plan,
                place=StagePlace(heads=mesh.heads if mesh else None))
            if mesh is not None and mesh.rows is not None:
                runner.use_group(mesh.rows, self.plan)
            runner.use_places(self.tiers, self.cache_key, folder)
        except BaseException:
            if folder is not None:
                folder.close()
            raise
        return runner

    def _load_stage(self, mesh: RankMesh) -> StageRunner:
        assert self.config.dtype is not None and self.config.device is not None
        link = DistributedLink(
            mesh.rank, mesh.rings, hidden_size=self.model.hidden_size,
            dtype=TORCH_DTYPES[self.config.dtype], device=self.config.device)
        layers = stage_layers(self.model, self.plan, len(mesh.ring))[mesh.stage]
        runner = Runner.load(
            self.path, self.model, self.config, self.memory, dca=self.dca, plan=self.plan,
            place=StagePlace(link, layers, mesh.heads))
        if mesh.rows is not None:
            runner.use_group(mesh.rows, self.plan)
        return StageRunner(runner, link, tells=mesh.ring == mesh.rings[0])

    def intake(self) -> Intake:
        """Return what makes requests for this engine."""
        return Intake(
            vocab_size=self.model.vocab_size, max_model_len=self.memory.max_model_len,
            attention=self.config.attention, sparse_threshold=self.sparse_threshold,
            has_plan=self.has_plan, has_dca=self.dca is not None)

    def scheduler_config(self) -> SchedulerConfig:
        """Return the configuration of a scheduler for this engine."""
        assert self.config.prefill_chunk_len is not None and self.config.device is not None
        assert self.config.max_num_requests is not None
        device_type, stages = self.config.device.split(":")[0], self.config.pipeline_parallel
        return SchedulerConfig(
            num_blocks=self.memory.num_blocks, block_size=self.config.block_size,
            max_model_len=self.memory.max_model_len,
            prefill_chunk_len=self.config.prefill_chunk_len,
            max_num_requests=self.config.max_num_requests,
            tail_len=self.plan.tail_len if self.plan else 0,
            num_layers=self.model.num_layers, step_budget_s=_finite(self.config.step_budget_s),
            piece_rows=piece_rows(device_type, self.config.prefill_chunk_len),
            unit_len=unit_len(device_type, self.config.block_size),
            sparse_above=self._sparse_above,
            prior=prior_costs(self.model, self.config, self.plan).of_stage(stages),
            self_measurement_len=min(MEASURED_LEN[device_type], self.memory.max_model_len // 2),
            warms_sparse=device_type == "cuda",
            burst_s=BURST_S if device_type == "cuda" and stages == 1 else 0.0, tiers=self.tiers,
            num_stages=stages,
            cache_key=self.cache_key)

    @property
    def sparse_threshold(self) -> int:
        """Longest prompt that ``auto`` prefills densely, tokens: the checkpoint's, and on CPUs,
        whose dense attention is slow, less where a sparse prefill is predicted to be shorter."""
        threshold = self.model.sparse_threshold
        if self.plan is None or self.config.device != "cpu":
            return threshold
        assert self.config.prefill_chunk_len is not None
        return sparse_border(
            prior_costs(self.model, self.config, self.plan), threshold,
            tail_len=self.plan.tail_len, block_size=self.config.block_size,
            prefill_chunk_len=self.config.prefill_chunk_len)

    @property
    def _sparse_above(self) -> int | None:
        """Return the longest prompt that is prefilled densely, tokens; None: all are."""
        if self.plan is None:
            return None
        return 0 if self.config.attention == "sparse" else self.sparse_threshold


def decode_engine(encoded: bytes, config: EngineConfig) -> ResolvedEngine:
    """Return rank 0's engine as another rank has it: on its device, from its checkpoint.

    Args:
        config: of that rank, resolved.
    """
    engine = msgspec.msgpack.decode(encoded, type=ResolvedEngine, dec_hook=lambda kind, value: (
        Path(value) if issubclass(kind, Path) else value))
    here = replace(engine.config, device=config.device, num_threads=config.num_threads)
    path = engine.path if config.weights == "random" else resolve_checkpoint(config.model)
    return replace(engine, config=here, path=path)


def _finite(budget_s: float | None) -> float | None:
    return budget_s if budget_s is not None and math.isfinite(budget_s) else None


def plan_in_effect(
    config: EngineConfig, model: ModelConfig, plan: SparsityPlan | None, *, has_dca: bool,
) -> SparsityPlan | None:
    """Return the budgets: those found, or the built-in ones; None: always dense."""
    if not may_be_sparse(config.attention, has_plan=plan is not None, has_dca=has_dca):
        if config.recall is not None:
            raise LongspanError(f"recall {config.recall:g} is for sparse prefill, which this "
                                "checkpoint has no plan for; use attention 'sparse'")
        return None
    found = plan or SparsityPlan.default(model.num_layers, model.num_heads)
    return found if config.recall is None else replace(found, recall_target=config.recall)


def resolve_plan(path: Path, model: ModelConfig, config: EngineConfig) -> SparsityPlan | None:
    """Read the plan that the user or the checkpoint brings: the named file, else the one beside
    the checkpoint, else the released budgets in its config. None: there is none.

    Raises `LongspanError` when it was made for another model's shape, or calibrated on another's
    weights.
    """
    beside = path / "sparsity_plan.json"
    if config.sparsity_plan is not None:
        plan = SparsityPlan.load(config.sparsity_plan)
    elif beside.is_file():
        plan = SparsityPlan.load(beside)
    elif model.sparse_budgets is not None:
        plan = SparsityPlan.from_released(model.sparse_budgets, probe_last=model.sparse_probe_len)
    else:
        return None
    plan.check_fits(model.num_layers, model.num_heads)
    if config.weights == "checkpoint" and "model_hash" in plan.provenance:
        plan.check_model(weights_fingerprint(path))
    return plan
