"""One HTTP exchange with a replica over a plain socket: bytes in, events out, no client library between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

import httptools

from flover.engine.links import keep_alive

CONNECT_SECONDS = 3.0
# headers of one connection; and a body that was expected is all here
HOP_BY_HOP = set(b"connection keep-alive transfer-encoding te upgrade content-length host expect".split())
Headers = list[tuple[bytes, bytes]]


class UpstreamError(Exception):
    """The replica could not be reached, or was lost before its answer was whole."""


class Upstream:
    """A request to a replica: `start` sends it, `body` yields what comes, and `close` is due in any case."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._parser = httptools.HttpResponseParser(self)
        self._writer: asyncio.StreamWriter | None = None
        self._pieces: list[bytes] = []
        self._begun = self._complete = self._head_only = False
        self.headers: Headers = []

    def close(self) -> None:
        """End the connection, which has the replica abort whatever still runs."""
        if self._writer is not None:
            self._writer.close()

    @property
    def status(self) -> int:
        return int(self._parser.get_status_code())

    async def start(self, method: str, target: bytes, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        """Send it and read the answer's head. UpstreamError if there is none."""
        kept = [(name, value) for name, value in headers if name.lower() not in HOP_BY_HOP]
        host, port = self._address
        self._head_only = method == "HEAD"
        kept += [(b"host", f"{host}:{port}".encode()), (b"connection", b"close")]
        kept.append((b"content-length", str(len(body)).encode()))
        head = b"".join(b"%s: %s\r\n" % pair for pair in kept)
        try:
            connecting = asyncio.open_connection(host, port)
            self._reader, writer = await asyncio.wait_for(connecting, CONNECT_SECONDS)
            self._writer = writer
            keep_alive(writer.get_extra_info("socket"))  # a node may go without a word
            writer.write(b"%s %s HTTP/1.1\r\n%s\r\n%s" % (method.encode(), target, head, body))
            while not self._begun:
                await self._read()
        except (OSError, asyncio.TimeoutError, httptools.HttpParserError) as error:
            raise UpstreamError(f"{host}:{port}: {error or type(error).__name__}") from None

    async def body(self) -> AsyncIterator[bytes]:
        """The answer's body in pieces. UpstreamError if it ends early."""
        try:
            while True:
                pieces, self._pieces = self._pieces, []
                if pieces:
                    yield b"".join(pieces)
                elif self._complete:
                    return
                else:
                    await self._read()
        except (OSError, httptools.HttpParserError) as error:
            raise UpstreamError(str(error)) from None

    async def _read(self) -> None:
        data = await self._reader.read(65536)
        if not data:
            raise OSError("the connection ended before the answer did")
        self._parser.feed_data(data)

    # ---- the parser's calls ------------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() not in HOP_BY_HOP:
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._begun = True
        self._complete = self._head_only  # whatever length it says: that of a GET's body

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        self._complete = True
