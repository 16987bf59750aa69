"""Penalties, bias, log-probabilities and grammars on a GPU: as on the CPU, and never waiting."""

from __future__ import annotations

import random
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch

from longspan.engine.device.sampling import SampledTokens, Sampler
from longspan.engine.step import RowSampling, SamplingExtras, ScheduledSlice
from longspan.engine.text.grammar import Grammars
from longspan.engine.text.tokenizer import Tokenizer
from longspan.ops.sampling.sample import SamplingRows
from tests.doubles import make_request, write_tokenizer
from tests.gpu.syncs import no_syncs

pytestmark = pytest.mark.gpu

VOCAB, NUM_STEPS = 264, 20
PROMPT = [3, 4, 5, 4]
PARAMS: list[dict[str, Any]] = [
    {}, {"presence_penalty": 1.0, "logprobs": 3}, {"frequency_penalty": 0.7},
    {"repetition_penalty": 1.5, "logit_bias": {7: 3.0, 9: -100.0}}, {"logprobs": 0},
    {"min_tokens": 5, "stop_token_ids": (1, 2)}, {"json_schema": '{"type": "object"}'}]


def make_slice(slot: int, step: int, token: int) -> ScheduledSlice:
    request = make_request("r", PROMPT, max_tokens=50, **PARAMS[slot])
    return ScheduledSlice(
        request_id="r", slot=slot, prompt_len=len(PROMPT), block_ids=(), sparse=False,
        token_ids=array("i", [token] if step else PROMPT),
        cached_len=len(PROMPT) + step - 1 if step else 0,
        sampling=RowSampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=1),
        extras=None if step else SamplingExtras.of(request))


def rows(count: int, device: str) -> SamplingRows:
    zeros = torch.zeros(count, dtype=torch.int64, device=device)
    ones = torch.ones(count, device=device)
    return SamplingRows(temperature=0 * ones, top_k=zeros, top_p=ones, min_p=0 * ones, seed=zeros,
                        position=zeros)


def test_a_gpu_chooses_as_a_cpu_without_waiting(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    samplers = {device: Sampler(vocab_size=VOCAB, device=device,
                                grammars=lambda: Grammars(tokenizer, VOCAB))
                for device in ("cpu", "cuda")}
    generator, rng = torch.Generator().manual_seed(3), random.Random(3)
    tokens = [0] * len(PARAMS)
    for step in range(NUM_STEPS):
        order = rng.sample(range(len(PARAMS)), len(PARAMS))
        items = [make_slice(slot, step, tokens[slot]) for slot in order]
        logits = 4 * torch.randn(len(items), VOCAB, generator=generator)
        on_gpu, of_gpu = logits.cuda(), rows(len(items), "cuda")
        found: dict[str, SampledTokens] = {}
        with no_syncs():
            found["cuda"] = samplers["cuda"].sample(on_gpu, items, of_gpu, all_greedy=True)
        found["cpu"] = samplers["cpu"].sample(logits, items, rows(len(items), "cpu"),
                                              all_greedy=True)
        wanted, logprobs = found["cpu"].as_tuples()
        chosen, others = found["cuda"].cpu().as_tuples()
        assert chosen == wanted
        for mine, other in zip(logprobs, others, strict=True):
            assert (mine is None) == (other is None)
            if mine is not None and other is not None:
                assert mine.top_ids == other.top_ids
                assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)
        for slot, token in zip(order, wanted, strict=True):
            tokens[slot] = token
    assert tokens[-1] >= 0
