"""Log-probabilities of prompts on a GPU: as on the CPU, and never waiting."""

from __future__ import annotations

from array import array
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch

from longspan.engine.device.prompt_logprobs import PromptScorer
from longspan.engine.front.llm import LLM
from longspan.engine.request import SamplingParams
from longspan.engine.step import ScheduledSlice, ScoredTokens
from tests.gpu.syncs import no_syncs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("num_top", [0, 5])
def test_scoring_never_waits(num_top: int) -> None:
    hidden, weight = torch.randn(33, 64), torch.randn(264, 64)
    targets = array("i", range(30))
    item = ScheduledSlice(
        request_id="r", token_ids=array("i", [0] * 33), cached_len=7, prompt_len=100, block_ids=(),
        sparse=False, sampling=None,
        scored=ScoredTokens(first=10, token_ids=targets, num_top=num_top))
    found = {}
    for device in ("cpu", "cuda"):
        scorer, head = PromptScorer(num_rows=8), partial(torch.matmul, other=weight.to(device).T)
        rows = hidden.to(device)
        with no_syncs() if device == "cuda" else nullcontext():
            scorer.score(head, item, rows, 7)
        (found[device],) = scorer.take()
    assert found["cuda"].first == found["cpu"].first == 10
    for ours, wanted in zip(found["cuda"][2:], found["cpu"][2:], strict=True):
        torch.testing.assert_close(ours.cpu(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_nano_agrees_with_the_cpu(attention: str) -> None:
    text = "Once upon a time, there was a little girl who lived in a forest. " * 150
    params = SamplingParams(prompt_logprobs=1, max_tokens=0)
    found = []
    for device in ("cpu", "cuda"):
        with LLM("nano", device=device, max_model_len=8192, attention=attention, memory_gib=4.0,
                 prefill_chunk_len=1024) as llm:
            logprobs = llm.generate(text, params)[0].prompt_logprobs
            assert logprobs is not None and not np.isnan(logprobs[1:]).any()
            found.append(logprobs[1:])
    assert np.abs(found[0] - found[1]).mean() < 0.05  # bf16 and other kernels
