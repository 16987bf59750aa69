"""Penalties, masks and log-probabilities against plain loops over tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from longspan.ops.sampling.logits import Penalties, keep_allowed, penalize, top_logprobs
from tests.conftest import assert_close

VOCAB = 37  # no multiple of 32


def plain_penalties(
    logits: list[float], prompt: list[int], output: list[int], presence: float, frequency: float,
    repetition: float,
) -> list[float]:
    """Hugging Face's RepetitionPenaltyLogitsProcessor, then OpenAI's formula."""
    changed = list(logits)
    for token in {*prompt, *output}:
        changed[token] *= repetition if changed[token] < 0 else 1 / repetition
    for token in set(output):
        changed[token] -= frequency * output.count(token) + presence
    return changed


def histories(rows: int, device: str) -> tuple[list[list[int]], list[list[int]], Tensor, Tensor]:
    """Prompts and completions, as lists and as tables."""
    prompts = torch.randint(VOCAB, (rows, 9)).tolist()
    outputs = [torch.randint(VOCAB, (length,)).tolist() for length in range(0, 30 * rows, 30)]
    counts = torch.stack([
        torch.tensor(output, dtype=torch.long).bincount(minlength=VOCAB) for output in outputs])
    in_prompt = torch.stack([
        torch.tensor(prompt).bincount(minlength=VOCAB) > 0 for prompt in prompts])
    return prompts, outputs, counts.int().to(device), in_prompt.to(device)


@pytest.mark.parametrize("values", [
    (0.0, 0.0, 1.0), (0.7, 0.0, 1.0), (0.0, 0.3, 1.0), (0.0, 0.0, 1.3), (-2.0, 1.5, 0.8)])
def test_penalties_follow_their_definition(device: str, values: tuple[float, ...]) -> None:
    logits = torch.randn(3, VOCAB) * 4
    prompts, outputs, counts, in_prompt = histories(3, device)
    columns = [torch.full((3,), value, device=device) for value in values]
    found = penalize(logits.to(device), counts, in_prompt, Penalties(*columns))
    wanted = torch.tensor([
        plain_penalties(row, prompt, output, *values)
        for row, prompt, output in zip(logits.tolist(), prompts, outputs, strict=True)])
    assert_close(found.cpu(), wanted)


def test_rows_have_their_own_penalties(device: str) -> None:
    logits = torch.randn(2, VOCAB, device=device)
    *_, counts, in_prompt = histories(2, device)
    penalties = Penalties(*(torch.tensor(column, device=device)
                            for column in ([0.0, 1.0], [0.0, 0.5], [1.0, 2.0])))
    found = penalize(logits, counts, in_prompt, penalties)
    assert torch.equal(found[0], logits[0])
    assert not torch.equal(found[1], logits[1])


@pytest.mark.parametrize("vocab", [31, 32, 33, 100])
def test_only_allowed_tokens_are_left(device: str, vocab: int) -> None:
    logits = torch.randn(2, vocab, device=device)
    allowed = [[0, 5, 30], [vocab - 1]]
    bits = torch.zeros(2, math.ceil(vocab / 32), dtype=torch.int64)
    for row, tokens in enumerate(allowed):
        for token in tokens:
            bits[row, token // 32] |= 1 << token % 32
    words = (bits - (bits >> 31 << 32)).int()  # bit 31 is the sign
    found = keep_allowed(logits, words.to(device))
    for row, tokens in enumerate(allowed):
        assert found[row].isfinite().nonzero().flatten().tolist() == tokens
        assert torch.equal(found[row, tokens], logits[row, tokens])


@pytest.mark.parametrize("num_top", [0, 1, 5])
def test_logprobs_of_all_and_of_the_best(device: str, num_top: int) -> None:
    logits = torch.randn(3, VOCAB) * 3
    found, ids, values = top_logprobs(logits.to(device), num_top)
    wanted = (logits.double() - logits.double().exp().sum(dim=1, keepdim=True).log()).float()
    assert_close(found.cpu(), wanted)
    order = logits.argsort(dim=1, descending=True)[:, :num_top]
    assert torch.equal(ids.cpu(), order)
    assert torch.equal(values, found.gather(1, ids))


def test_a_mask_hides_no_broken_model() -> None:
    logits = torch.tensor([[1.0, math.nan, math.inf, -math.inf, 5.0]])
    found = keep_allowed(logits, torch.tensor([[1]], dtype=torch.int32))
    assert found.isnan().tolist() == [[False, True, False, False, False]]
    assert found[0, [0, 2, 3, 4]].tolist() == [1.0, math.inf, -math.inf, -math.inf]
