"""Structured output over HTTP, also through the openai client's `parse`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel
from serving import Server, chat, serve

SCHEMA = {
    "type": "object",
    "properties": {"king": {"enum": ["Saul", "David"]}, "years": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["king", "years"],
    "additionalProperties": False,
}


class Reign(BaseModel):
    king: Literal["Saul", "David"]
    years: int


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve() as server:
        yield server


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")


def test_a_schema_in_chats_and_completions(server: Server) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "reign", "schema": SCHEMA, "strict": True}}
    for stream in (False, True):
        body = chat(response_format=wanted, stream=stream, n=2, seed=3)
        response = server.http.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        for text in texts(response, stream):
            Reign.model_validate_json(text)
    body = {"prompt": "A king:", "structured_outputs": {"json": SCHEMA}, "max_tokens": 200}
    Reign.model_validate_json(server.http.post("/v1/completions", json=body).json()["choices"][0]["text"])


def texts(response: Any, stream: bool) -> list[str]:
    if not stream:
        return [choice["message"]["content"] for choice in response.json()["choices"]]
    joined: dict[int, str] = {}
    for line in response.text.split("\n\n"):
        if line and line != "data: [DONE]":
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                joined[choice["index"]] = joined.get(choice["index"], "") + (choice["delta"].get("content") or "")
    return list(joined.values())


@pytest.mark.parametrize(
    ("field", "value", "pattern"),
    [
        ("guided_regex", "[a-c]{3}", "[a-c]{3}"),
        ("guided_choice", ["Saul", "David"], "Saul|David"),
        ("guided_grammar", 'root ::= "a" | "b"', "a|b"),
        ("guided_json", json.dumps({"type": "boolean"}), "true|false"),
        ("structured_outputs", {"choice": ["x y"]}, "x y"),
        ("response_format", {"type": "text"}, ".*"),
        ("response_format", {"type": "json_object"}, r"\{.*"),
    ],
)
def test_vllms_names(server: Server, field: str, value: Any, pattern: str) -> None:
    answer = server.http.post("/v1/chat/completions", json=chat(max_tokens=20, **{field: value})).json()
    assert re.fullmatch(pattern, answer["choices"][0]["message"]["content"], re.DOTALL), answer


def test_parse(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Who?"}]
    answer = client.chat.completions.parse(model="kjv-llama", messages=messages, response_format=Reign)
    assert isinstance(answer.choices[0].message.parsed, Reign)


def test_two_kinds_at_once(server: Server) -> None:
    body = chat(guided_regex="a", response_format={"type": "json_object"})
    error = server.http.post("/v1/chat/completions", json=body).json()["error"]
    assert (error["param"], error["message"]) == ("guided_regex", "response_format and guided_regex exclude each other")
    for wrong in ({}, {"jsn": {}}):
        error = server.http.post("/v1/completions", json={"prompt": "a", "structured_outputs": wrong}).json()["error"]
        assert error["message"].count("structured_outputs") == 1
