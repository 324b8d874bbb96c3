"""Bad inputs that no other file tries (docs/bad-inputs.md says which test is about which), and that file itself."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Server, chat, serve

from flover.server.bodies import Ignored, decode
from flover.server.protocol import CompletionRequest

ROOT = Path(__file__).parents[2]
GREEDY = {"prompt": "In the beginning", "max_tokens": 8, "temperature": 0}
SLOW_SCHEMA = {"type": "integer", "multipleOf": 1_999_993, "maximum": 10**15}  # compiles for much longer than it may


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve("--max-model-len", "512", "--num-kv-blocks", "16", "--max-num-seqs", "8") as server:
        yield server


@pytest.fixture(autouse=True)
def canary(server: Server) -> Iterator[None]:
    yield
    assert server.http.post("/v1/completions", json={"prompt": "And", "max_tokens": 2}).status_code == 200
    assert server.metric("num_requests_live") == 0
    server.check_conservation()


def complete(server: Server, **body: Any) -> Any:
    return server.http.post("/v1/completions", json={**GREEDY, **body})


def test_tiny_temperatures_are_greedy(server: Server) -> None:
    want = complete(server).json()["choices"][0]["text"]
    for temperature in (1e-300, 5e-324, 1e-9):
        assert complete(server, temperature=temperature).json()["choices"][0]["text"] == want


def test_fits_the_context_but_not_the_cache(server: Server) -> None:
    with ThreadPoolExecutor(2) as pool:
        huge = pool.submit(complete, server, prompt=[7] * 300, max_tokens=5)
        small = pool.submit(complete, server)
        error = huge.result().json()["error"]
        assert huge.result().status_code == 400
        assert "can never fit the KV cache of 256 tokens" in error["message"]
        assert small.result().status_code == 200


@pytest.mark.parametrize("unit", ["a", "\u0301", "\U0001f469\u200d\U0001f469", "漢", "a\u0300b", "\0", "ﷺ"])
def test_long_monotonous_texts_take_bounded_time(server: Server, unit: str) -> None:
    text = unit * (1_000_000 // len(unit.encode()))
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=server.url) as other:
        begin = time.monotonic()
        answer, waits = pool.submit(server.http.post, "/tokenize", json={"prompt": text}), []
        while not answer.done():
            at = time.monotonic()
            assert other.get("/livez").status_code == 200
            waits.append(time.monotonic() - at)
        assert answer.result().status_code == 200
        assert answer.result().json()["count"] > 0
        assert time.monotonic() - begin < 30
        assert max(waits) < 5
    assert complete(server, prompt=text).json()["error"]["code"] == "context_length_exceeded"


def test_a_client_that_goes_while_its_grammar_compiles(server: Server) -> None:
    before = server.metric("request_accepted_total")
    body = json.dumps(chat(guided_json=SLOW_SCHEMA)).encode()
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head % len(body) + body)
            time.sleep(0.1)
    assert complete(server).status_code == 200  # tokenising does not wait for compilers
    assert server.metric("request_accepted_total") == before + 1


def test_a_slow_grammar_is_its_own_requests_business(server: Server) -> None:
    async def main() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            slow = asyncio.create_task(client.post("/v1/completions", json={**GREEDY, "guided_json": SLOW_SCHEMA}))
            while not slow.done():
                begin = time.monotonic()
                assert (await client.post("/v1/completions", json={**GREEDY, "max_tokens": 1})).status_code == 200
                assert time.monotonic() - begin < 5
            assert slow.result().status_code == 400
            error = slow.result().json()["error"]
            assert error["param"] == "guided_json"
            assert "cannot be compiled" in error["message"]

    asyncio.run(main())


def test_the_limit_inside_json(server: Server) -> None:
    wanted = {"type": "array", "items": {"enum": ["abcdefgh"]}, "minItems": 9, "maxItems": 9}
    choice = complete(server, guided_json=wanted).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    tight = "".join(choice["text"].split())
    assert tight
    assert ("[" + ",".join(['"abcdefgh"'] * 9)).startswith(tight)


def test_a_dead_end_in_a_stream_is_an_event(server: Server) -> None:
    answer = complete(server, guided_choice=["yes"], min_tokens=8, stream=True)
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    error = json.loads(events[-2])["error"]
    assert (error["type"], error["code"], events[-1]) == ("invalid_request_error", "generation_failed", "[DONE]")


@pytest.mark.parametrize("depth", [200, 900, 100_000])
def test_deep_schemas(server: Server, depth: int) -> None:
    schema = b'{"type":"array","items":' * depth + b"{}" + b"}" * depth
    body = b'{"prompt":"And","max_tokens":1,"guided_json":' + schema + b"}"
    answer = server.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in ((200, 400) if depth == 200 else (400,)), answer.text


def test_a_request_id_is_a_label(server: Server) -> None:
    """Clients may use one id twice at once; the engine has ids of its own."""

    async def main() -> None:
        async with httpx.AsyncClient(base_url=server.url, headers={"X-Request-Id": "same"}, timeout=30) as client:
            answers = await asyncio.gather(*(client.post("/v1/completions", json=GREEDY) for _ in range(4)))
        assert {(answer.status_code, answer.headers["x-request-id"]) for answer in answers} == {(200, "same")}

    asyncio.run(main())


def test_unknown_fields_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    ignored = Ignored()
    with caplog.at_level(logging.WARNING, logger="flover"):
        for extra in ({"temprature": 0}, {"temprature": 1}, {"store": True, "suffix": None}):
            ignored.note(decode(json.dumps({"prompt": "a", **extra}).encode(), CompletionRequest))
        for i in range(1000):
            ignored.note(decode(json.dumps({"prompt": "a", f"x{i}": 0}).encode(), CompletionRequest))
    assert [record.getMessage().partition(": ")[2] for record in caplog.records[:2]] == ["'temprature'", "'store'"]
    assert len(caplog.records) < 300


def test_every_line_of_the_table_names_a_test_that_exists() -> None:
    rows = [line for line in (ROOT / "docs/bad-inputs.md").read_text(encoding="utf-8").splitlines() if "tests/" in line]
    assert len(rows) > 30
    for row in rows:
        for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row):
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"
