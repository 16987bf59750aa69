"""SparsityPlan: how much each head may attend to during sparse prefill, with provenance."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from longspan.config import check_recall, read_json
from longspan.errors import CheckpointError, LongspanError
from longspan.ops.types import Budget

SCHEMA_VERSION = 3
SelectionMode = Literal["tile", "paper"]
MOST = 2**31 - 1
"""The largest number that a plan may hold: kernels take 32 bits."""
_LEAST = {"probe_last": 1, "probe_strided": 0, "sink": 0, "local": 0, "tail_len": 0,
          "mean_near_len": 0, "num_scouts": 0, "most_scouts": 0,
          "scout_tiles": 1}
_BEFORE_SCOUTS = 1
"""Files of this schema were measured without scouts."""
_DENSE_TAIL = 2
"""Up to this schema the tail, by another name, attended to everything; now it selects for itself.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class SparsityPlan:
    """Budgets for every layer and query head, and the policy around them.

    Defaults are the engine's own policy; `paper` gives MInference's.
    """

    vertical: tuple[tuple[int, ...], ...]
    """[L][H] key columns kept."""
    slash: tuple[tuple[int, ...], ...]
    """[L][H] diagonals kept, tokens; in tile mode bought as whole tile diagonals."""
    mode: SelectionMode = "tile"
    budget_share: float = 1.0
    """The share of both budgets that is bought (tile mode)."""
    probe_last: int = 64
    """Last queries of a prefill chunk that estimate the pattern."""
    probe_strided: int = 0
    """Further probe queries, spread over the prefill chunk (tile mode)."""
    sink: int = 4
    """First columns, always kept; inside the vertical budget."""
    local: int = 100
    """Most recent diagonals, always kept; inside the slash budget."""
    mean_correction: bool = True
    """Dropped tiles take part as their mean key and mean value (tile mode)."""
    mean_near_len: int = 16_384
    """Tokens before a query tile within which every dropped tile has its own mean; farther on eight
    share one."""
    num_scouts: int = 128
    """Queries of a prefill chunk, for each head those least like its mean query, that are scored
    against every key, so that their query tiles get the key tiles they miss (tile mode); where
    there are a million keys."""
    most_scouts: int = 4096
    """With fewer keys there are more scouts, up to so many and to every eighth query."""
    scout_threshold: float = -2.0
    """A key tile is missed where one of its logits exceeds the LSE of what the scout keeps by more
    than this: 0 is right for heads that retrieve, diffuse ones need less."""
    scout_tiles: int = 64
    """Most key tiles that scouts bring to one query tile."""
    recall_target: float | None = None
    """Share of attention mass that every head and prefill chunk should keep: budgets are then
    multiples of those here, from a quarter to four times, and `scout_threshold` follows (tile
    mode). None: the budgets as they are."""
    tail_len: int = 1024
    """The prompt's last tokens, where the question stands, are a prefill chunk of their own: what
    is before them does not depend on the question, and their selection serves them alone."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Who measured this plan, on what: model hash, calibration length, recall, date."""

    def __post_init__(self) -> None:
        if self.mode not in ("tile", "paper"):
            raise LongspanError(f"sparsity plan: mode {self.mode!r} is not 'tile' or 'paper'")
        if [len(row) for row in self.vertical] != [len(row) for row in self.slash]:
            raise LongspanError("sparsity plan: vertical and slash differ in layers or heads")
        if any(not 0 <= value <= MOST for rows in (self.vertical, self.slash)
               for row in rows for value in row):
            raise LongspanError(f"sparsity plan: budgets must not be negative or above {MOST}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= MOST:  # a boolean is none
                raise LongspanError(f"sparsity plan: {name} is {value!r}, a whole number between "
                                    f"{least} and {MOST} is needed")
        if not isinstance(self.mean_correction, bool):
            raise LongspanError(f"sparsity plan: mean_correction is {self.mean_correction!r}, true "
                                "or false is needed")
        share = self.budget_share
        if type(share) not in (int, float) or not 0 < share <= 1:
            raise LongspanError(f"sparsity plan: budget_share is {share!r}, a number above 0 and "
                                "at most 1 is needed")
        threshold = self.scout_threshold
        if type(threshold) not in (int, float) or not math.isfinite(threshold):
            raise LongspanError(f"sparsity plan: scout_threshold is {threshold!r}, a finite number "
                                "is needed")
        if self.recall_target is not None:
            check_recall(self.recall_target)
        for name in ("mean_correction", "num_scouts", "recall_target"):
            if self.mode == "paper" and getattr(self, name):
                raise LongspanError(f"sparsity plan: {name} needs mode 'tile'")

    @classmethod
    def default(cls, num_layers: int, num_heads: int, vertical: int = 256,
                slash: int = 768) -> SparsityPlan:
        """Make a plan with the same budget for every head, for checkpoints without a plan. Scouts
        list more than elsewhere: that serves a real checkpoint better than larger budgets for all
        queries, at less cost (log.md, 2026-11-29)."""
        return cls(vertical=((vertical,) * num_heads,) * num_layers,
                   slash=((slash,) * num_heads,) * num_layers,
                   scout_threshold=-3.0, scout_tiles=128,
                   provenance={"source": "built-in default"})

    @classmethod
    def from_released(cls, budgets: Sequence[Mapping[str, Any]], *, probe_last: int = 64,
                      mode: SelectionMode = "tile") -> SparsityPlan:
        """Read the released format: for each layer {head: [type, vertical, slash, score]}.

        Half of the budgets is bought: with scouts that loses nothing (log.md, 2026-11-28).
        """
        rows = [_released_layer(index, layer) for index, layer in enumerate(budgets)]
        plan = cls(vertical=tuple(tuple(v for v, _ in row) for row in rows),
                   slash=tuple(tuple(s for _, s in row) for row in rows),
                   probe_last=probe_last, budget_share=0.5,
                   provenance={"source": "released per-head budgets"})
        return plan if mode == "tile" else plan.paper()

    @classmethod
    def load(cls, path: str | Path) -> SparsityPlan:
        """Read our JSON or a released ``sparse_attention_config.json``."""
        file = Path(path)
        if not file.is_file():
            raise CheckpointError(f"{file}: no such sparsity plan; leave it out for the default")
        raw = read_json(file)
        try:
            return cls.from_released(raw) if isinstance(raw, list) else cls._from_json(raw)
        except LongspanError as error:
            raise CheckpointError(f"{file}: {error}") from None

    @classmethod
    def _from_json(cls, raw: Any) -> SparsityPlan:
        if not isinstance(raw, dict):
            raise LongspanError(f"a JSON object is needed, not {type(raw).__name__}")
        version = raw.pop("schema_version", None)
        if version == _BEFORE_SCOUTS:
            raw = {"num_scouts": 0, **raw}
        if version in (_BEFORE_SCOUTS, _DENSE_TAIL):
            version = SCHEMA_VERSION
            if "dense_tail_len" in raw:
                raw["tail_len"] = raw.pop("dense_tail_len")
        if version != SCHEMA_VERSION:
            raise LongspanError(f"schema_version {version}, this program reads {SCHEMA_VERSION}; "
                                "calibrate again")
        unknown = sorted(set(raw) - {item.name for item in fields(cls)})
        if unknown:
            raise LongspanError(f"unknown fields {', '.join(unknown)}")
        return cls(**raw | {name: _budgets(name, raw.get(name)) for name in ("vertical", "slash")})

    def save(self, path: str | Path) -> None:
        """Write the JSON that `load` reads."""
        content = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def paper(self) -> SparsityPlan:
        """Apply MInference's policy to the same budgets: 30 sinks and 100 diagonals forced, a
        vertical budget of exactly 30 raised to 130, no correction, no scouts, no tail (arXiv
        2501.15383, section 5.3)."""
        vertical = tuple(tuple(130 if v == 30 else v for v in row) for row in self.vertical)
        return replace(self, mode="paper", vertical=vertical, budget_share=1.0, probe_strided=0,
                       sink=30, local=100, mean_correction=False, num_scouts=0,
                       recall_target=None, tail_len=0)

    def check_fits(self, num_layers: int, num_heads: int) -> None:
        """Raise `LongspanError` when the plan was made for another model's shape."""
        shape = (len(self.vertical), len(self.vertical[0]) if self.vertical else 0)
        if shape != (num_layers, num_heads) or any(len(row) != num_heads for row in self.vertical):
            raise LongspanError(
                f"sparsity plan is for {shape[0]} layers of {shape[1]} heads, the model has "
                f"{num_layers} of {num_heads}; calibrate a plan for this model or leave it out")

    def check_model(self, fingerprint: str) -> None:
        """Raise `LongspanError` when the plan was calibrated on other weights than these."""
        made_for = self.provenance.get("model_hash")
        if made_for and fingerprint and made_for != fingerprint:
            raise LongspanError(
                f"sparsity plan was calibrated for {self.provenance.get('model')} (weights "
                f"{str(made_for)[:8]}), this model's are {fingerprint[:8]}; calibrate a plan for "
                "it or leave it out")

    def layer(self, index: int) -> Budget:
        """Return the budgets of one layer in the form that the ops take."""
        vertical, slash = (
            values if self.budget_share == 1 else tuple(
                math.ceil(self.budget_share * value) for value in values)
            for values in (self.vertical[index], self.slash[index]))
        return Budget(
            vertical=vertical, slash=slash, mode=self.mode,
            probe_last=self.probe_last, probe_strided=self.probe_strided, sink=self.sink,
            local=self.local, num_scouts=self.num_scouts, most_scouts=self.most_scouts,
            scout_threshold=self._threshold, scout_tiles=self.scout_tiles,
            near_len=self.mean_near_len if self.mean_correction else None,
            recall=self.recall_target or 0.0)

    def first_sparse(self, index: int) -> int:
        """Return up to which position every head of a layer keeps all diagonals (tile mode)."""
        return min(self.layer(index).slash)

    @property
    def _threshold(self) -> float:
        """Return the scouts' threshold in effect: with a target, a key tile is missed where one of
        its keys alone would bring the row's recall below it."""
        target = self.recall_target
        return self.scout_threshold if target is None else math.log((1 - target) / target)


def needs_means(plan: SparsityPlan | None) -> bool:
    """Return whether an engine with this plan keeps the mean key and value of each KV block."""
    return plan is not None and plan.mean_correction


def _budgets(name: str, rows: Any) -> tuple[tuple[int, ...], ...]:
    try:
        if all(type(value) is int for row in rows for value in row):
            return tuple(tuple(row) for row in rows)
    except TypeError:
        pass
    raise LongspanError(f"{name} must be a list of layers, each a list of whole numbers")


def _released_layer(index: int, layer: Mapping[str, Any]) -> list[tuple[int, int]]:
    place = f"sparse attention config: layer {index}"
    if not isinstance(layer, Mapping):
        raise CheckpointError(f"{place} must be an object, {{head: [type, vertical, slash, ...]}}")
    rows: list[tuple[int, int]] = []
    for head in range(len(layer)):
        entry = layer.get(str(head))
        if entry is None:
            raise CheckpointError(f"{place} has {len(layer)} entries but none for head {head}")
        try:
            kind, vertical, slash = entry[0], int(entry[1]), int(entry[2])
        except (TypeError, ValueError, LookupError, OverflowError):
            raise CheckpointError(f"{place} head {head} is {entry!r}; "
                                  "[type, vertical, slash, score] is needed") from None
        if kind != "vertical_and_slash":
            raise CheckpointError(f"{place} head {head} has type {kind!r}; "
                                  "only vertical_and_slash is supported")
        rows.append((vertical, slash))
    return rows
