"""The model for lm-eval, by the shape of its interface: sums against transformers' logits."""

from __future__ import annotations

import abc
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from longspan.commands import lm_eval
from longspan.engine.front.llm import LLM
from longspan.engine.request import SamplingParams
from longspan.errors import InvalidRequestError, MissingDependencyError, PromptTooLongError
from tests.doubles import write_checkpoint

Loglikelihood = Callable[[list[int], int], tuple[float, bool]]
MAX_LEN = 128
TEXT = "The old men sang of Zürich, and bread. "
PAIRS = [("A question: ", "an answer"), ("Two ", " spaces"), ("", "from the start"), ("  ", "x"),
         (TEXT * 2, "yes"), (TEXT * 2, "no"), ("nothing", "")]


@dataclass
class Instance:
    """lm-eval's request."""

    args: tuple[Any, ...]


@dataclass
class CacheHook:
    """Keeps what it is told."""

    found: dict[tuple[str, Any], Any] = field(default_factory=dict)

    def add_partial(self, name: str, args: Any, answer: Any) -> None:
        """Remember."""
        self.found[name, args[0]] = answer


class FakeLM(abc.ABC):
    """What lm-eval's base class asks for."""

    def __init__(self) -> None:
        self.cache_hook = CacheHook()

    @abc.abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def loglikelihood_rolling(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until(self, requests: Any) -> Any: ...


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), max_position_embeddings=MAX_LEN)


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    with LLM(str(path), device="cpu", dtype="float32", block_size=8, prefill_chunk_len=32) as llm:
        yield llm


