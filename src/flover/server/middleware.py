"""Plain ASGI middleware, outermost first: request ids, keys, bodies. None of it hides a disconnect from the routes.
Every scope is a request: `http.HttpServer` has no other.

A request id is a label and decides nothing; the keys come before anything that reads a body or looks at a route.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import uuid
from collections.abc import Iterable
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flover.server.errors import ApiError
from flover.server.page import PAGE

OPEN_PATHS = ("/livez", "/readyz", *PAGE)  # the page holds no data
MAX_REQUEST_ID = 128
LINGER_SECONDS = 2.0


class RequestId:
    """X-Request-Id: the client's, if it is short and printable ASCII, else a new one; on every response."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = _header(scope, b"x-request-id")
        usable = 0 < len(given) <= MAX_REQUEST_ID and all(33 <= byte <= 126 for byte in given)
        request_id = given if usable else uuid.uuid4().hex.encode()
        scope.setdefault("state", {})["request_id"] = request_id.decode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        await self.app(scope, receive, send_with_id)


class Auth:
    """Bearer keys, on every path but `OPEN_PATHS`. Only digests are kept; without keys everyone may pass.

    The digest of the key that was used is left in scope["state"]["key"], for what must not be shared between keys.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self.app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._digests and scope["path"] not in OPEN_PATHS:
            scheme, _, key = _header(scope, b"authorization").partition(b" ")
            digest = _digest(key.strip())
            known = [hmac.compare_digest(digest, one) for one in self._digests]  # all of them: constant time
            if scheme.lower() != b"bearer" or not any(known):
                error = ApiError(
                    401,
                    "no valid API key: send the header `Authorization: Bearer KEY`",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer", "Connection": "close"},
                )
                await error.response()(scope, receive, send)
                return
            if len(self._digests) > 1:
                scope.setdefault("state", {})["key"] = digest.hex()
        await self.app(scope, receive, send)


class Bodies:
    """Reads a body whole before the routes see the request: at most `limit` bytes (413), within `seconds` (408)."""

    def __init__(self, app: ASGIApp, limit: int, seconds: float) -> None:
        self.app, self.limit, self.seconds = app, limit, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] in ("GET", "HEAD"):
            await self.app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(scope, receive), self.seconds)
        except asyncio.TimeoutError:
            late = f"the body did not arrive within {self.seconds:g} seconds"
            await ApiError(408, late, code="timeout", headers={"Connection": "close"}).response()(scope, receive, send)
            return
        except ApiError as error:
            await _refuse(error, scope, receive, send)
            return
        if body is None:  # the client has gone
            return
        rest = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_read() -> Message:
            return rest.pop() if rest else await receive()

        await self.app(scope, receive_read, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        declared = _header(scope, b"content-length")
        if declared.isdigit() and int(declared[:20]) > self.limit:
            raise self._too_large()
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self.limit:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> ApiError:
        text = f"the body is longer than {self.limit} bytes"
        return ApiError(413, text, code="body_too_large", headers={"Connection": "close"})


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer while the body still comes, and drop what is on its way for a while: a reset could overtake the answer."""

    async def send_but_end(message: Message) -> None:
        if message["type"] == "http.response.body":
            message["more_body"] = True
        await send(message)

    async def drop() -> None:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                return

    await error.response()(scope, receive, send_but_end)
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(drop(), LINGER_SECONDS)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _header(scope: Scope, name: bytes) -> bytes:
    """The header's value; b"" if it is missing or comes twice."""
    values = [value for key, value in scope["headers"] if key == name]
    return bytes(values[0]) if len(values) == 1 else b""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
