"""The OpenAPI document: it is whole, and what schemathesis makes of it never gets a 5xx."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from serving import Server, serve

from flover.server.app import BODIES, TOLD
from flover.server.openapi import openapi

DOCUMENT = openapi(BODIES, TOLD)
schema = schemathesis.openapi.from_dict(DOCUMENT)
SUPPRESSED = list(HealthCheck)
GENERATION = ["/v1/chat/completions", "/v1/completions", "/v1/responses"]  # half a minute to make the first body
PHASES = (Phase.explicit, Phase.generate)  # a server is no place to shrink


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve("--max-model-len", "24", "--max-num-seqs", "16") as server:
        yield server
        assert server.http.post("/v1/completions", json={"prompt": "And", "max_tokens": 2}).status_code == 200
        server.check_conservation()


def test_the_document(server: Server) -> None:
    assert server.http.get("/openapi.json").json() == DOCUMENT
    chat = DOCUMENT["components"]["schemas"]["ChatCompletionRequest"]
    assert {"messages", "tools", "response_format", "top_k", "guided_regex"} <= set(chat["properties"])
    assert chat["required"] == ["messages"]
    for one in DOCUMENT["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(one)


def check(server: Server, case: Any) -> None:
    response = case.call(base_url=server.url, timeout=60)
    assert response.status_code < 500, (case.as_curl_command(), response.text)
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@schema.exclude(path=GENERATION).parametrize()
@settings(max_examples=3, deadline=None, suppress_health_check=SUPPRESSED, phases=PHASES, derandomize=True)
def test_no_5xx_quick(server: Server, case: Any) -> None:
    check(server, case)


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=300, deadline=None, suppress_health_check=SUPPRESSED, phases=PHASES)
def test_no_5xx(server: Server, case: Any) -> None:
    check(server, case)
