"""The official client, sync and async, streamed and not; the same texts as `LLM`; bytes of a stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from serving import Server, chat, serve

from flover import LLM, SamplingParams

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
NAMES = [word for name in ("m", "other", "m") for word in ("--served-model-name", name)]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve(*NAMES, "--dtype", "float64") as server:
        yield server
        server.check_conservation()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(device="cpu", num_threads=1, dtype="float64") as llm:
        yield llm


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["m", "other"]
    assert client.models.retrieve("other").id == "other"
    with pytest.raises(openai.NotFoundError, match="does not exist") as error:
        client.models.retrieve("gpt-4")
    assert error.value.code == "model_not_found"


def test_the_texts_of_llm(client: openai.OpenAI, llm: LLM) -> None:
    messages: Any = [{"role": "user", "content": "Who was Moses?"}]
    params = SamplingParams(temperature=0, max_tokens=12)
    want = llm.chat(messages, params)[0].outputs[0].text
    got = client.chat.completions.create(model="m", messages=messages, temperature=0, max_completion_tokens=12)
    assert got.choices[0].message.content == want
    assert got.choices[0].message.role == "assistant"
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "Who was Moses?"}]}]
    assert client.chat.completions.create(model="m", messages=parts, **GREEDY).choices[0].message.content == want

    prompts = ["In the beginning", "And Moses said"]
    texts = [output.outputs[0].text for output in llm.generate(prompts, params)]
    completion = client.completions.create(model="m", prompt=prompts, **GREEDY)
    assert [choice.text for choice in completion.choices] == texts
    assert [choice.index for choice in completion.choices] == [0, 1]
    ids = [output.prompt_token_ids for output in llm.generate(prompts, params)]
    assert [c.text for c in client.completions.create(model="m", prompt=ids, **GREEDY).choices] == texts
    assert client.completions.create(model="m", prompt=ids[0], **GREEDY).choices[0].text == texts[0]
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == len(ids[0]) + len(ids[1])
    assert completion.usage.completion_tokens == 24
    assert completion.usage.prompt_tokens_details is not None


def test_echo_logprobs_stop_and_seed(client: openai.OpenAI, llm: LLM) -> None:
    got = client.completions.create(model="m", prompt="In the beginning", echo=True, logprobs=2, **GREEDY)
    choice = got.choices[0]
    assert choice.text.startswith("In the beginning")
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.tokens is not None
    assert choice.logprobs.text_offset is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in choice.logprobs.token_logprobs[1:])
    assert got.usage is not None
    assert len(choice.logprobs.tokens) == got.usage.total_tokens
    assert "".join(choice.logprobs.tokens) == choice.text
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset):
        assert choice.text[offset:].startswith(token)
    assert choice.logprobs.top_logprobs is not None
    for token, top in zip(choice.logprobs.tokens[1:], choice.logprobs.top_logprobs[1:]):
        assert token in top  # what was drawn, beside the two best
        assert len(top) in (2, 3)
    (ids,) = (output.prompt_token_ids for output in llm.generate(["In the beginning"], SamplingParams(max_tokens=1)))
    for more in ({"prompt": ids}, {"prompt": [ids]}, {"prompt": "In the beginning", "stream": True, "stop": ["ZZZZ"]}):
        again: Any = client.completions.create(model="m", echo=True, logprobs=2, **more, **GREEDY)
        parts = [part.choices[0] for part in again] if "stream" in more else again.choices
        assert "".join(part.text for part in parts) == choice.text
        assert [token for part in parts for token in part.logprobs.tokens] == choice.logprobs.tokens
        assert [offset for part in parts for offset in part.logprobs.text_offset] == choice.logprobs.text_offset

    scored = client.chat.completions.create(
        **chat(), model="m", logprobs=True, top_logprobs=3, temperature=0, max_tokens=3
    ).choices[0]
    assert scored.logprobs is not None
    assert scored.logprobs.content is not None
    for one in scored.logprobs.content:
        assert len(one.top_logprobs) == 3
        assert one.logprob == one.top_logprobs[0].logprob
        assert bytes(one.bytes or ()).decode() == one.token
    assert "".join(one.token for one in scored.logprobs.content) == scored.message.content

    stopped = client.completions.create(
        model="m", prompt="In the beginning", stop=["the"], temperature=0, max_tokens=40
    )
    assert stopped.choices[0].finish_reason == "stop"
    assert "the" not in stopped.choices[0].text
    extra = {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.1, "ignore_eos": True, "nobody_knows": 1}
    twice = [
        client.completions.create(model="m", prompt="And", seed=7, n=3, max_tokens=9, extra_body=extra).choices
        for _ in range(2)
    ]
    assert [c.text for c in twice[0]] == [c.text for c in twice[1]]
    assert len({c.text for c in twice[0]}) > 1


def test_a_stream_joins_to_the_whole(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": "m", "seed": 3, "n": 2, "max_tokens": 20, "logprobs": True, **chat("Selah")}
    whole = client.chat.completions.create(**request)
    texts, scored, reasons, usages = ["", ""], [0, 0], ["", ""], []
    for chunk in client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **request):
        usages.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            scored[choice.index] += len(choice.logprobs.content or ()) if choice.logprobs else 0
            reasons[choice.index] += choice.finish_reason or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert whole.usage is not None
    assert sum(scored) == whole.usage.completion_tokens
    assert usages[:-1] == [None] * (len(usages) - 1)
    assert usages[-1].completion_tokens == whole.usage.completion_tokens

    many: dict[str, Any] = {"model": "m", "prompt": ["And", "Selah"], "echo": True, **GREEDY}
    pieces = ["", ""]
    for part in client.completions.create(stream=True, **many):
        pieces[part.choices[0].index] += part.choices[0].text
    assert pieces == [choice.text for choice in client.completions.create(**many).choices]


def test_async_clients_together(server: Server) -> None:
    async def one(client: openai.AsyncOpenAI, i: int) -> str:
        stream = await client.chat.completions.create(**chat(f"{i}"), model="m", stream=True, max_tokens=1 + i)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, i) for i in range(24)))

    assert all(asyncio.run(all_of_them()))


def test_the_bytes_of_a_stream(server: Server) -> None:
    body = chat(stream=True, max_tokens=3, temperature=0, stream_options={"include_usage": True})
    response = server.http.post("/v1/chat/completions", json=body, headers={"X-Request-Id": "mine"})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-request-id"] == "mine"
    events = response.text.split("\n\n")
    assert events.pop() == ""
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    assert events.pop() == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert len({(chunk["id"], chunk["object"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    usage = chunks[-1]["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] == 3


def test_tokenize_and_back(server: Server) -> None:
    text = "In the beginning God created the heaven and the earth. 🙂"
    tokens = server.http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    assert tokens["max_model_len"] == 1024
    assert server.http.post("/detokenize", json={"tokens": tokens["tokens"]}).json()["prompt"].endswith(text)
    rendered = server.http.post("/tokenize", json=chat()).json()
    usage = server.http.post("/v1/chat/completions", json=chat(max_tokens=1)).json()["usage"]
    assert usage["prompt_tokens"] == rendered["count"]


def test_the_small_endpoints(server: Server) -> None:
    for path in ("/livez", "/readyz", "/health", "/ping"):
        assert server.http.get(path).status_code == 200
    assert server.http.get("/version").json() == {"version": "0.1.0"}
    assert server.http.get("/load").json()["server_load"] == 0
    assert len(server.http.get("/livez").headers["x-request-id"]) == 32
    bad = server.http.get("/livez", headers={"X-Request-Id": "a" * 200})
    assert len(bad.headers["x-request-id"]) == 32


def test_metrics_count(server: Server) -> None:
    names = (
        "prompt_tokens_total",
        "generation_tokens_total",
        "request_success_total",
        "inter_token_latency_seconds_count",
    )
    before = [server.metric(name) for name in names]
    body = {"prompt": [5, 6, 7], "max_tokens": 10, "ignore_eos": True}
    assert server.http.post("/v1/completions", json=body).status_code == 200
    assert [server.metric(name) - old for name, old in zip(names, before)] == [3, 10, 1, 9]
    assert server.metric("kv_cache_usage_perc") == 0
    assert server.metric("step_seconds_count") > 0
    assert server.metric("time_to_first_token_seconds_count") == server.metric("e2e_request_latency_seconds_count")
