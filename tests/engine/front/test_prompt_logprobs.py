"""Log-probabilities of prompts: against transformers, however the prompt is cut, and against a
plain forward where attention is sparse."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longspan.attention.metadata import SequenceSlice, build_metadata
from longspan.attention.sparsity import SparsityPlan
from longspan.engine.control.chunking import chunk_stop, tail_start
from longspan.engine.control.ladder import Ladder
from longspan.engine.front.llm import LLM
from longspan.engine.request import RequestOutput, SamplingParams, TokenEvent
from longspan.errors import InvalidRequestError, PromptTooLongError, RequestFailedError
from longspan.model.linear import PlainLinear
from tests.doubles import write_checkpoint

Logprobs = Callable[[list[int]], Tensor]
BLOCK, CHUNK, TAIL, LAYERS, MAX_LEN = 8, 64, 12, 4, 512
SCORE = SamplingParams(prompt_logprobs=3, max_tokens=0)
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
DCA: dict[str, Any] = {
    "chunk_size": 96, "local_size": 32, "original_max_position_embeddings": 512}


def prompt_of(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(256, (length,), generator=generator).tolist()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), max_position_embeddings=MAX_LEN)


@pytest.fixture(scope="module")
def expected(path: Path) -> Logprobs:
    """[T, V] after each token of a text, by transformers."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**json.loads((path / "config.json").read_text()))
    model = Qwen2ForCausalLM.from_pretrained(path, config=config, dtype=torch.float32).eval()

    def run(tokens: list[int]) -> Tensor:
        with torch.inference_mode():
            return model(torch.tensor([tokens])).logits[0].log_softmax(-1)

    return run


def load(path: Path, **options: Any) -> LLM:
    return LLM(str(path), **{"device": "cpu", "dtype": "float32", "block_size": BLOCK,
                             "prefill_chunk_len": CHUNK, **options})


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    with load(path) as llm:
        yield llm


def check(output: RequestOutput, prompt: list[int], after: Tensor, start: int = 1) -> None:
    """Everything that was asked for is there and right, and nothing else."""
    found, alternatives = output.prompt_logprobs, output.prompt_alternatives
    assert found is not None and alternatives is not None
    assert found.dtype == np.float32 and found.shape == (len(prompt),)
    assert np.isnan(found[:start]).all() and (alternatives.top_ids[:start] == -1).all()
    places = torch.tensor(prompt[start:], dtype=torch.int64)
    wanted = after[start - 1:-1].gather(1, places[:, None])[:, 0]
    np.testing.assert_allclose(found[start:], wanted, atol=2e-4, rtol=1e-4)
    top, ids = after[start - 1:-1].topk(3)
    np.testing.assert_allclose(alternatives.top_logprobs[start:], top, atol=2e-4, rtol=1e-4)
    assert (alternatives.top_ids[start:] != ids.numpy()).sum() <= 2  # two may be nearly the same
    np.testing.assert_array_equal(alternatives.logprobs, found)


@pytest.mark.parametrize("options", [
    {}, {"prefill_chunk_len": 16}, {"prefill_chunk_len": 512}, {"step_budget_s": 1e-6},
    {"max_num_requests": 1}], ids=str)
def test_agrees_with_transformers_however_the_prompt_is_cut(
    path: Path, expected: Logprobs, options: dict[str, Any],
) -> None:
    prompts = [prompt_of(length) for length in (1, 2, 15, 64, 65, 211)]
    with load(path, **options) as llm:
        llm._runner._scorer._num_rows = 7
        outputs = llm.generate(prompts, SCORE)
    for prompt, output in zip(prompts, outputs, strict=True):
        check(output, prompt, expected(prompt))
        assert (output.text, output.token_ids, output.finish_reason) == ("", (), "length")
        assert output.ttft_s is None and output.num_prompt_tokens == len(prompt)


def test_completions_and_neighbours_are_what_they_are_without(
    llm: LLM, expected: Logprobs
) -> None:
    prompts = [prompt_of(length) for length in (100, 101, 102)]
    plain = [llm.generate(prompt, PARAMS)[0].token_ids for prompt in prompts]
    scoring = replace(PARAMS, prompt_logprobs=3, logprobs=2)
    outputs = llm.generate(prompts, [scoring, PARAMS, scoring])
    assert [output.token_ids for output in outputs] == plain
    assert outputs[1].prompt_logprobs is None and outputs[1].prompt_alternatives is None
    for index in (0, 2):
        check(outputs[index], prompts[index], expected(prompts[index]))
        assert len(outputs[index].logprobs) > 0


