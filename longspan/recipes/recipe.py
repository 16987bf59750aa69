"""What recipes are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from longspan.config import ModelConfig
from longspan.data.documents import Reading
from longspan.data.filters import Filters
from longspan.data.rows import Mixture
from longspan.train.model import CausalLM
from longspan.train.phases import Phase


@dataclass(frozen=True, kw_only=True, slots=True)
class DataRules:
    """How text becomes documents, and documents rows."""

    reading: Reading = Reading()
    filters: Filters = Filters()
    mixture: Mixture = Mixture()
    held_out: float = 0.02
    """Share of the text that is set aside."""
    may_join: bool = False
    """Tasks may read short documents as one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """Fine-tuning in two stages and preference training, on rows made of the recipe's text."""

    short_rows: Mapping[int, int]
    """Conversations of the first stage, by their longest length, tokens."""
    mixed_rows: Mapping[int, int]
    """Those of the second stage."""
    sft_rate: float
    pairs: Mapping[int, int]
    """Preference pairs, likewise."""
    dpo_rate: float
    tokens_per_step: int = 262_144
    practice: tuple[Phase, ...] = ()
    """Phases of conversations with many questions each, composed while training, before the first
    stage."""
    practice_weights: Mapping[int, float] = field(default_factory=dict)
    """Loss weight of each token kind in them; a kind that is not named weighs 1."""
    practice_warmup: int = 40
    """Steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A model from nothing: its phases, the gates after each, and what follows them."""

    name: str
    vocab_size: int
    new_model: Callable[..., CausalLM]
    """A fresh model; takes ``vocab_size`` by name."""
    phases: tuple[Phase, ...]
    kind_weights: Mapping[int, float]
    """Loss weight of each token kind; a kind that is not named weighs 1."""
    warmup_steps: int
    gate_lengths: tuple[int, ...]
    """Lengths of the gate after the longest phase; other phases have their own length."""
    gate_documents: int
    """Documents of each length."""
    gate_needles: int
    """Needles, each with a question, in a document."""
    rules: DataRules
    tuning: Tuning


@dataclass(frozen=True, kw_only=True, slots=True)
class Extension:
    """A published base checkpoint to a longer context."""

    name: str
    config: ModelConfig
    """Sizes, for a dry run without the checkpoint."""
    phases: tuple[Phase, ...]
    num_gpus: int
    """GPUs that a dry run assumes unless told otherwise, and how many of them share a row."""
    context_parallel: int
