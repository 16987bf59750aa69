"""The head on a few rows at a time: what is kept, and how much there is at once."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
import torch
from torch import Tensor

from longspan.engine.device.memory import ATTENTION_SCRATCH_BYTES, LOGIT_BYTES, head_rows
from longspan.engine.device.prompt_logprobs import PromptScorer
from longspan.engine.step import ScheduledSlice, ScoredTokens

VOCAB, START = 40, 5


@pytest.mark.parametrize("vocab_size", [40, 4_096, 151_936, 10**9])
def test_rows_of_the_head_fit_what_attention_leaves(vocab_size: int) -> None:
    rows = head_rows(vocab_size)
    assert rows == 1 or rows * vocab_size * LOGIT_BYTES <= ATTENTION_SCRATCH_BYTES
    assert rows >= 1 and (vocab_size > 151_936 or rows >= 200)  # enough for a product's speed


@pytest.mark.parametrize("first", [START + 1, START + 4])
def test_pieces_of_a_slice_give_what_all_of_it_gives(first: int) -> None:
    """Rows of tokens 5 to 24, asked for those from ``first`` to 23."""
    hidden, weight = torch.randn(20, 8), torch.randn(VOCAB, 8)
    token_ids = array("i", torch.randint(VOCAB, (24 - first,)).tolist())
    item = ScheduledSlice(
        request_id="r", token_ids=array("i", [0] * 20), cached_len=START, prompt_len=30,
        block_ids=(), sparse=False, sampling=None,
        scored=ScoredTokens(first=first, token_ids=token_ids, num_top=3))
    scorer, lens = PromptScorer(num_rows=6), list[int]()

    def head(rows: Tensor) -> Tensor:
        lens.append(len(rows))
        return rows @ weight.T

    for begin, end in ((0, 1), (1, 9), (9, 18), (18, 20)):  # the last one has nothing to score
        scorer.score(head, item, hidden[begin:end], START + begin)
    found = [rows.as_message() for rows in scorer.take()]
    assert max(lens) == 6 and sum(lens) == len(token_ids) and scorer.take() == ()
    places = [part.first + index for part in found
              for index in range(len(part.logprobs) // 4)]
    assert places == list(range(first, 24))
    after = (hidden @ weight.T).log_softmax(-1)[first - 1 - START : 23 - START]
    wanted = after.gather(1, torch.tensor(token_ids)[:, None].long())[:, 0]
    ours = np.concatenate([np.frombuffer(part.logprobs, np.float32) for part in found])
    np.testing.assert_allclose(ours, wanted, atol=1e-5)
    ids = np.concatenate([np.frombuffer(part.top_ids, np.int32) for part in found])
    np.testing.assert_array_equal(ids.reshape(-1, 3), after.topk(3).indices)
