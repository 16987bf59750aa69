"""From a request's messages or texts to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from longspan.engine.front.client import AsyncEngine
from longspan.engine.request import SamplingParams, check_fits
from longspan.serve.errors import ApiError
from longspan.serve.messages import for_template
from longspan.serve.protocol import ChatRequest, CompletionRequest, TokenizeRequest
from longspan.serve.sampling import ALL_ROOM
from longspan.serve.tools import offered_tools

RESERVED_VALUES = frozenset({
    "messages", "add_generation_prompt", "continue_final_message", "add_special_tokens", "tools",
    "documents", "bos_token", "eos_token", "unk_token", "pad_token"})
"""Variables of chat templates that clients may not set."""
GenerateBody = ChatRequest | CompletionRequest


class Prompts:
    """Makes the prompts of requests."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def encode_chat(
        self, body: ChatRequest | TokenizeRequest, **options: bool
    ) -> Sequence[int]:
        """Return the token ids of a conversation."""
        values = body.chat_template_kwargs or {}
        wrong = RESERVED_VALUES.intersection(values)
        if wrong:
            name = sorted(wrong)[0]
            raise ApiError(400, f"chat_template_kwargs may not set {name}.",
                           param="chat_template_kwargs")
        try:
            messages = for_template(body.messages or ())
        except ValueError as error:
            raise ApiError(400, f"{error}.", param="messages") from None
        offered = [tool.for_template() for tool in offered_tools(body)]
        tools = {"tools": offered} if offered else {}
        return await self._engine.encode_chat(messages, **values, **tools, **options)

    def fit(self, params: SamplingParams, prompt_len: int, asked: int | None) -> SamplingParams:
        """Fit parameters to one prompt: without max_tokens, use the remaining context. Raises 400
        for an empty prompt, `PromptTooLongError` for one that does not fit."""
        limit = self._engine.status().max_model_len
        if prompt_len == 0:
            raise ApiError(400, "The prompt is empty.", param="prompt")
        is_open = asked in (None, ALL_ROOM)
        check_fits(prompt_len, 1 if asked is None or is_open else asked, limit)
        return replace(params, max_tokens=min(params.max_tokens, limit - prompt_len)) \
            if is_open else params

    async def of(self, body: GenerateBody) -> list[Sequence[int]]:
        """Return the token ids of each prompt."""
        if isinstance(body, ChatRequest):
            is_open = bool(body.continue_final_message)
            begins = not is_open if body.add_generation_prompt is None else \
                body.add_generation_prompt
            if is_open and begins:
                raise ApiError(400, "continue_final_message does not go with "
                               "add_generation_prompt: true.", param="continue_final_message")
            return [await self.encode_chat(
                body, add_generation_prompt=begins, continue_final_message=is_open)]
        return [await self._engine.tokenize(each, add_special_tokens=body.add_special_tokens)
                if isinstance(each, str) else each for each in body.prompt]

    async def echoes(self, body: GenerateBody) -> Sequence[str]:
        """Text to put in front of each prompt's completions; none where that is not wanted."""
        if isinstance(body, ChatRequest) or not body.echo:
            return ()
        return [each if isinstance(each, str)
                else await self._engine.detokenize(each, with_special=True) for each in body.prompt]
