"""JSON bodies, in and out. Types are checked here.

Fields that are not known are ignored and logged once; those that ask for what is not there are refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from flover.async_llm import AsyncLLM
from flover.server.errors import ApiError, invalid
from flover.show import show

INLINE_BYTES = 32_768  # a longer body is decoded on a thread
MAX_TOLD = 256  # names of ignored fields
NOTHING: tuple[Any, ...] = (None, [], {}, "")
NOT_YET: dict[str, tuple[Any, ...]] = {  # field -> the values that ask for nothing
    "suffix": NOTHING,
    "functions": NOTHING,
    "function_call": (*NOTHING, "none", "auto"),
    "audio": NOTHING,
    "modalities": (*NOTHING, ["text"]),
    "chat_template": NOTHING,
    "use_beam_search": (None, False),
    "continue_final_message": (None, False),
    "truncate_prompt_tokens": (None,),
    "prompt_logprobs": (None,),
    "prompt_embeds": NOTHING,
    "return_tokens_as_token_ids": (None, False),
}
logger = logging.getLogger("flover")
T = TypeVar("T")
B = TypeVar("B", bound="Body")


class Body(BaseModel):
    """A JSON object; strict: `"2"` is no number and `true` no integer."""

    model_config = ConfigDict(strict=True, extra="allow")
    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = NOT_YET

    def check(self) -> None:
        """Refuse what is not there."""
        for name, idle in self.refused.items():
            value = (self.model_extra or {}).get(name)
            if not any(value == one and type(value) is type(one) for one in idle):
                raise invalid(f"{name} is not supported, got {show(value)}", name)


class Ignored:
    """Fields that nobody here knows, told once each: most are other servers', some are spelling mistakes."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def note(self, body: Body) -> None:
        new = [name for name in body.model_extra or () if name not in self._told and name not in body.refused]
        if new and len(self._told) < MAX_TOLD:
            self._told.update(new)
            logger.warning("fields of a request are ignored: %s", ", ".join(show(name) for name in new[:20]))


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


def decode(body: bytes, kind: type[B]) -> B:
    """A request from its JSON; ApiError if it is none."""
    try:
        value = msgspec.json.decode(body)
    except RecursionError:
        raise invalid("the body is nested too deeply") from None
    except ValueError as error:  # malformed, not UTF-8, or a number without end
        raise invalid(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise invalid(f"the body must be a JSON object, got {show(value)}")
    try:
        request = kind.model_validate(value)
    except ValidationError as error:
        raise _from_validation(error) from None
    request.check()
    return request


def _from_validation(error: ValidationError) -> ApiError:
    """The first parameter at fault, with all the types that it may have."""
    details = error.errors(include_url=False, include_context=False)
    param = str(details[0]["loc"][0])
    if details[0]["type"] == "missing":
        return invalid(f"{param} is required", param)
    wanted = {detail["msg"].removeprefix("Input should be ") for detail in details if str(detail["loc"][0]) == param}
    return invalid(f"{param} must be {' or '.join(sorted(wanted))}, got {show(details[0]['input'])}", param)
