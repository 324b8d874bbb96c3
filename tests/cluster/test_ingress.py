"""The ingress without Ray: replicas are small servers that answer, drain, or break off."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from typing import Any

import pytest

from flover.cluster.ingress import Ingress, Target, prompt_prefix, watch
from flover.cluster.policy import Steady, choose, desired_replicas, homes, load
from flover.cluster.upstream import Upstream

STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
Script = Callable[[asyncio.StreamWriter], Awaitable[None]]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Replica:
    """A server that plays a script after each request."""

    def __init__(self, script: Script) -> None:
        self.script, self.requests, self.closed = script, list[bytes](), asyncio.Event()

    async def __aenter__(self) -> Replica:
        self.server = await asyncio.start_server(self._handle, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        self.requests.append(head + await reader.readexactly(size))
        try:
            await self.script(writer)
            await writer.drain()
            writer.close()
        except ConnectionError:
            self.closed.set()


async def whole(writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM + chunk(b"data: one\n\n") + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")


async def head_only(writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM)


async def half(writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM + chunk(b"data: one\n\n"))
    await writer.drain()
    await asyncio.sleep(0.05)


async def drains(writer: asyncio.StreamWriter) -> None:
    body = b'{"error": {"code": "draining"}}'
    writer.write(b"HTTP/1.1 503 X\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))


async def dead_engine(writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM + chunk(b'data: {"error":{"code":"engine_dead"}}\n\n') + b"0\r\n\r\n")


async def full(writer: asyncio.StreamWriter) -> None:
    body = b'{"error": {"code": "queue_full"}}'
    writer.write(b"HTTP/1.1 429 X\r\nretry-after: 3\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))


def ask(ingress: Ingress, stay: bool = True, path: str = "/v1/completions", method: str = "POST") -> Any:
    """One request; -> (status, headers, body)."""
    body = json.dumps({"prompt": "And it came to pass"}).encode()
    incoming = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if incoming:
            return incoming.pop()
        if stay:
            await asyncio.Event().wait()
        await asyncio.sleep(0.2)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> Any:
        scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"a=1"}
        headers = [(b"authorization", b"Bearer k"), (b"expect", b"100-continue")]
        headers.append((b"content-length", b"%d" % len(body)))
        await ingress.app({**scope, "headers": headers}, receive, send)
        if not sent:
            return None
        return sent[0]["status"], dict(sent[0]["headers"]), b"".join(m.get("body", b"") for m in sent[1:])

    return run()


async def answer(*scripts: Script) -> tuple[int, bytes, list[int]]:
    """What a client gets from replicas tried in this order, and how often each was."""
    ingress = Ingress(1 << 20, 5.0)
    replicas = [Replica(script) for script in scripts]
    for replica in replicas:
        await replica.__aenter__()
    # homes of the prompt first: names are looked for that put the replicas in this order
    ordered = iter(range(len(replicas)))
    ingress.update({str(i): (replica.url, {}) for i, replica in enumerate(replicas)})
    ingress._choose = lambda prefix, tried: next(  # type: ignore[method-assign,assignment]
        (ingress.targets[str(i)] for i in ordered if str(i) in ingress.targets), None
    )
    status, _, body = await ask(ingress)
    for replica in replicas:
        await replica.__aexit__()
    return status, body, [len(replica.requests) for replica in replicas]


@pytest.mark.parametrize("first", [head_only, drains, dead_engine])
def test_what_has_not_streamed_is_tried_elsewhere(first: Script) -> None:
    status, body, tries = asyncio.run(answer(first, whole))
    assert (status, body, tries) == (200, b"data: one\n\ndata: [DONE]\n\n", [1, 1])


def test_what_has_streamed_ends_with_an_error() -> None:
    status, body, tries = asyncio.run(answer(half, whole))
    assert (status, tries) == (200, [1, 0])
    assert body.startswith(b"data: one\n\n")
    assert b'"replica_lost"' in body
    assert body.endswith(b"data: [DONE]\n\n")


def test_a_refusal_is_passed_on() -> None:
    status, body, tries = asyncio.run(answer(full, whole))
    assert (status, tries) == (429, [1, 0])
    assert b"queue_full" in body


def test_nobody_left() -> None:
    status, body, tries = asyncio.run(answer(drains, head_only))
    assert (status, tries) == (503, [1, 1])
    assert b"no replica is ready" in body


def test_requests_arrive_as_they_were_and_a_client_that_goes_is_noticed() -> None:
    async def forever(writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM)
        while True:
            writer.write(chunk(b": x\n\n"))
            await writer.drain()
            await asyncio.sleep(0.02)

    async def run() -> None:
        async with Replica(forever) as replica:
            ingress = Ingress(1 << 20, 5.0)
            ingress.update({"a": (replica.url, {})})
            await ask(ingress, stay=False)
            await asyncio.wait_for(replica.closed.wait(), 5)
            assert replica.requests[0].startswith(b"POST /v1/completions?a=1 HTTP/1.1\r\nauthorization: Bearer k\r\n")
            assert b"expect" not in replica.requests[0]
            assert replica.requests[0].endswith(b'{"prompt": "And it came to pass"}')
            assert (ingress.live, ingress.targets["a"].rows, ingress.targets["a"].waiting) == (0, 0, 0)

    asyncio.run(run())


def test_an_answer_to_head_has_no_body() -> None:
    async def length_only(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n")

    async def run() -> None:
        async with Replica(length_only) as replica:
            ingress = Ingress(1 << 20, 5.0)
            ingress.update({"a": (replica.url, {})})
            status, _, body = await ask(ingress, method="HEAD")
            assert (status, body, list(ingress.targets)) == (200, b"", ["a"])

    asyncio.run(run())


def test_a_replica_that_was_not_lost_after_all_comes_back() -> None:
    """Its front was started again, and the registry has not missed it."""

    async def run() -> None:
        async with Replica(whole) as replica:
            ingress, said = Ingress(1 << 20, 5.0), {"a": (replica.url, dict[str, float]())}
            ingress.update(said)
            replica.script = head_only
            assert (await ask(ingress))[0] == 503
            replica.script = whole
            ingress.update(said)
            assert not ingress.targets  # the registry may not know yet
            ingress._lost["a"] = time.monotonic()
            ingress.update(said)
            assert (await ask(ingress))[0] == 200

    asyncio.run(run())


def test_a_registry_that_is_away_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    answers = [OSError("gone"), OSError("gone"), {}, OSError("gone"), asyncio.CancelledError()]

    async def registry() -> Any:
        if isinstance(answer := answers.pop(0), BaseException):
            raise answer
        return answer

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(watch(Ingress(1 << 20, 5.0), registry, seconds=0.0))
    assert [record.getMessage() for record in caplog.records] == ["the registry does not answer: OSError"] * 2


def test_a_node_that_goes_without_a_word_is_noticed() -> None:
    async def run() -> None:
        async with Replica(whole) as replica:
            host, _, port = replica.url.removeprefix("http://").partition(":")
            with closing(Upstream(host, int(port))) as upstream:
                await upstream.start("GET", b"/", [], b"")
                assert upstream._writer is not None
                end = upstream._writer.get_extra_info("socket")
                assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)

    asyncio.run(run())


def test_prefixes() -> None:
    system = {"role": "system", "content": "x" * 600}
    one, two = (
        prompt_prefix(json.dumps({"messages": [system, {"role": "user", "content": c}]}).encode()) for c in "ab"
    )
    assert one == two == b"x" * 512
    assert prompt_prefix(b'{"prompt": [1, 2]}') == b"[1, 2]"
    assert prompt_prefix(b'{"messages": 3') == b""


def test_homes_move_little() -> None:
    names = [str(i) for i in range(10)]
    keys = [str(i).encode() for i in range(500)]
    before = [names[homes(key, names)[0]] for key in keys]
    after = [names[1:][homes(key, names[1:])[0]] for key in keys]
    assert all(b == a for b, a in zip(before, after) if b != "0")
    assert 20 < before.count("0") < 90


def test_an_overloaded_home_is_left() -> None:
    rng = random.Random(0)
    assert choose([3.0, 2.0, 2.0], [0, 1], 7 / 3, rng) == 1
    assert all(choose([50.0, 40.0, 0.0, 0.0], [0, 1], 22.5, rng) == 1 for _ in range(9))
    assert sum(choose([500.0, 400.0, 0.0, 0.0], [0, 1], 225, rng) > 1 for _ in range(100)) > 60
    assert load(3, 100) == 5
    assert Target("a", "h", 1, rows=2, waiting=400, reported=3).load == 5


def test_desired_replicas() -> None:
    assert desired_replicas(4, 0, 0, 100, 1000, 1, 10) == 1
    assert desired_replicas(4, 5500, 0, 100, 1000, 1, 10) == 6
    assert desired_replicas(4, 50_000, 0, 100, 1000, 1, 10) == 8  # at most twice what works
    assert desired_replicas(4, 0, 175, 100, 1000, 1, 10) == 4
    assert desired_replicas(8, 50_000, 0, 100, 1000, 1, 10) == 10


def test_replicas_are_given_up_late() -> None:
    steady = Steady(10)
    assert [steady(at, wanted) for at, wanted in ((0, 2), (1, 8), (5, 3), (11, 3), (12, 4))] == [2, 8, 8, 8, 4]