def test_a_stream_has_them_on_its_first_event(llm: LLM, expected: Logprobs) -> None:
    prompt = prompt_of(77)
    events = [event for event in llm.stream(prompt, replace(PARAMS, prompt_logprobs=0))
              if isinstance(event, TokenEvent)]
    assert [event.prompt_logprobs is not None for event in events] == [True] + [False] * 5
    output = events[-1].output
    assert events[0].prompt_logprobs is not None and output is not None
    np.testing.assert_array_equal(events[0].prompt_logprobs.logprobs, output.prompt_logprobs)
    assert output.prompt_alternatives is None  # none were asked for


def test_the_prefix_cache_gives_what_needs_no_logits(path: Path, expected: Logprobs) -> None:
    prompt = prompt_of(150)
    after = expected(prompt)
    with load(path) as llm:
        first, again = (llm.generate(prompt, SCORE)[0] for _ in range(2))
        for output in (first, again):
            check(output, prompt, after)
            assert output.num_cached_tokens == 0
        # Its blocks are there for all others.
        assert llm.generate(prompt, PARAMS)[0].num_cached_tokens == 144
        for start, cached in ((100, 96), (97, 96), (96, 88), (150, 144), (1, 0), (9, 8)):
            params = replace(SCORE, prompt_logprobs_start=start)
            (output,) = llm.generate(prompt, params)
            assert output.num_cached_tokens == cached, start
            check(output, prompt, after, start)


def test_what_runs_together_shares_the_prefix_before_the_start(
    path: Path, expected: Logprobs
) -> None:
    prompts = [prompt_of(120) + prompt_of(length) for length in (5, 6, 7)]
    with load(path) as llm:
        outputs = llm.generate(prompts, replace(SCORE, prompt_logprobs_start=120))
    assert [output.num_cached_tokens for output in outputs] == [0, 112, 112]
    for prompt, output in zip(prompts, outputs, strict=True):
        check(output, prompt, expected(prompt), 120)


def test_a_token_that_ends_the_completion_counts(llm: LLM) -> None:
    """Clients find the prompt's in front of as many as there are sampled tokens."""
    free = llm.generate(prompt_of(40), PARAMS)[0].token_ids
    for token, num in ((free[0], 1), (free[2], 1 + free.index(free[2]))):
        params = replace(PARAMS, stop_token_ids=(token,), logprobs=0)
        assert len(llm.generate(prompt_of(40), params)[0].logprobs) == num - 1
        (output,) = llm.generate(prompt_of(40), replace(params, prompt_logprobs=0))
        assert [item.token_id for item in output.logprobs] == list(output.token_ids)
        assert (len(output.logprobs), output.finish_reason) == (num, "stop")


# -- sparse ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sparse_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_checkpoint(tmp_path_factory.mktemp("sparse"), num_hidden_layers=LAYERS,
                            dual_chunk_attention_config=DCA)
    plan = replace(
        SparsityPlan.default(LAYERS, 4), vertical=((8,) * 4,) * LAYERS, slash=((16,) * 4,) * LAYERS,
        tail_len=TAIL, probe_last=8, probe_strided=4, local=8)
    plan.save(path / "sparsity_plan.json")
    return path


def load_sparse(path: Path, rows: int = 16, **options: Any) -> LLM:
    """Several pieces in chunks of a test's size."""
    llm = load(path, attention="sparse", max_model_len=MAX_LEN, **options)
    config = llm._loop._scheduler._planner._config
    object.__setattr__(config, "piece_rows", rows)
    llm._runner._chunk._rows = rows
    return llm


