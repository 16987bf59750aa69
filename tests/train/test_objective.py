"""The preference loss equals its definition, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.train.batch import Batch
from longspan.train.loss import _chunk_loss
from longspan.train.objective import AnswerLogProbs, Preference, Targets
from longspan.train.world import ContextGroup

ROWS, LENGTH, VOCAB, WIDTH = 6, 20, 30, 8


def batch() -> Batch:
    """Two pairs, and a third that only fills the step up."""
    ids = torch.randint(0, VOCAB, (ROWS, LENGTH)).int()
    weights = torch.zeros(ROWS, LENGTH)
    for row in range(4):
        weights[row, 10 : 13 + row] = 1.0
    return Batch(ids, weights, torch.zeros(ROWS, LENGTH, dtype=torch.uint8),
                 torch.tensor([-9.0, -12.0, -14.0, -10.0, 0.0, 0.0]))


def naive(
    hidden: Tensor, head: Tensor, rows: Batch, beta: float, by_length: bool, sft_weight: float
) -> Tensor:
    logprobs = (hidden @ head.T).log_softmax(-1)[:, :-1]
    chosen = logprobs.gather(-1, rows.ids[:, 1:, None].long()).squeeze(-1)
    sums = (chosen * rows.weights[:, 1:]).sum(1)
    lengths = rows.weights.sum(1).clamp_min(1)
    assert rows.reference is not None
    gained = (sums - rows.reference) / (lengths if by_length else 1.0)
    loss = torch.zeros(())
    for pair in range(2):
        better, worse = 2 * pair, 2 * pair + 1
        loss = loss - F.logsigmoid(beta * (gained[better] - gained[worse])) / 2
        loss = loss - sft_weight * sums[better] / lengths[better] / 2
    return loss


@pytest.mark.parametrize(("by_length", "sft_weight"), [(False, 0.0), (True, 0.3)])
def test_preference_equals_its_definition(by_length: bool, sft_weight: float) -> None:
    rows = batch()
    hidden = torch.randn(ROWS, LENGTH, WIDTH, requires_grad=True)
    head = torch.randn(VOCAB, WIDTH, requires_grad=True)
    objective = Preference(_chunk_loss, 0.2, by_length, sft_weight)
    targets, group = Targets.of(rows), ContextGroup()
    total = objective.total(targets, group)
    assert total == 2
    loss, sums = objective(hidden, head, targets, total, group)
    loss.backward()
    ours = hidden.grad.clone(), head.grad.clone()
    hidden.grad = head.grad = None
    plain = naive(hidden, head, rows, 0.2, by_length, sft_weight)
    plain.backward()
    torch.testing.assert_close(ours[0], hidden.grad)
    torch.testing.assert_close(ours[1], head.grad)
    if not sft_weight:
        torch.testing.assert_close(sums["loss"], plain.detach())
    assert sums["pairs"] == 2 and 0 <= sums["right"] <= 2


def test_reference_is_the_answers_log_probability() -> None:
    rows = batch()
    hidden, head = torch.randn(ROWS, LENGTH, WIDTH), torch.randn(VOCAB, WIDTH)
    _, sums = AnswerLogProbs()(hidden, head, Targets.of(rows), torch.ones(()), ContextGroup())
    logprobs = (hidden @ head.T).log_softmax(-1)[:, :-1]
    chosen = logprobs.gather(-1, rows.ids[:, 1:, None].long()).squeeze(-1)
    torch.testing.assert_close(sums["logprobs"], (chosen * rows.weights[:, 1:]).sum(1))


def test_what_never_moved_has_no_margin() -> None:
    """With the reference of the model itself the loss is log 2."""
    rows = batch()
    hidden, head = torch.randn(ROWS, LENGTH, WIDTH), torch.randn(VOCAB, WIDTH)
    targets, group = Targets.of(rows), ContextGroup()
    _, found = AnswerLogProbs()(hidden, head, targets, torch.ones(()), group)
    same = Targets.of(Batch(rows.ids, rows.weights, rows.kinds, found["logprobs"]))
    objective = Preference(_chunk_loss, 0.1, False, 0.0)
    _, sums = objective(hidden, head, same, objective.total(same, group), group)
    assert sums["loss"].item() == pytest.approx(0.693147, abs=1e-5)
    assert sums["margin"].item() == pytest.approx(0, abs=1e-4)
