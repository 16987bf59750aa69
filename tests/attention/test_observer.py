"""What an observer of attention is told, and that watching changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from longspan.attention.layer import DualChunkAttention
from longspan.attention.metadata import PrefillSlice, SequenceSlice, build_metadata
from longspan.attention.observer import AttendedRows, AttentionObserver, Region
from longspan.bench.ops.inputs import LayerInput, make_input
from longspan.ops import reference
from longspan.ops.types import Selection
from tests.bench.shapes_for_tests import tiny_shape
from tests.conftest import assert_close

SHAPE = tiny_shape()
LENGTH, START = 1500, 900


class Notes(AttentionObserver):
    """Keeps everything."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self.rows: list[AttendedRows] = []
        self._is_inside = False

    @contextmanager
    def region(self, name: Region) -> Iterator[None]:
        self.regions.append(name)
        assert not self._is_inside
        self._is_inside = True
        yield
        self._is_inside = False

    def attended(self, rows: AttendedRows) -> None:
        assert not self._is_inside
        self.rows.append(rows)


@pytest.fixture(scope="module")
def item() -> LayerInput:
    return make_input(SHAPE, LENGTH, "random", "cpu")


def prefill(item: LayerInput, observer: AttentionObserver | None, *, sparse: bool = True) -> Tensor:
    """The rest of a prompt whose first tokens are cached, and the two tokens that follow it."""
    model = SHAPE.model
    core = DualChunkAttention(
        layer_idx=2, num_heads=model.num_heads, num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim, rotary=item.rotary, plan=SHAPE.plan, observer=observer)
    outs = []
    torch.manual_seed(0)
    for start, stop in ((START, LENGTH - 2), (LENGTH - 2, LENGTH - 1), (LENGTH - 1, LENGTH)):
        metadata = build_metadata(
            [SequenceSlice(query_len=stop - start, cached_len=start, prompt_len=LENGTH - 2,
                           block_ids=range(12), sparse=sparse)],
            block_size=128, head_dim=model.head_dim, dca=model.dca, device="cpu")
        q = torch.randn(stop - start, model.num_heads, model.head_dim)
        outs.append(core(q, item.k[start:stop], item.v[start:stop], item.cache, metadata))
    return torch.cat(outs)


def test_each_row_of_a_prefill_is_told_once_and_nothing_changes(item: LayerInput) -> None:
    notes = Notes()
    assert torch.equal(prefill(item, notes), prefill(item, None))
    assert [(rows.start, rows.q.shape[0], rows.selection is not None) for rows in notes.rows] == [
        (900, 124, False), (1024, 384, True), (1408, 90, False)]
    assert notes.regions == ["selection", "dense", "sparse", "dense"]
    assert {rows.layer_idx for rows in notes.rows} == {2}
    for rows in notes.rows:
        assert rows.lse.shape == rows.q.shape[:2] and rows.item.prompt_len == LENGTH - 2
        _, full = reference.prefill_attention(
            rows.q, item.cache, rows.item.block_table, rows.start, item.rotary, rows.item.scale)
        assert_close(rows.full_lse(), full)
        if rows.selection is None:
            assert torch.equal(rows.recall(), torch.ones_like(rows.lse))
        else:
            assert 0 < float(rows.recall().amin()) <= float(rows.recall().amax()) <= 1.0001


def test_dense_prefill_and_the_defaults(item: LayerInput) -> None:
    notes = Notes()
    out = prefill(item, notes, sparse=False)
    assert notes.regions == ["dense"] and len(notes.rows) == 1
    assert torch.equal(prefill(item, AttentionObserver(), sparse=False), out)


def test_recall_is_the_mass_that_is_kept(item: LayerInput) -> None:
    q = item.make_queries(256, 256)
    everything = Selection(torch.full((4, 1), -1), torch.tensor([[0, -128, -256, -384]] * 4), 128,
                           True)
    half = everything._replace(offsets=torch.tensor([[0, 128, 128, 128]] * 4))
    part = PrefillSlice(start=0, query_len=256, cached_len=256, prompt_len=2000, sparse=True,
                        block_table=item.block_table[:4], scale=item.scale)
    args = (q, item.cache, part.block_table, 256, item.rotary, item.scale)
    for correction in (False, True):
        means = []
        for selection in (everything, half):
            _, lse, _ = reference.sparse_prefill_attention(*args, selection, correction)
            rows = AttendedRows(
                layer_idx=0, q=q, start=256, cache=item.cache, item=part, rotary=item.rotary,
                selection=selection, correction=correction, lse=lse)
            means.append(rows.recall().mean(0).tolist())
        assert means[0] == pytest.approx([1] * 4, abs=1e-5)
        assert all(0.05 < mean < 0.5 for mean in means[1])