@pytest.fixture
def model(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lm_eval.api.model"].LM = FakeLM  # type: ignore[attr-defined]
    found = lm_eval.as_lm(llm)
    assert isinstance(found, FakeLM)
    return found


@pytest.fixture(scope="module")
def expected(path: Path) -> Loglikelihood:
    """Score the tokens from a place on, by transformers."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**json.loads((path / "config.json").read_text()))
    hf = Qwen2ForCausalLM.from_pretrained(path, config=config, dtype=torch.float32).eval()

    def run(tokens: list[int], start: int) -> tuple[float, bool]:
        with torch.inference_mode():
            after = hf(torch.tensor([tokens])).logits[0].log_softmax(-1)[start - 1:-1]
        wanted = torch.tensor(tokens[start:], dtype=torch.int64)
        return (float(after.gather(1, wanted[:, None]).sum()),
                bool((after.argmax(-1) == wanted).all()))

    return run


def ask(method: Callable[[Any], Any], *args: tuple[Any, ...]) -> Any:
    return method([Instance(each) for each in args])


def test_loglikelihood(
    model: Any, llm: LLM, expected: Loglikelihood, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_eval, "BATCH_LEN", 3)
    eos = llm.tokenizer.text_start
    found = ask(model.loglikelihood, *PAIRS)
    for (context, continuation), (value, is_greedy) in zip(PAIRS, found, strict=True):
        head = list(llm.tokenizer.encode(context.rstrip()))
        tokens = head + list(llm.tokenizer.encode(context + continuation))[len(head):]
        tokens, start = (tokens, len(head)) if head else ([eos, *tokens], 1)
        wanted, wanted_greedy = expected(tokens, start)
        assert value == pytest.approx(wanted, abs=1e-3) and is_greedy is wanted_greedy
    assert found[-1] == (0.0, True)
    assert model.cache_hook.found["loglikelihood", PAIRS[-1][0]] == (0.0, True)
    assert len(model.cache_hook.found) == len({context for context, _ in PAIRS})


def test_a_continuation_without_tokens_of_its_own_is_refused(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "_encode", lambda text: [1, 2])  # as where both make one token
    with pytest.raises(InvalidRequestError, match="'s' has no token of its own"):
        ask(model.loglikelihood, ("word", "s"))


def test_what_greedy_decoding_gives_is_greedy(model: Any, llm: LLM) -> None:
    prompt = list(llm.tokenizer.encode(TEXT))
    (answer,) = llm.generate(prompt, SamplingParams(max_tokens=8, ignore_eos=True))
    scored = [[*prompt, *answer.token_ids], [*prompt, *answer.token_ids[:-1], 77]]
    found = [lm_eval._sum(output, len(prompt)) for output in model._score(
        [(token_ids, len(prompt)) for token_ids in scored])]
    assert [is_greedy for _, is_greedy in found] == [True, False]
    assert found[0][0] > found[1][0]


def test_alternatives_share_their_context(model: Any, llm: LLM) -> None:
    before = llm.stats().num_cached_tokens
    ask(model.loglikelihood, *((TEXT * 2 + "Which?", word) for word in ("tea", "milk", "ale")))
    context_len = len(llm.tokenizer.encode(TEXT * 2 + "Which?"))
    assert llm.stats().num_cached_tokens - before >= 2 * ((context_len - 1) // 8 * 8)


def test_rolling_counts_each_token_once(model: Any, llm: LLM, expected: Loglikelihood) -> None:
    texts = [TEXT, TEXT * 9, "x"]
    found = ask(model.loglikelihood_rolling, *((text,) for text in texts))
    for text, value in zip(texts, found, strict=True):
        tokens, wanted, done = [llm.tokenizer.text_start, *llm.tokenizer.encode(text)], 0.0, 1
        while done < len(tokens):  # windows of MAX_LEN tokens, all but the first one full
            stop = min(len(tokens), max(MAX_LEN, done + MAX_LEN - 1))
            begin = max(0, stop - MAX_LEN)
            wanted += expected(tokens[begin:stop], done - begin)[0]
            done = stop
        assert value == pytest.approx(wanted, abs=2e-3)


@pytest.mark.parametrize(("num_tokens", "stops"), [
    (1, []), (2, [2]), (8, [8]), (9, [8, 9]), (15, [8, 15]), (23, [8, 15, 22, 23])])
def test_windows(num_tokens: int, stops: list[int]) -> None:
    found = list(lm_eval.windows(range(num_tokens), 8))
    assert [part[-1] + 1 for part, _ in found] == stops
    counted = [token for part, start in found for token in part[start:]]
    assert counted == list(range(1, num_tokens))
    assert all(start >= 1 and len(part) == min(8, num_tokens) for part, start in found)


def test_generate_until(model: Any, llm: LLM) -> None:
    (free,) = llm.generate(TEXT, SamplingParams(max_tokens=20))
    stop = free.text[3:5]
    found = ask(model.generate_until, (TEXT, {"max_gen_toks": 20, "do_sample": False}),
                (TEXT, {"until": [stop, ""], "max_new_tokens": 20, "temperature": 0.0}))
    assert found == [free.text, free.text[:free.text.index(stop)]]


def test_settings_of_tasks() -> None:
    assert lm_eval.sampling_params({"until": "\n", "do_sample": False, "temperature": 0.7}) == (
        SamplingParams(max_tokens=256, stop=("\n",)))
    assert lm_eval.sampling_params(
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_tokens": 7}) == (
            SamplingParams(max_tokens=7, temperature=0.7, top_p=0.9))
    with pytest.raises(InvalidRequestError, match="num_beams is no setting"):
        lm_eval.sampling_params({"num_beams": 2})


def test_chats(model: Any) -> None:
    text = model.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text == "<user>Hi<end><assistant>"
    with pytest.raises(InvalidRequestError, match="begun by the task"):
        model.apply_chat_template([{"role": "assistant", "content": "I"}],
                                  add_generation_prompt=False)


def test_nothing_is_cut_off(model: Any) -> None:
    assert model.max_length == MAX_LEN
    with pytest.raises(PromptTooLongError, match=f"over the limit of {MAX_LEN}"):
        ask(model.loglikelihood, (TEXT * 9, "yes"))
    with pytest.raises(PromptTooLongError):
        ask(model.generate_until, (TEXT, {"max_gen_toks": MAX_LEN}))


def test_without_lm_eval(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'longspan\[lm-eval\]'"):
        lm_eval.as_lm(llm)
