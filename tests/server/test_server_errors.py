"""Bad inputs of every kind: each gets OpenAI's error object with the parameter, and the next request is served."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from serving import Server, chat, serve

BODY_LIMIT = 1 << 20
PARAMETERS: list[tuple[str, Any]] = [
    *(("n", value) for value in (0, -1, True, 1.5, "2", 10**9)),
    *(("temperature", value) for value in (-1, 1e308, "hot")),
    *(("top_p", value) for value in (0, 1.0001, [])),
    *(("top_k", value) for value in (-2, 2**63)),
    *(("min_p", value) for value in (1.1, -0.1)),
    *(("max_tokens", value) for value in (0, -1, 2**63, 2000, True)),
    ("logit_bias", {"99999999": 1}),
    ("logit_bias", {"1": "much"}),
    ("logit_bias", {"one": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {str(i): 0 for i in range(70_000)}),
    ("logit_bias", [1]),
    ("stop_token_ids", [10**6]),
    ("stop", ""),
    ("stop", ["x"] * 10_000),
    ("stop", "x" * 500_000),
    ("stop", 5),
    ("bad_words", ["   "]),
    ("allowed_token_ids", []),
    ("allowed_token_ids", [10**6]),
    ("seed", -1),
    ("seed", 2**64),
    ("presence_penalty", 3),
    ("frequency_penalty", -2.5),
    ("repetition_penalty", 0),
    ("min_tokens", 17),
    ("ignore_eos", "yes"),
    ("stream", "true"),
    ("stream_options", {"include_usage": True}),
    ("best_of", 3),
    ("priority", 1.5),
    ("cache_salt", 1),
    *(
        ("response_format", value)
        for value in (
            {"type": "banana"},
            {"type": "json_schema"},
            {"type": "json_schema", "json_schema": {"name": "x"}},
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "banana"}}},
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "http://127.0.0.1:9/x"}}},
            "json",
        )
    ),
    *(("structured_outputs", value) for value in ({}, {"json": {}, "regex": "a"}, {"regex": "a{"}, {"jsn": {}}, 1)),
    ("guided_regex", "(?<=a)b"),
    ("guided_choice", []),
    ("guided_json", {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
    ("guided_grammar", "start: nothing"),
]
COMPLETIONS: list[tuple[str, Any]] = [
    *(("prompt", value) for value in ("", [], [[]], [""], None, ["a", 1], [1, "a"], [-1], [10**6], [True], {}, 5)),
    ("prompt", ["a"] * 1025),
    ("logprobs", 21),
    ("logprobs", -1),
    ("logprobs", True),
    ("suffix", "end"),
    ("truncate_prompt_tokens", 5),
    ("prompt_logprobs", 0),
    ("prompt_embeds", "AAAA"),
    ("return_tokens_as_token_ids", True),
    ("add_special_tokens", False),
]
CHATS: list[tuple[str, Any]] = [
    ("messages", []),
    ("messages", None),
    ("messages", "hello"),
    ("messages", [{"role": "emperor", "content": "x"}]),
    ("messages", [{"role": "user", "content": None}]),
    ("messages", [{"role": "user"}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]),
    ("messages", [{"role": "tool", "content": "x"}]),
    ("top_logprobs", 21),
    ("top_logprobs", 2),
    ("max_completion_tokens", 0),
    *(
        ("tools", value)
        for value in (
            [{"type": "function"}],
            [{"type": "banana", "function": {"name": "f"}}],
            [{"type": "function", "function": {"name": "a b"}}],
            [{"type": "function", "function": {"name": "f", "parameters": 5}}],
            [{"type": "function", "function": {"name": "f"}}] * 2,
            [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)],
            "f",
        )
    ),
    *(("tool_choice", value) for value in ("required", "banana", {"type": "function", "function": {"name": "g"}}, 5)),
    ("chat_template", "{{ x }}"),
    ("chat_template_kwargs", {"tokenize": True}),
    ("continue_final_message", True),
    ("echo", True),
    ("documents", [{"text": "x"}]),
    ("add_special_tokens", True),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve("--max-body-bytes", str(BODY_LIMIT), "--body-timeout", "1") as server:
        yield server


@pytest.fixture(autouse=True)
def canary(server: Server) -> Iterator[None]:
    yield
    response = server.http.post("/v1/completions", json={"prompt": "And", "max_tokens": 2})
    assert response.status_code == 200
    assert server.metric("num_requests_live") == 0
    server.check_conservation()


def check(response: Any, status: int, param: str | None = None, code: str | None = None) -> str:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["code"] == code
    message: str = error["message"]
    assert "\n" not in message
    assert 0 < len(message) < 500
    return message


def named(path: str, base: dict[str, Any], cases: list[tuple[str, Any]]) -> list[Any]:
    return [pytest.param(path, base, n, v, id=f"{path[4:8]}-{n}-{str(v)[:20]}") for n, v in cases]


@pytest.mark.parametrize(
    ("path", "base", "name", "value"),
    [
        *named("/v1/completions", {"prompt": "And"}, PARAMETERS + COMPLETIONS),
        *named("/v1/chat/completions", chat(max_tokens=16), PARAMETERS + CHATS),
    ],
)
def test_parameters(server: Server, path: str, base: dict[str, Any], name: str, value: Any) -> None:
    response = server.http.post(path, json={**base, name: value})
    code = "context_length_exceeded" if (name, value) == ("max_tokens", 2000) else None
    message = check(response, 400, name, code)
    assert name in message or name in ("prompt", "stream_options", "messages")


def test_choices_over_all_prompts_are_bounded(server: Server) -> None:
    check(server.http.post("/v1/completions", json={"prompt": ["a"] * 300, "n": 4}), 400, "n")
    biased = {"prompt": "a", "n": 100, "logit_bias": {str(i): 0 for i in range(20_000)}}
    check(server.http.post("/v1/completions", json=biased), 400, "logit_bias")


def test_a_null_is_not_given(server: Server) -> None:
    body = {"prompt": "And", "n": None, "stop": None, "temperature": None, "stream": None, "logit_bias": None}
    assert server.http.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] <= 16


def test_all_tokens_masked_ends_that_request_only(server: Server) -> None:
    body = {"prompt": "And", "allowed_token_ids": [5], "bad_words": [], "logit_bias": {}, "min_tokens": 2}
    masked = {**body, "stop_token_ids": [5]}
    response = server.http.post("/v1/completions", json=masked)
    assert "no token is left" in check(response, 400, None, "generation_failed")
    stream = server.http.post("/v1/completions", json={**masked, "stream": True})
    assert stream.status_code == 200
    events = stream.text.split("\n\n")
    assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == "generation_failed"
    assert events[-2] == "data: [DONE]"


def test_context_length(server: Server) -> None:
    for length, status in ((1023, 200), (1024, 200), (1025, 400)):
        response = server.http.post("/v1/completions", json={"prompt": [7] * length})
        assert response.status_code == status, response.text
    message = check(response, 400, "prompt", "context_length_exceeded")
    assert "1025" in message
    assert "1024" in message
    response = server.http.post("/v1/completions", json={"prompt": [7] * 1000, "max_tokens": 25})
    assert "1000" in check(response, 400, "max_tokens", "context_length_exceeded")
    message = check(
        server.http.post("/v1/chat/completions", json=chat("a" * 900_000)), 400, "messages", "context_length_exceeded"
    )
    assert "characters" in message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"3",
        b'{"prompt":"a"} x',
        b"{'prompt': 1}",
        b'{"prompt":"a","temperature":NaN}',
        b'{"prompt":"a","temperature":Infinity}',
        b'{"prompt":"a","logit_bias":{"1":NaN}}',
        b'{"prompt":"\\ud800"}',
        b'{"prompt":"a","stop":"\\ud800"}',
        b'{"prompt":"\xff"}',
        b'\xef\xbb\xbf{"prompt":"a"}',
        b"[" * 100_000,
        b'{"prompt":' + b"[" * 100_000,
        b'{"prompt":"a","seed":' + b"1" * 1_000_000 + b"}",
        b'{"prompt":"a","temperature":1e999}',
    ],
    ids=lambda body: repr(body[:24]),
)
def test_bodies(server: Server, body: bytes) -> None:
    begin = time.monotonic()
    response = server.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    check(response, 400)
    assert time.monotonic() - begin < 1


def test_a_nul_is_a_character(server: Server) -> None:
    tokens = server.http.post("/tokenize", json={"prompt": "a\0b"}).json()["tokens"]
    assert server.http.post("/detokenize", json={"tokens": tokens}).json()["prompt"].endswith("a\0b")


def test_routes_types_and_models(server: Server) -> None:
    check(server.http.get("/v1/nothing"), 404)
    check(server.http.get("//v1/models"), 404)
    check(server.http.get("/v1/completions"), 405)
    check(server.http.post("/v1/models"), 405)
    body = {"prompt": "And", "model": "gpt-4"}
    check(server.http.post("/v1/completions", json=body), 404, "model", "model_not_found")
    response = server.http.post("/v1/completions", content=b"prompt=And", headers={"Content-Type": "text/plain"})
    check(response, 415)
    check(server.http.post("/tokenize", json={}), 400, "prompt")
    check(server.http.post("/detokenize", json={"tokens": [10**6]}), 400, "tokens")


def test_a_long_body_is_refused_before_it_is_read(server: Server) -> None:
    declared = send(server, b"Content-Length: 27000000\r\n", b"x")
    assert declared.startswith(b"HTTP/1.1 413 ")
    chunk = b"%x\r\n%s\r\n" % (65_536, b"x" * 65_536)
    chunked = send(server, b"Transfer-Encoding: chunked\r\n", chunk * (BODY_LIMIT // 65_536 + 1))
    assert chunked.startswith(b"HTTP/1.1 413 ")
    assert b'"code":"body_too_large"' in chunked
    whole = server.http.post("/v1/completions", json={"prompt": "a" * 27_000_000})
    check(whole, 413, None, "body_too_large")


def test_long_texts_leave_the_loop_free(server: Server) -> None:
    def tokenize() -> int:
        return server.http.post(
            "/tokenize", json={"prompt": "God created the heaven and the earth " * 27_000}
        ).status_code

    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=server.url) as other:
        long, waits = pool.submit(tokenize), []
        while not long.done():
            begin = time.monotonic()
            assert other.get("/livez").status_code == 200
            waits.append(time.monotonic() - begin)
        assert long.result() == 200
    assert len(waits) > 5
    assert sorted(waits)[len(waits) // 2] < 0.3
    assert max(waits) < 5  # of a machine that is busy with other things


def test_a_slow_body(server: Server) -> None:
    assert send(server, b"Content-Length: 10\r\n", b"{").startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    ("headers", "statuses"),
    [
        (b"Content-Length: -5\r\n", (b"400",)),
        (b"Content-Length: many\r\n", (b"400",)),
        (b"Content-Length: 3\r\nContent-Length: 2\r\n", (b"400",)),
        (b"Content-Length: 1\r\n", (b"400", b"")),  # smaller than the body, whose rest is no request
        (b"Content-Length: 20\r\n", (b"408",)),
        (b"X-Long: " + b"a" * 1_000_000 + b"\r\n", (b"431", b"")),
        (b"".join(b"X-%d: 1\r\n" % i for i in range(10_000)), (b"431", b"")),
        (b"X-Long: " + b"a" * 65_600 + b"\r\n", (b"431",)),  # a little more than the limit, perhaps in one piece
        (b"".join(b"X-%d: 1\r\n" % i for i in range(7_000)), (b"431",)),
        (b"X-Long: " + b"a" * 60_000 + b"\r\nContent-Length: 7\r\n", (b"400",)),
    ],
    ids=lambda value: repr(value[:30]) if isinstance(value, bytes) else "",
)
def test_heads(server: Server, headers: bytes, statuses: tuple[bytes, ...]) -> None:
    answer = send(server, headers, b'{"a":1}')
    assert answer[9:12] in statuses, answer[:200]


def send(server: Server, headers: bytes, body: bytes) -> bytes:
    """A request by hand; -> the answer, or what came of it until the server closed or said nothing for 3 s."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    answer = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=3) as connection:
        try:
            connection.sendall(head + headers + b"\r\n" + body)
            while not answer.endswith(b"}}") and (data := connection.recv(65_536)):
                answer += data
        except (TimeoutError, ConnectionError):
            pass
    return answer
