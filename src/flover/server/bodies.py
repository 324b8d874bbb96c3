"""JSON bodies, in and out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from flover.async_llm import AsyncLLM
from flover.server.errors import ApiError

INLINE_BYTES = 32_768  # a longer body is decoded on a thread
T = TypeVar("T")


async def read_body(llm: AsyncLLM, request: Request, read: Callable[[bytes], T]) -> T:
    """The body as `read` understands it, on a thread if it is long; ApiError 415 or 400."""
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, f"the content type must be application/json, got {content_type[:100]!r}")
    body = await request.body()
    if len(body) < INLINE_BYTES:
        return read(body)
    return await llm.in_thread(read, body)


def json_response(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
