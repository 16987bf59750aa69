"""A recipe: everything that makes one model, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from longspan.train.model import CausalLM
from longspan.train.phases import Phase


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A model, its phases, and the gates after each."""

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
