"""Pipeline stages of one process."""

from __future__ import annotations

from dataclasses import dataclass

from longspan.model import CausalLM
from longspan.ops.types import PagedKV


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineStage:
    """A slice of the layers and the keys and values of those layers."""

    model: CausalLM
    caches: tuple[PagedKV, ...]
