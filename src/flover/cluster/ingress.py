"""The ingress: an ASGI application that sends each request to a replica and passes the answer on, byte by byte.

Any number of them may run, anywhere in the cluster: they share nothing, since a prefix's homes are a hash
(`cluster.policy`) and replicas are whoever the registry names. Nothing is passed to the client before the first piece
of an answer's body is there, so until then a request whose replica is lost or drains is sent to another one.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send

from flover.cluster.policy import choose, homes, load
from flover.cluster.upstream import Upstream, UpstreamError
from flover.server.errors import SERVER, ApiError
from flover.server.middleware import Bodies, RequestId
from flover.server.sse import DONE, event, until_disconnect

BYTES_PER_TOKEN = 4  # of a request's body, about
PREFIX_CHARS = 512  # of the text that decides a request's homes
LOST_SECONDS = 6.0  # after which the registry has dropped a replica, unless it lives
RETRIED = (b'"draining"', b'"engine_dead"')  # codes of a 503 that another replica may not give
GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")
OURS = (b"x-request-id", b"date")  # headers that the ingress sets itself; the id is the client's
logger = logging.getLogger("flover")


@dataclass(slots=True)
class Target:
    """A replica as this ingress sees it. rows: requests of ours that it has. waiting: bytes of those whose answer has
    not begun. reported: requests that it said it has, of all ingresses.
    """

    name: str
    host: str
    port: int
    rows: int = 0
    waiting: int = 0
    reported: float = 0

    @property
    def load(self) -> float:
        return load(max(self.rows, self.reported), self.waiting / BYTES_PER_TOKEN)


class Ingress:
    """See the module. `update` tells it who is there; `targets` are those it takes for alive."""

    def __init__(self, max_body_bytes: int, body_timeout: float) -> None:
        self.targets: dict[str, Target] = {}
        self.draining = False
        self.live = 0
        self._rng = random.Random()
        self._lost: dict[str, float] = {}  # -> when it is tried again, if the registry still names it
        self.app: ASGIApp = RequestId(Bodies(self._serve, max_body_bytes, body_timeout))

    def update(self, replicas: Mapping[str, tuple[str, Mapping[str, float]]]) -> None:
        """What the registry says: id -> url, load."""
        now = time.monotonic()
        self._lost = {name: until for name, until in self._lost.items() if name in replicas and now < until}
        targets = {}
        for name, (url, said) in replicas.items():
            if name in self._lost:
                continue
            parts = urlsplit(url)
            target = self.targets.get(name) or Target(name, parts.hostname or "", parts.port or 0)
            target.reported = said.get("num_requests_running", 0) + said.get("num_requests_waiting", 0)
            targets[name] = target
        self.targets = targets

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in ("/livez", "/readyz", "/health"):
            await self._health(scope, receive, send)
            return
        if self.draining:
            error = ApiError(503, "the cluster is shutting down", kind=SERVER, code="draining")
            await error.response()(scope, receive, send)
            return
        self.live += 1
        try:
            body = (await receive()).get("body", b"") if scope["method"] not in ("GET", "HEAD") else b""
            await until_disconnect(receive, self._forward(scope, body, receive, send))
        finally:
            self.live -= 1

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        ready = scope["path"] == "/livez" or (self.targets and not self.draining)
        status, text = (200, b"ok") if ready else (503, b"no replica is ready")
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": text})

    async def _forward(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """To one replica after the other, until one has begun an answer."""
        tried: set[str] = set()
        prefix = prompt_prefix(body) if scope["path"] in GENERATING else b""
        while (target := self._choose(prefix, tried)) is not None:
            tried.add(target.name)
            target.rows += 1
            try:
                if await self._exchange(target, scope, body, send):
                    return
            except UpstreamError as error:
                logger.warning("replica %s is lost: %s", target.name, error)
                self._lose(target)
            finally:
                target.rows -= 1
        none = ApiError(503, "no replica is ready", kind=SERVER, code="no_replica", headers={"Retry-After": "1"})
        await none.response()(scope, receive, send)

    def _choose(self, prefix: bytes, tried: set[str]) -> Target | None:
        targets = [target for name, target in sorted(self.targets.items()) if name not in tried]
        if not targets:
            return None
        loads = [target.load for target in targets]
        own = homes(prefix, [target.name for target in targets]) if prefix else []
        return targets[choose(loads, own, sum(loads) / len(loads), self._rng)]

    def _lose(self, target: Target) -> None:
        self._lost[target.name] = time.monotonic() + LOST_SECONDS
        self.targets.pop(target.name, None)

    async def _exchange(self, target: Target, scope: Scope, body: bytes, send: Send) -> bool:
        """-> whether an answer was passed on; False: another replica may do better. UpstreamError: nothing was."""
        query = scope["query_string"]
        path = scope["raw_path"] + (b"?" + query if query else b"")
        with closing(Upstream(target.host, target.port)) as upstream:
            target.waiting += len(body)
            try:
                await upstream.start(scope["method"], path, scope["headers"], body)
                pieces = upstream.body()
                first = await anext(pieces, b"")
            finally:
                target.waiting -= len(body)
            if _elsewhere(upstream.status, first):
                return False
            await send(_start(upstream))
            await send({"type": "http.response.body", "body": first, "more_body": True})
            try:
                async for piece in pieces:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            except UpstreamError:
                self._lose(target)
                await _cut(upstream, send)
                return True
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        return True


def _start(upstream: Upstream) -> dict[str, Any]:
    headers = [pair for pair in upstream.headers if pair[0] not in OURS]
    return {"type": "http.response.start", "status": upstream.status, "headers": headers}


def _elsewhere(status: int, piece: bytes) -> bool:
    """Whether an answer that begins so says no more than that this replica is going."""
    failed = status == 503 or piece.startswith(b'data: {"error"')
    return failed and any(code in piece for code in RETRIED)


async def _cut(upstream: Upstream, send: Send) -> None:
    """A stream whose replica is lost ends with an error; any other answer is cut, which its length gives away."""
    if (b"content-type", b"text/event-stream; charset=utf-8") not in upstream.headers:
        raise ConnectionResetError("the replica was lost in the middle of an answer")
    error = ApiError(502, "the replica was lost; what it had sent is all there is", kind=SERVER, code="replica_lost")
    await send({"type": "http.response.body", "body": event(error.body) + DONE, "more_body": False})


class _Message(msgspec.Struct):
    content: Any = ""


class _Body(msgspec.Struct):
    """Of any generating request, what its prompt begins with."""

    messages: list[_Message] = []
    prompt: Any = ""
    input: Any = ""


_decoder = msgspec.json.Decoder(_Body)


def prompt_prefix(body: bytes) -> bytes:
    """The beginning of a request's prompt; b"" if there is none, or none that can be read."""
    try:
        request = _decoder.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return b""  # the replica will say what is wrong
    parts, size = [], 0
    for message in request.messages:
        parts.append(_text(message.content))
        size += len(parts[-1])
        if size >= PREFIX_CHARS:
            break
    text = "\n".join(parts) if parts else _text(request.prompt or request.input)
    return text[:PREFIX_CHARS].encode(errors="replace")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)[: 4 * PREFIX_CHARS] if value else ""


async def watch(ingress: Ingress, ask: Any, seconds: float = 0.5) -> None:
    """Keep an ingress up to date for ever. ask: async, -> as `update` takes it."""
    said = ""
    while True:
        try:
            ingress.update(await ask())
            said = ""
        except Exception as error:  # Ray's own, of many kinds: the head is away, the replicas may well be there
            if said != (said := type(error).__name__):  # once, not twice a second
                logger.warning("the registry does not answer: %s", said)
        await asyncio.sleep(seconds)
