"""Clients of over_http.py: many streams from one process at little cost, and one request at a time.

A stream keeps the bytes as they come and looks at them when all is over, so that the client is not what limits.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

END = b"0\r\n\r\n"  # of a chunked body
PATH = "/v1/completions"
TEXT = b'"text":"'


@dataclass(slots=True)
class Answer:
    """Times are of CLOCK_MONOTONIC, which all processes of a machine share."""

    begin: float
    first: float = 0.0  # first event with text
    end: float = 0.0  # last byte
    parts: list[bytes] = field(default_factory=list)

    def take(self, data: bytes) -> None:
        self.end = time.monotonic()
        if not self.first and TEXT in data:
            self.first = self.end
        self.parts.append(data)

    def check(self, wanted: int) -> tuple[int, str]:
        """-> events with text, and the text; RuntimeError unless all the tokens came."""
        raw = b"".join(self.parts)
        events = [json.loads(line[6:]) for line in raw.split(b"\n") if line.startswith(b"data: {")]
        usage = (events[-1].get("usage") if events else None) or {}
        if usage.get("completion_tokens") != wanted or b"data: [DONE]" not in raw:
            raise RuntimeError(f"{wanted} tokens were asked for, the answer is {raw[:300]!r} ... {raw[-200:]!r}")
        texts = [choice["text"] for event in events for choice in event["choices"]]
        return sum(map(bool, texts)), "".join(texts)


def body(prompt: Sequence[int], num_output: int) -> bytes:
    """A greedy streamed completion of token ids, to its full length."""
    fixed = {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    return json.dumps({"prompt": list(prompt), "max_tokens": num_output, **fixed}).encode()


def head(data: bytes, close: bool) -> bytes:
    lines = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    return (lines + ("Connection: close\r\n\r\n" if close else "\r\n")).encode()


class Client(asyncio.Protocol):
    """One request over a connection of its own, which the server closes."""

    def __init__(self, data: bytes, answer: Answer, over: asyncio.Future[None]) -> None:
        self._data, self._answer, self._over = data, answer, over
        self.data_received = answer.take  # type: ignore[method-assign]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(head(self._data, close=True) + self._data)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._over.done():
            self._over.set_result(None)


async def _at_once(port: int, bodies: Sequence[bytes], at: float) -> list[Answer]:
    loop = asyncio.get_running_loop()
    await asyncio.sleep(max(0.0, at - time.monotonic()))

    async def one(data: bytes) -> Answer:
        answer, over = Answer(time.monotonic()), loop.create_future()
        await loop.create_connection(lambda: Client(data, answer, over), "127.0.0.1", port)
        await over
        return answer

    return await asyncio.gather(*map(one, bodies))


def at_once(port: int, jobs: Sequence[tuple[Sequence[int], int]], at: float) -> dict[str, Any]:
    """All jobs (prompt, output length) at the moment `at`; for a process of its own."""
    bodies = [body(*job) for job in jobs]
    cpu, wall = time.process_time(), time.monotonic()
    answers = asyncio.run(_at_once(port, bodies, at))
    cpu, wall = time.process_time() - cpu, time.monotonic() - max(wall, at)
    return {
        "begin": min(answer.begin for answer in answers),
        "end": max(answer.end for answer in answers),
        "first": [answer.first - answer.begin for answer in answers],
        "events": sum(answer.check(num)[0] for answer, (_, num) in zip(answers, jobs)),
        "cpu_share": cpu / wall,
    }


def one_by_one(port: int, jobs: Sequence[tuple[Sequence[int], int]]) -> tuple[list[float], list[str]]:
    """Seconds to the first text and the texts, of one request at a time over one connection that is kept."""
    times, texts = [], []
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for prompt, num_output in jobs:
            answer = Answer(time.monotonic())  # the body is the client's work too
            data = body(prompt, num_output)
            connection.sendall(head(data, close=False) + data)
            while not b"".join(answer.parts[-2:]).endswith(END):
                part = connection.recv(1 << 16)
                if not part:
                    raise RuntimeError(f"the connection ended early, after {b''.join(answer.parts)[-300:]!r}")
                answer.take(part)
            times.append(answer.first - answer.begin)
            texts.append(answer.check(num_output)[1])
    return times, texts
