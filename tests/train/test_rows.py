"""Parquet rows: each used once, from any step on; too few, too large and broken ones are named."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from longspan.errors import LongspanError
from longspan.train.batch import ANSWER, FILLER
from longspan.train.phases import Phase
from longspan.train.rows import RowsFeed, is_rows_folder

PHASE = Phase(name="a", seq_len=256, rope_theta=1e4, num_tokens=2048, learning_rate=1e-3,
              tokens_per_step=512, shorter=(128,), full_share=0.75)


def write(folder: Path, count: int = 12, labels: bool = False) -> None:
    for length in (128, 256):
        ids = [[i + 1] * length for i in range(count)]
        columns: dict[str, object] = {"input_ids": ids}
        if labels:
            columns["labels"] = [[-100] * (length - 2) + [7, 7] for _ in ids]
        else:
            columns["loss_weights"] = [[1.0] * (length - 2) + [5.0, 5.0] for _ in ids]
            columns |= {"answer_starts": [[length - 2]] * count, "answer_stops": [[length]] * count}
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"train-{length}.parquet")


def open_feed(folder: Path, *phases: Phase, vocab_size: int = 64) -> RowsFeed:
    return RowsFeed.open(folder, phases or [PHASE], seed=3, vocab_size=vocab_size)


def test_each_row_is_used_once_from_any_step_on(tmp_path: Path) -> None:
    assert not is_rows_folder(tmp_path)
    write(tmp_path)
    assert is_rows_folder(tmp_path)
    feed = open_feed(tmp_path)
    batches = list(feed.batches(0, PHASE, 0))
    assert [tuple(b.ids.shape) for b in batches] == list(feed.schedule(0, PHASE))
    for length in (128, 256):
        seen = [int(i) for b in batches if b.ids.shape[1] == length for i in b.ids[:, 0]]
        assert len(seen) == len(set(seen))
    later = list(feed.batches(0, PHASE, 2))
    assert all((a.ids == b.ids).all() for a, b in zip(batches[2:], later, strict=True))
    assert batches[0].weights[0, -1] == 5 and batches[0].kinds[0, -1] == ANSWER
    assert batches[0].kinds[0, 0] == FILLER


def test_labels_stand_for_weights(tmp_path: Path) -> None:
    write(tmp_path, labels=True)
    batch = next(open_feed(tmp_path).batches(0, PHASE, 0))
    assert batch.weights[0].sum() == 2 and batch.weights[0, -1] == 1


def test_rows_that_do_not_go_with_the_run_are_named(tmp_path: Path) -> None:
    write(tmp_path, count=4)
    with pytest.raises(LongspanError, match="rows of 256 tokens, there are 4: make more"):
        open_feed(tmp_path)
    write(tmp_path)
    with pytest.raises(LongspanError, match="token 10 is beyond the model's 10"):
        open_feed(tmp_path, vocab_size=10)
    (tmp_path / "train-256.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(LongspanError, match=r"train-256\.parquet cannot be read"):
        open_feed(tmp_path)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"]}), tmp_path / "train-256.parquet")
    with pytest.raises(LongspanError, match="has columns text: input_ids and loss_weights"):
        open_feed(tmp_path)
