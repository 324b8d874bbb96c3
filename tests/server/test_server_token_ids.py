"""Token ids in answers (`return_token_ids`), prompts that are only scored (`max_tokens: 0`), other origins' pages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serving import Server, chat, serve

from flover.cli import main
from flover.server.config import ServerConfig

ORIGIN = "https://app.example"
SMILE = "\N{GRINNING FACE}"  # its bytes are several tokens, of which only the last has text


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve(*CORS, key="k", env=KEY) as server:
        yield server
        server.check_conservation()


KEY = {"FLOVER_API_KEY": "k"}
CORS = ("--allowed-origins", ORIGIN, "--allowed-origins", '["https://b.example"]')


def post(server: Server, path: str, **body: Any) -> Any:
    answer = server.http.post(f"/v1/{path}", json={"temperature": 0, "max_tokens": 8, **body})
    assert answer.status_code == 200, answer.text
    if not body.get("stream"):
        return answer.json()
    lines = [line[6:] for line in answer.text.split("\n\n") if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def joined(choices: list[Any]) -> list[int]:
    return [token for choice in choices for token in choice["token_ids"]]


def ids_of(server: Server, text: str) -> list[int]:
    return list(server.http.post("/tokenize", json={"prompt": text}).json()["tokens"])


def text_of(server: Server, ids: list[int]) -> str:
    return str(server.http.post("/detokenize", json={"tokens": ids}).json()["prompt"])


def test_token_ids_of_completions(server: Server) -> None:
    prompts = ["In the beginning", "And Moses"]
    more: Any = {"prompt": prompts, "n": 2, "seed": 1, "temperature": 1.0, "return_token_ids": True, "logprobs": 0}
    whole = post(server, "completions", **more)["choices"]
    for choice in whole:
        assert choice["prompt_token_ids"] == ids_of(server, prompts[choice["index"] // 2])
        assert text_of(server, choice["token_ids"]) == choice["text"]
        assert len(choice["token_ids"]) == 8
    pieces: dict[int, list[Any]] = {}
    for event in post(server, "completions", stream=True, **more):
        (choice,) = event["choices"]
        pieces.setdefault(choice["index"], []).append(choice)
    for choice in whole:
        parts = pieces[choice["index"]]
        assert [part.get("prompt_token_ids") for part in parts] == [choice["prompt_token_ids"]] + [None] * (
            len(parts) - 1
        )
        assert joined(parts) == choice["token_ids"]
        assert all(len(part["logprobs"]["tokens"]) == len(part["token_ids"]) for part in parts)
        assert "".join(part["text"] for part in parts) == choice["text"]
    assert "token_ids" not in post(server, "completions", prompt="x")["choices"][0]


def test_token_ids_of_chats(server: Server) -> None:
    more: Any = {**chat("Selah"), "return_token_ids": True}
    whole = post(server, "chat/completions", **more)
    (choice,) = whole["choices"]
    rendered = server.http.post("/tokenize", json=chat("Selah")).json()["tokens"]
    assert whole["prompt_token_ids"] == rendered
    assert text_of(server, choice["token_ids"]) == choice["message"]["content"]
    first, *rest = post(server, "chat/completions", stream=True, **more)
    assert (first["prompt_token_ids"], first["choices"][0]["delta"]["role"]) == (rendered, "assistant")
    assert not any("prompt_token_ids" in event for event in rest)
    assert joined([event["choices"][0] for event in rest]) == choice["token_ids"]


def test_tokens_without_a_text_of_their_own_are_told_as_they_come(server: Server) -> None:
    """Half a character waits for its other half, and a prompt is repeated once."""
    smile = ids_of(server, SMILE)
    assert len(smile) > 1
    forced: Any = {"guided_choice": [SMILE], "prompt": "Hail", "echo": True, "return_token_ids": True, "stream": True}
    for _ in range(5):  # tokens that a slow reader has not taken yet are told together
        parts = [event["choices"][0] for event in post(server, "completions", **forced)]
        assert joined(parts)[: len(smile)] == smile
        assert "".join(part["text"] for part in parts) == f"Hail{SMILE}"
        if len(parts) > 1:
            return
    pytest.fail("all tokens came in one event, five times")


def test_a_prompt_that_is_only_scored(server: Server) -> None:
    more: Any = {"prompt": ["In the beginning", "Selah"], "echo": True, "logprobs": 1}
    scored = post(server, "completions", **{**more, "max_tokens": 0, "return_token_ids": True})
    longer = post(server, "completions", **{**more, "max_tokens": 3})
    for none, some in zip(scored["choices"], longer["choices"]):
        count = len(none["prompt_token_ids"])
        assert (none["text"], none["finish_reason"], none["token_ids"]) == (more["prompt"][none["index"]], "length", [])
        assert none["logprobs"] == {name: values[:count] for name, values in some["logprobs"].items()}
        assert none["logprobs"]["token_logprobs"][0] is None
        assert len(none["logprobs"]["tokens"]) == count
    usage = scored["usage"]
    assert (usage["completion_tokens"], usage["total_tokens"]) == (0, usage["prompt_tokens"])
    events = post(server, "completions", stream=True, **{**more, "max_tokens": 0})
    texts = {event["choices"][0]["index"]: event["choices"][0]["text"] for event in events}
    assert [texts[0], texts[1]] == more["prompt"]
    refused = server.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 0})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")


def test_pages_of_other_origins(server: Server) -> None:
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}
    for origin in (ORIGIN, "https://b.example"):
        before = httpx.options(f"{server.url}/v1/completions", headers={"Origin": origin, **ask})  # without a key
        assert (before.status_code, before.headers["access-control-allow-origin"]) == (200, origin)
        assert "authorization" in before.headers["access-control-allow-headers"]
    body = {"prompt": "And", "max_tokens": 3, "stream": True}
    streamed = server.http.post("/v1/completions", json=body, headers={"Origin": ORIGIN})
    assert (streamed.status_code, streamed.headers["access-control-allow-origin"]) == (200, ORIGIN)
    assert "X-Request-Id" in streamed.headers["access-control-expose-headers"]
    refused = httpx.post(f"{server.url}/v1/completions", json=body, headers={"Origin": ORIGIN})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, ORIGIN)
    other = server.http.post("/v1/completions", json=body, headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers
    asked = server.http.options("/v1/completions", headers={"Origin": "https://evil.example", **ask})
    assert asked.status_code == 400
    assert "access-control-allow-origin" not in asked.headers


def test_origins_that_are_none(capfd: pytest.CaptureFixture[str]) -> None:
    assert not ServerConfig().allowed_origins
    with pytest.raises(ValueError, match="allowed_origins must be such as"):
        ServerConfig(allowed_origins=["https://app.example/"])
    assert main(["serve", "--allowed-origins", "[1]"]) == 2
    assert "JSON list" in capfd.readouterr().err


def test_settings_that_cannot_work(capfd: pytest.CaptureFixture[str]) -> None:
    for option, value in (("--body-timeout", "0"), ("--otlp-traces-endpoint", "localhost:4318")):
        assert main(["serve", option, value]) == 2
        assert option[2:].replace("-", "_") in capfd.readouterr().err
