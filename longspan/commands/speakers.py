"""Models that data is made with: behind an address, or in this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from longspan.data.calls import Messages, Reply, Say, UnansweredError
from longspan.errors import LongspanError, PromptTooLongError
from longspan.eval.endpoint import Endpoint, EndpointConfig, NoAnswerError


@contextmanager
def open_speaker(
    model: str, endpoint: EndpointConfig | None, options: Mapping[str, Any], longest: int,
    shorter: str,
) -> Iterator[Say]:
    """Open a model that takes messages, and prompts with their replies of ``longest`` tokens.

    Args:
        options: fields of `EngineConfig`, for a model in this process.
        shorter: what makes prompts shorter, for the message.

    Raises `LongspanError` when nobody answers at the address, or the model takes less.
    """
    if endpoint is not None:
        with Endpoint(endpoint) as client:
            _check_limit(model, client.max_model_len(), longest, shorter)
            yield _of_endpoint(client)
        return
    from longspan.config import ModelConfig
    from longspan.engine.front.llm import LLM
    from longspan.model.weights import resolve_checkpoint

    facts = ModelConfig.from_dir(resolve_checkpoint(model), wanted_len=longest)
    _check_limit(model, facts.max_position_embeddings, longest, shorter)
    with LLM(model, **{"max_model_len": min(2 * longest, facts.max_position_embeddings),
                       **options}) as llm:
        yield _of_engine(llm)


def _check_limit(model: str, limit: int | None, longest: int, shorter: str) -> None:
    if limit is not None and limit < longest:
        raise LongspanError(f"{model} takes {limit:,} tokens, prompts and answers here have up to "
                            f"{longest:,}: {shorter}, or serve it with a longer --max-model-len")


def _of_endpoint(client: Endpoint) -> Say:
    def say(messages: Messages, max_tokens: int, temperature: float, seed: int) -> Reply:
        try:
            answer = client.converse(messages, max_tokens, temperature=temperature, seed=seed)
        except NoAnswerError as error:
            raise UnansweredError(str(error)) from None
        return Reply(answer.text, answer.finish_reason == "length")
    return say


def _of_engine(llm: Any) -> Say:
    from longspan.engine.request import SamplingParams

    def say(messages: Messages, max_tokens: int, temperature: float, seed: int) -> Reply:
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
        try:
            output = llm.chat(messages, params)
        except PromptTooLongError as error:
            raise UnansweredError(str(error)) from None
        return Reply(output.text, output.finish_reason == "length")
    return say