def forward(llm: LLM, prompt: list[int]) -> Tensor:
    """[T, V] after each token: chunk by chunk, each in one pass through all layers and rows."""
    runner, (stage,) = llm._runner, llm._runner._stages
    blocks, start, found = list(range(MAX_LEN // BLOCK)), 0, list[Tensor]()
    while start < len(prompt):
        stop = chunk_stop(start, len(prompt), Ladder(longest=CHUNK),
                          tail_start(len(prompt), TAIL, BLOCK))
        metadata = build_metadata(
            [SequenceSlice(query_len=stop - start, cached_len=start, prompt_len=len(prompt),
                           block_ids=blocks, sparse=True)],
            block_size=BLOCK, head_dim=runner._head_dim, dca=runner._dca, device="cpu")
        with torch.inference_mode():
            hidden = stage.model(torch.tensor(prompt[start:stop]), metadata, stage.caches)
            found.append(stage.model.logits(hidden).log_softmax(-1))
        start = stop
    return torch.cat(found)


@pytest.mark.parametrize("options", [{}, {"step_budget_s": 1e-6}, {"rows": 64}], ids=str)
def test_sparse_agrees_with_the_forward(sparse_path: Path, options: dict[str, Any]) -> None:
    prompts = [prompt_of(length) for length in (65, 128, 211, 13)]
    with load_sparse(sparse_path) as llm:
        after = [forward(llm, prompt) for prompt in prompts]
    with load_sparse(sparse_path, **options) as llm:
        outputs = llm.generate(prompts, SCORE)
        late = llm.generate(prompts[2], replace(SCORE, prompt_logprobs_start=150))[0]
    for prompt, output, rows in zip(prompts, outputs, after, strict=True):
        check(output, prompt, rows)
    assert outputs[2].density is not None and outputs[2].density < 1
    check(late, prompts[2], after[2], 150)
    assert late.num_cached_tokens == 128


# -- refusals and faults ---------------------------------------------------------------------------


@pytest.mark.parametrize(("values", "words"), [
    ({"prompt_logprobs": 21}, "prompt_logprobs is 21; it must be None or an integer from 0 to 20"),
    ({"prompt_logprobs": -1}, "prompt_logprobs is -1"),
    ({"prompt_logprobs": True}, "prompt_logprobs is True"),
    ({"max_tokens": 0}, "it must be a positive integer, or 0 with prompt_logprobs"),
    ({"max_tokens": -1, "prompt_logprobs": 0}, "max_tokens is -1"),
    ({"prompt_logprobs_start": 3}, "prompt_logprobs_start is 3; it must be 0, or with"),
    ({"prompt_logprobs_start": -3, "prompt_logprobs": 0}, "prompt_logprobs_start is -3"),
], ids=str)
def test_wrong_parameters_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        SamplingParams(**values)


def test_what_the_prompt_does_not_have_is_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="start is 9, but the prompt has 8 tokens"):
        llm.generate(prompt_of(8), replace(SCORE, prompt_logprobs_start=9))
    with pytest.raises(InvalidRequestError, match="2 prompts and 1 sampling_params"):
        llm.generate([[1], [2]], [SCORE])
    full = prompt_of(MAX_LEN)
    assert llm.generate(full, SCORE)[0].prompt_logprobs is not None
    with pytest.raises(PromptTooLongError):
        llm.generate([*full, 1], SCORE)


def test_more_alternatives_than_tokens_are_refused(tmp_path: Path) -> None:
    with load(write_checkpoint(tmp_path)) as llm:
        llm._intake = replace(llm._intake, vocab_size=2)
        with pytest.raises(InvalidRequestError, match="prompt_logprobs asks for 3 alternatives"):
            llm.generate([1], SCORE)


def test_a_log_probability_that_is_no_number_ends_the_request(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would look like one that nobody asked for."""
    with load(path) as llm:
        take = llm._runner._scorer.take
        monkeypatch.setattr(llm._runner._scorer, "take", lambda: tuple(
            rows._replace(logprobs=rows.logprobs * torch.nan) for rows in take()))
        with pytest.raises(RequestFailedError, match="not finite"):
            llm.generate(prompt_of(150), SCORE)
        assert llm._loop.is_idle
        assert llm.generate(prompt_of(20), PARAMS)[0].finish_reason == "length"


def test_numbers_that_are_not_finite_end_the_request(tmp_path: Path) -> None:
    with load(write_checkpoint(tmp_path)) as llm:
        embedding = llm._runner._stages[0].model.embed_tokens
        assert isinstance(embedding, PlainLinear)
        weight = embedding.weight
        weight[7] = torch.nan  # a logit of every row
        with pytest.raises(RequestFailedError, match="not finite"):
            llm.generate(prompt_of(150), SCORE)
        weight[7] = 0.0
        assert llm.generate(prompt_of(150), SCORE)[0].finish_reason == "length"
