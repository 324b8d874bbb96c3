"""Server-sent events, and answers that end with their reader.

`data: {json}` and an empty line for each event, `data: [DONE]` last, also after an error. A client that goes away
cancels the answer, whether it streams or not and whatever it waits for. While nothing comes, comments keep the
connection.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any

import msgspec
from starlette.types import Receive, Send

from flover.server.errors import ApiError, internal

KEEP_ALIVE = 15.0  # seconds without an event after which a comment is sent: proxies cut silent connections
COMMENT = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]
logger = logging.getLogger("flover")
_encoder = msgspec.json.Encoder()


def event(value: Any) -> bytes:
    """One event."""
    return b"data: " + _encoder.encode(value) + b"\n\n"


async def send_events(
    send: Send, events: AsyncIterator[bytes], error_event: Callable[[ApiError], bytes], done: bytes = DONE
) -> None:
    """A whole streamed response, `done` last; an error of `events` is an event too."""
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    quiet = True

    async def keep_alive() -> None:
        nonlocal quiet
        while True:
            await asyncio.sleep(KEEP_ALIVE)
            if quiet:
                await send({"type": "http.response.body", "body": COMMENT, "more_body": True})
            quiet = True

    beat = asyncio.ensure_future(keep_alive())
    try:
        async for one in events:
            quiet = False
            await send({"type": "http.response.body", "body": one, "more_body": True})
    except Exception as error:
        if not isinstance(error, ApiError):
            logger.exception("a stream failed")
            error = internal(error)
        await send({"type": "http.response.body", "body": error_event(error), "more_body": True})
    finally:
        beat.cancel()
    await send({"type": "http.response.body", "body": done, "more_body": False})


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`, and cancel it when the client goes. The body must have been read."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await tasks[0]
        with suppress(asyncio.CancelledError):
            await tasks[1]
