"""OpenAI's error object, and the exceptions that become one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from starlette.responses import Response

from flover.request import ContextLengthError

INVALID = "invalid_request_error"
SERVER = "server_error"


class ApiError(Exception):
    """What a client is told: an HTTP status and the fields of OpenAI's error object.

    partial: an answer that was cut off, given beside the error; set by who has it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.message, self.headers = " ".join(message.split()), headers
        self.partial: Mapping[str, Any] | None = None

    @property
    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error} if self.partial is None else {"error": error, "partial": self.partial}

    def response(self) -> Response:
        headers = dict(self.headers or {})
        return Response(msgspec.json.encode(self.body), self.status, headers, "application/json")


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400."""
    return ApiError(400, message, param=param, code=code)


def from_value_error(error: ValueError, names: Iterable[str], default: str) -> ApiError:
    """A ValueError of ours as a 400: its text begins with the parameter at fault, else `default` is."""
    first = re.match(r"\w*", str(error))
    param = first.group() if first and first.group() in set(names) else default
    code = "context_length_exceeded" if isinstance(error, ContextLengthError) else None
    return invalid(str(error), param, code)


def engine_dead() -> ApiError:
    message = "the engine has died; it is being started again"
    return ApiError(503, message, kind=SERVER, code="engine_dead", headers={"Retry-After": "5"})


def draining() -> ApiError:
    return ApiError(503, "the server is shutting down", kind=SERVER, code="draining", headers={"Connection": "close"})


def aborted() -> ApiError:
    """A request that an administrator or the end of the server has cut off."""
    return ApiError(503, "the server has withdrawn the request", kind=SERVER, code="aborted")


def deadline(queued: bool, seconds: float, retry_after: str) -> ApiError:
    """A request that took too long: 503 in the queue, where another try may fare better, 504 while it ran."""
    what = f"no token came within {seconds:g} seconds" if queued else f"not finished within {seconds:g} seconds"
    headers = {"Retry-After": retry_after} if queued else None
    return ApiError(503 if queued else 504, what, kind=SERVER, code="deadline_exceeded", headers=headers)


def internal(error: Exception) -> ApiError:
    """A bug of ours; clients are told its type only."""
    return ApiError(500, f"internal error: {type(error).__name__}", kind=SERVER, code="internal_error")
