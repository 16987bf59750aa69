"""Errors as OpenAI's clients expect them: a status and ``{"error": {...}}``."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from longspan.errors import CheckpointError, LongspanError, PromptTooLongError

logger = logging.getLogger("longspan.serve")

ROUTES = {404: "There is no such route here; OpenAI's begin with /v1, and /openapi.json lists all.",
          405: "This route takes another method; the header Allow names it."}
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
         429: "rate_limit_error", 503: "service_unavailable_error"}
"""Error types by status; other ones: server_error from 500 on, invalid_request_error below."""


class ApiError(Exception):
    """Ends a request with a status and a message for the person who sent it.

    Args:
        code: word for programs, such as ``context_length_exceeded``.
        param: the field at fault.
        retry_after_s: when it is worth trying again.
        details: further numbers, beside the message.
    """

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None,
        retry_after_s: float | None = None, headers: Mapping[str, str] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})
        self.details = dict(details or {})
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(min(3600, max(1, math.ceil(retry_after_s))))

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object of the reply."""
        kind = TYPES.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param,
                          "code": self.code, **self.details}}

    def response(self) -> Response:
        """Build the reply."""
        return JSONResponse(self.body, self.status, headers=self.headers)


class ClientGone(Exception):
    """The client hung up; there is nobody to answer."""


def as_api_error(error: Exception, request_id: str = "") -> ApiError:
    """Turn any exception into a reply; an unexpected one is logged and not shown, and so is what is
    wrong with the checkpoint: clients cannot mend it, and it names files of this machine."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PromptTooLongError):
        return ApiError(
            error.http_status, str(error), code="context_length_exceeded", param="prompt",
            details={"prompt_tokens": error.prompt_len, "max_tokens": error.max_tokens,
                     "limit": error.limit})
    if isinstance(error, LongspanError) and not isinstance(error, CheckpointError):
        return ApiError(error.http_status, " ".join(str(error).split()))
    if isinstance(error, HTTPException):
        said = ROUTES.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, said, headers=error.headers)
    logger.error("request %s: unexpected error", request_id or "?", exc_info=error)
    name = f", where this is request {request_id}" if request_id else ""
    return ApiError(500, f"The server failed on this request; its log says why{name}.")


async def error_response(request: Request, error: Exception) -> Response:
    """Handle an exception of the application."""
    if isinstance(error, ClientGone):
        return Response(status_code=499)  # the client is gone: this reply is never sent
    return as_api_error(error, request.state.request_id).response()
