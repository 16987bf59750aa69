"""Samples of any length as steps: one a row, rows of like lengths together.

Rows are padded at their end to the next power of two. Under causal attention that needs no mask,
so every fast kernel computes it and no sample sees another; packing would save that padding (a
quarter of the tokens) for variable-length kernels and one more mask to trust.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from longspan.errors import LongspanError
from longspan.train.batch import ANSWER, Batch
from longspan.train.chat import Samples
from longspan.train.phases import Phase, Shape

MIN_ROW = 512
OTHER = 1
"""Kind of tokens that no answer has."""

Plan = list[tuple[int, list[int]]]
"""Steps: row length, and which groups of samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleFeed:
    """Samples of several stages, each seen once an epoch.

    Args:
        stages: samples of each phase.
        together: samples that form one group: 2 for pairs, whose rows follow one another.
    """

    stages: tuple[Samples, ...]
    tokens_per_step: int
    identity: Mapping[str, str]
    seed: int = 0
    epochs: int = 1
    together: int = 1
    reference: Tensor | None = None
    """fp32 [samples of the only stage]; see `Batch`."""
    held_out: Batch | None = None

    def row_length(self, index: int, group: int) -> int:
        """Return the length of the row that a group of samples needs."""
        first = group * self.together
        longest = int(self.stages[index].lengths[first : first + self.together].max())
        return max(MIN_ROW, 1 << (longest - 1).bit_length())

    def longest(self, index: int) -> int:
        """Return the longest row of a stage."""
        count = len(self.stages[index]) // self.together
        return max(self.row_length(index, group) for group in range(count))

    def plan(self, index: int) -> Plan:
        """Return the steps of a stage."""
        steps: Plan = []
        by_length: dict[int, list[int]] = {}
        for group in range(len(self.stages[index]) // self.together):
            by_length.setdefault(self.row_length(index, group), []).append(group)
        for epoch in range(self.epochs):
            rng = random.Random(f"{self.seed}/{index}/{epoch}")
            found: Plan = []
            for length, groups in sorted(by_length.items()):
                order = rng.sample(groups, len(groups))
                size = self.groups_in_step(length)
                found += [(length, order[i : i + size]) for i in range(0, len(order), size)]
            rng.shuffle(found)
            steps += found
        return steps

    def groups_in_step(self, length: int) -> int:
        """Return how many groups a step of rows of a length has."""
        return max(1, self.tokens_per_step // (length * self.together))

    def schedule(self, index: int, phase: Phase) -> Sequence[Shape]:
        """Rows and row length of every step of a phase."""
        return [(self.groups_in_step(length) * self.together, length)
                for length, _ in self.plan(index)]

    def batches(self, index: int, phase: Phase, first: int) -> Iterator[Batch]:
        """Batches of the steps from ``first`` on of a phase."""
        for length, groups in self.plan(index)[first:]:
            yield self.batch(index, length, groups)

    def batch(self, index: int, length: int, groups: Sequence[int]) -> Batch:
        """Rows of some groups; a step that has too few is filled with rows that count nothing."""
        num_rows = self.groups_in_step(length) * self.together
        ids = np.zeros((num_rows, length), np.int32)
        is_answer = np.zeros((num_rows, length), bool)
        reference = torch.zeros(num_rows)
        members = [group * self.together + i for group in groups for i in range(self.together)]
        for row, sample in enumerate(members):
            tokens, marks = self.stages[index].at(sample)
            ids[row, : len(tokens)] = tokens
            is_answer[row, : len(tokens)] = marks
        if self.reference is not None:
            reference[: len(members)] = self.reference[members]
        kinds = np.where(is_answer, ANSWER, OTHER).astype(np.uint8)
        return Batch(torch.from_numpy(ids), torch.from_numpy(is_answer.astype(np.float32)),
                     torch.from_numpy(kinds), reference)

    def phase(self, index: int, name: str, rope_theta: float, learning_rate: float) -> Phase:
        """Return a stage as a phase of a run."""
        longest = max(self.longest(i) for i in range(index + 1))
        num_tokens = sum(rows * length for rows, length in (
            (self.groups_in_step(length) * self.together, length)
            for length, _ in self.plan(index)))
        step = max(self.tokens_per_step, longest)
        return Phase(name=name, seq_len=longest, rope_theta=rope_theta,
                     num_tokens=max(num_tokens, step), learning_rate=learning_rate,
                     tokens_per_step=step)

    def with_reference(self, reference: Tensor) -> SampleFeed:
        """Return the same samples with their log-probabilities before training."""
        return replace(self, reference=reference)


def check_lengths(
    samples: Samples, places: Sequence[str], limit: int, what: str
) -> None:
    """Raise `LongspanError` naming the first sample that is too long."""
    too_long = np.flatnonzero(samples.lengths > limit)
    if len(too_long):
        first = int(too_long[0])
        raise LongspanError(
            f"{places[first]}: {int(samples.lengths[first]):,} tokens, at most {limit:,} in {what} "
            f"({len(too_long):,} of {len(samples):,} rows are longer): leave them out, or raise "
            "the limit")
