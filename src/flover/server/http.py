"""uvicorn's HTTP/1.1 protocol (httptools) with what it lacks: limits on a head in bytes and seconds, errors as JSON.

A client that stops reading is cut off, so that it holds no memory and no place in the batch for ever.
What cannot be parsed, or takes too long or too much before it can be, is answered here and the connection closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Generator
from http import HTTPStatus

import msgspec
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from flover.server.errors import ApiError

MAX_HEAD_BYTES = 65_536  # request line and headers
HEADER_BYTES = 4  # of each header, beside its name and value
TOO_LONG = f"the request's head is longer than {MAX_HEAD_BYTES} bytes"
SEND_BUFFER = 128 << 10  # bytes in the kernel, beside asyncio's 64 KiB
WRITE_SECONDS = 30.0  # for a client that lags to take what is buffered
HEAD_SECONDS = 30.0  # from the first byte to the last
LINGER = 2.0  # for last answers to reach their clients


class HttpProtocol(HttpToolsProtocol):
    _head_bytes = 0  # received, perhaps with what follows the head
    _parsed_bytes = 0
    _in_head = True
    _head_timer: asyncio.TimerHandle
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._late)
        connection = transport.get_extra_info("socket")
        if connection is not None:  # else the kernel would hold megabytes for a client that does not read
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer.cancel()
        if self._write_timer is not None:
            self._write_timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read: it has `WRITE_SECONDS` to take what is buffered."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if not self._in_head:  # a later request of the connection
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._late)
        self._in_head, self._parsed_bytes = True, 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count(len(name) + len(value) + HEADER_BYTES)

    def _count(self, nbytes: int) -> None:
        """A head that comes with its end in one piece; the parser turns the error into `send_400_response`."""
        self._parsed_bytes += nbytes
        if self._parsed_bytes > MAX_HEAD_BYTES:
            raise ValueError

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes = False, 0
        self._head_timer.cancel()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._close_with(431, TOO_LONG)

    def send_400_response(self, msg: str) -> None:
        if self._parsed_bytes > MAX_HEAD_BYTES:
            self._close_with(431, TOO_LONG)
        else:
            self._close_with(400, msg)

    def _late(self) -> None:
        if self._in_head and not self.transport.is_closing():
            self._close_with(408, f"the request's head did not arrive within {HEAD_SECONDS:g} seconds")

    def _close_with(self, status: int, message: str) -> None:
        if self.cycle is None or self.cycle.response_complete:  # else an answer is under way, and this one would mix in
            body = msgspec.json.encode(ApiError(status, message).body)
            head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            self.transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        self.transport.close()


class HttpServer(uvicorn.Server):
    """uvicorn over an application, with our protocol and nothing of its own; signals are for whoever runs it."""

    def __init__(self, app: ASGIApp) -> None:
        settings = uvicorn.Config(
            app,
            http=HttpProtocol,
            log_config=None,
            log_level="error",
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=int(LINGER),
        )
        super().__init__(settings)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield
