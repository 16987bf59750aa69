"""A model for lm-eval (EleutherAI's lm-evaluation-harness), computed by `LLM` in this process.

``lm_eval.simple_evaluate(model=as_lm(llm), tasks=[...])`` runs its tasks. lm-eval is needed for
that alone: everything here but `as_lm` goes by the shape of its requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from longspan.engine.front.llm import LLM
from longspan.engine.request import RequestOutput, SamplingParams
from longspan.errors import InvalidRequestError, MissingDependencyError

BATCH_LEN = 256
"""Requests given to `LLM` together; lm-eval may keep the answers of each batch."""
MAX_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the longest completion, in the order in which lm-eval looks for it."""
DEFAULT_MAX_TOKENS = 256
PASSED_ON = ("temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty",
             "presence_penalty", "frequency_penalty")
"""Fields of `SamplingParams` that tasks may set."""
Answer = TypeVar("Answer")


class Instance(Protocol):
    """lm-eval's request."""

    args: tuple[Any, ...]


def as_lm(llm: LLM) -> Any:
    """Make an ``lm_eval.api.model.LM``. Raises `MissingDependencyError` without lm-eval."""
    try:
        from lm_eval.api.model import LM
    except ImportError:
        raise MissingDependencyError(
            "lm-eval is not installed: pip install 'longspan[lm-eval]'") from None
    return type("LongspanLM", (Backend, LM), {})(llm)


class Backend:
    """The methods of an ``LM``. Prompts that do not fit the model are errors: nothing is cut off.

    Raises:
        InvalidRequestError: a task asks for what the engine does not have.
        PromptTooLongError: a text, and its completion, are longer than the model's limit.
    """

    cache_hook: Any = None

    def __init__(self, llm: LLM) -> None:
        super().__init__()
        self._llm, self._tokenizer = llm, llm.tokenizer

    @property
    def max_length(self) -> int:
        """Longest prompt plus completion, tokens."""
        return self._llm.memory.max_model_len

    @property
    def tokenizer_name(self) -> str:
        """lm-eval keeps rendered chats by this name."""
        return self._llm.config.model

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True,
    ) -> str:
        """Render the prompt of a conversation."""
        if not add_generation_prompt:
            raise InvalidRequestError("answers that are begun by the task are not supported; set "
                                      "no gen_prefix with a chat template")
        return self._tokenizer.render_chat(chat_history)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Log-probability of each (context, continuation)'s continuation, and whether it is what
        greedy decoding gives."""
        return self._in_batches("loglikelihood", requests, self._score_pairs)

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Log-probability of each text, its first token given the beginning of a text. Longer ones
        than the model takes are cut into windows; each token counts once."""
        return self._in_batches("loglikelihood_rolling", requests, self._score_texts)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Completion of each (context, settings)."""
        return self._in_batches("generate_until", requests, self._complete)

    def _in_batches(
        self, name: str, requests: Sequence[Instance],
        answer: Callable[[Sequence[Any]], list[Answer]],
    ) -> list[Answer]:
        found = list[Answer]()
        for start in range(0, len(requests), BATCH_LEN):
            batch = [request.args for request in requests[start : start + BATCH_LEN]]
            answers = answer(batch)
            for args, one in zip(batch, answers, strict=True):
                self.cache_hook.add_partial(name, args, one)
            found += answers
        return found

    # -- scoring -------------------------------------------------------------------------------

    def _score_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        split = [self._split(*pair) for pair in pairs]
        return [_sum(output, start) for output, (_, start) in zip(
            self._score(split), split, strict=True)]

    def _score_texts(self, texts: Sequence[tuple[str]]) -> list[float]:
        each = [list(windows(self._from_start(text), self.max_length)) for (text,) in texts]
        split = [window for found in each for window in found]
        outputs = iter(self._score(split))
        return [sum(_sum(next(outputs), start)[0] for _, start in found) for found in each]

    def _score(self, split: Sequence[tuple[Sequence[int], int]]) -> list[RequestOutput]:
        """Prompts, and where each one's tokens that count begin."""
        return self._llm.generate(
            [token_ids for token_ids, _ in split],
            [SamplingParams(max_tokens=0, prompt_logprobs=1, prompt_logprobs_start=start)
             for _, start in split])

    def _split(self, context: str, continuation: str) -> tuple[Sequence[int], int]:
        """As lm-eval does it: spaces at the context's end belong to the continuation, whose tokens
        are those behind as many as the context has alone."""
        if not context:
            return self._from_start(continuation), 1
        stripped = context.rstrip()
        whole = self._encode(context + continuation)
        token_ids = self._encode(stripped) if stripped else whole[:0]
        start = len(token_ids)
        if not start:
            return self._from_start(context + continuation), 1
        if continuation and start >= len(whole):
            raise InvalidRequestError(f"the continuation {continuation[:40]!r} has no token of its "
                                      "own behind its context; nothing of it can be scored")
        return token_ids + whole[start:], start

    def _from_start(self, text: str) -> list[int]:
        """Token ids behind that of a text's beginning, which is there once."""
        start, token_ids = self._tokenizer.text_start, list(self._encode(text))
        return token_ids if token_ids[:1] == [start] else [start, *token_ids]

    def _encode(self, text: str) -> Any:
        return self._tokenizer.encode(text, add_special_tokens=True)

    # -- completions ---------------------------------------------------------------------------

    def _complete(self, asked: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        outputs = self._llm.generate(
            [context for context, _ in asked], [sampling_params(values) for _, values in asked])
        return [output.text for output in outputs]


def windows(token_ids: Sequence[int], length: int) -> Iterator[tuple[Sequence[int], int]]:
    """Overlapping parts of at most ``length`` tokens, and where the tokens of each one begin that
    no earlier one has counted. The first token of all never counts."""
    done = 1
    while done < len(token_ids):
        stop = min(len(token_ids), max(length, done + length - 1))
        begin = max(0, stop - length)
        yield token_ids[begin:stop], done - begin
        done = stop


def sampling_params(asked: Mapping[str, Any]) -> SamplingParams:
    """Translate a task's settings. Raises `InvalidRequestError` for one that there is not."""
    values = dict(asked)
    lengths = [values.pop(name, None) for name in MAX_TOKENS_NAMES]
    given = [length for length in lengths if length is not None]
    until, samples = values.pop("until", None) or (), values.pop("do_sample", None)
    stop = (until,) if isinstance(until, str) else until
    wanted = {name: values.pop(name) for name in PASSED_ON if values.get(name) is not None}
    if samples is False:
        wanted["temperature"] = 0.0
    if values:
        raise InvalidRequestError(f"{sorted(values)[0]} is no setting of this engine's; tasks may "
                                  f"set until, do_sample, {', '.join(PASSED_ON)}, max_gen_toks")
    return SamplingParams(max_tokens=int(given[0]) if given else DEFAULT_MAX_TOKENS,
                          stop=tuple(text for text in stop if text), **wanted)


def _sum(output: RequestOutput, start: int) -> tuple[float, bool]:
    """Log-probability of the prompt from ``start`` on, and whether all of it is most probable."""
    found = output.prompt_alternatives
    assert found is not None
    logprobs = found.logprobs[start:]
    is_greedy = bool((logprobs >= found.top_logprobs[start:, 0]).all())
    return float(logprobs.sum(dtype=np.float64)), is_greedy
