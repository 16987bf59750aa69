"""Packing a step: tokens, rows that sample, parameters."""

from __future__ import annotations

from array import array

import torch

from longspan.engine.device.batch import build_batch
from longspan.engine.step import RowSampling, ScheduledBatch, ScheduledSlice

GREEDY = RowSampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=1)
WARM = RowSampling(temperature=0.5, top_k=4, top_p=0.9, min_p=0.1, seed=2**62)


def make_slice(
    token_ids: list[int], cached_len: int, sampling: RowSampling | None,
) -> ScheduledSlice:
    return ScheduledSlice(
        request_id="a", token_ids=array("i", token_ids), cached_len=cached_len, prompt_len=6,
        block_ids=[3, 5], sparse=False, sampling=sampling)


def test_packs_slices_one_after_the_other() -> None:
    step = ScheduledBatch(step_id=0, slices=(
        make_slice([1, 2, 3, 4], 0, None), make_slice([5, 6], 4, WARM), make_slice([7], 6, GREEDY)))
    batch = build_batch(step, block_size=4, head_dim=8, dca=None, device="cpu")
    assert batch.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert batch.metadata.positions.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert batch.metadata.slot_mapping.tolist() == [12, 13, 14, 15, 20, 21, 22]
    rows = batch.metadata.output_rows
    assert rows is not None and rows.tolist() == [5, 6]
    assert batch.sampling.position.tolist() == [6, 7]
    assert batch.sampling.seed.tolist() == [2**62, 1]
    assert batch.sampling.top_k.tolist() == [4, 0]
    assert not batch.all_greedy


def test_a_step_may_sample_nothing() -> None:
    step = ScheduledBatch(step_id=0, slices=(make_slice([1, 2], 0, None),))
    batch = build_batch(step, block_size=4, head_dim=8, dca=None, device="cpu")
    rows = batch.metadata.output_rows
    assert rows is not None and rows.numel() == 0 and batch.all_greedy


def test_slices_that_run_ahead_take_their_input_from_the_device() -> None:
    ahead = ScheduledSlice(
        request_id="b", slot=2, token_ids=array("i"), cached_len=6, prompt_len=6,
        block_ids=[3, 5], sparse=False, sampling=GREEDY)
    step = ScheduledBatch(step_id=0, slices=(make_slice([5, 6], 4, None), ahead))
    batch = build_batch(step, block_size=4, head_dim=8, dca=None, device="cpu",
                        last_tokens=torch.tensor([10, 11, 12, 13]))
    assert batch.token_ids.tolist() == [5, 6, 12]
    assert batch.slots.tolist() == [2] and batch.sampling.position.tolist() == [7]
