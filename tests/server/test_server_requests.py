"""The application in this process, over an engine in its own: keys on every route, clients that go, a full queue."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from asgi import Client, Steps, run, until

from flover import AsyncLLM
from flover.server.app import routes
from flover.server.config import ServerConfig
from flover.server.middleware import OPEN_PATHS

MAX_NUM_SEQS = 4
LONG = {"max_tokens": 900, "ignore_eos": True, "prompt": "And it came to pass"}


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    llm = AsyncLLM(device="cpu", num_threads=1, max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=32)
    yield llm
    llm.shutdown()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("where", "body"),
    [
        ("prefill", {"prompt": [7] * 900, "max_tokens": 100}),
        ("decode", LONG),
        ("decode", {**LONG, "n": 3}),
        ("decode", {**LONG, "prompt": ["And", "Or"]}),
        ("queue", LONG),
    ],
)
def test_a_client_that_goes_frees_its_rows_within_a_step(
    llm: AsyncLLM, where: str, body: dict[str, Any], stream: bool
) -> None:
    async def test(service: Steps, app: Any) -> None:
        others = []
        if where == "queue":
            others = [Client(app, "/v1/completions", {**LONG, "n": MAX_NUM_SEQS, "stream": True})]
            await until(lambda: service.metrics.generation_tokens > 20)
        before = set(service.load.live)
        client = Client(app, "/v1/completions", {**body, "stream": stream})
        await until(lambda: set(service.load.live) - before)
        if where == "decode":
            await until(lambda: service.metrics.generation_tokens > 10)
        else:
            begin = service.num_steps
            await until(lambda: service.num_steps >= begin + 3)
            assert all(service.load.live[name].num_tokens == 0 for name in set(service.load.live) - before)
        assert service.load.waiting == (1 if where == "queue" else 0)

        tokens, begin = service.metrics.generation_tokens, service.num_steps
        client.gone.set()
        await until(lambda: set(service.load.live) == before)
        # one in flight, one planned ahead, the one that says so, and what came while this process was kept from running
        assert service.num_steps - begin <= 10
        if not others:
            assert service.metrics.generation_tokens - tokens <= 9 * service_rows(body)
        new = len(set(service.llm.live_request_ids) - before)
        assert service.metrics.aborted_for.total() == new + num_prompts(body)
        await client.task
        for other in others:
            other.gone.set()
            await other.task

    run(llm, test)


def service_rows(body: dict[str, Any]) -> int:
    return int(body.get("n", 1)) * num_prompts(body)


def num_prompts(body: dict[str, Any]) -> int:
    return len(body["prompt"]) if isinstance(body["prompt"][0], str) and isinstance(body["prompt"], list) else 1


def test_a_thousand_clients_that_go(llm: AsyncLLM) -> None:
    async def test(service: Steps, app: Any) -> None:
        async def one(i: int) -> None:
            client = Client(app, "/v1/completions", {**LONG, "stream": i % 2 == 0, "n": 1 + i % 3})
            await asyncio.sleep(0.0005 * (i * 7919 % 97))
            client.gone.set()
            await client.task

        for wave in range(10):
            await asyncio.gather(*(one(wave * 100 + i) for i in range(100)))

    run(llm, test, max_queued_requests=10_000)


def test_a_full_queue_is_a_429(llm: AsyncLLM) -> None:
    async def test(service: Steps, app: Any) -> None:
        running = [Client(app, "/v1/completions", {**LONG, "stream": True}) for _ in range(MAX_NUM_SEQS + 2)]
        await until(lambda: len(service.load.live) == len(running) and service.metrics.generation_tokens > 20)
        assert service.load.waiting == 2
        refused = Client(app, "/v1/completions", {**LONG, "stream": True})
        await refused.task
        assert refused.status == 429
        assert 1 <= int(refused.headers[b"retry-after"]) <= 60
        error = json.loads(refused.sent)["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        assert service.metrics.rejected["queue_full"] == 1
        for client in running:
            client.gone.set()
            await client.task

    run(llm, test, max_queued_requests=2)


def test_queued_tokens_are_bounded_too(llm: AsyncLLM) -> None:
    async def test(service: Steps, app: Any) -> None:
        long = [Client(app, "/v1/completions", {"prompt": [7] * 800, "max_tokens": 5}) for _ in range(2)]
        await until(lambda: service.load.live)
        await until(lambda: any(client.status for client in long))
        assert sorted(client.status for client in long) == [0, 429]
        await asyncio.gather(*(client.task for client in long))
        assert sorted(client.status for client in long) == [200, 429]

    run(llm, test, max_queued_tokens=1000)


def test_a_burst_into_free_rows_is_no_queue(llm: AsyncLLM) -> None:
    async def test(service: Steps, app: Any) -> None:
        clients = [Client(app, "/v1/completions", {"prompt": "And", "max_tokens": 5}) for _ in range(MAX_NUM_SEQS)]
        await asyncio.gather(*(client.task for client in clients))
        assert [client.status for client in clients] == [200] * MAX_NUM_SEQS

    run(llm, test, max_queued_requests=1)


def test_keys_guard_every_route(llm: AsyncLLM) -> None:
    keys = ["correct-horse", "battery-staple"]

    async def test(service: Steps, app: Any) -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            paths = [(method, route.path) for route in routes(service) for method in sorted(route.methods or ())]
            assert len(paths) > 12
            unknown = ("/nothing", "/page/", "/page/../metrics", "/page/nothing.js", "//livez", "/livez/", "/LIVEZ", "")
            for path in (*unknown, "/v1/../livez", "/livez/../v1/models"):
                trick = Client(app, path, {})  # as it is, which no client library would send
                await trick.task
                assert trick.status == 401, path
            wrong: list[Any] = [None, "", "Bearer", "Bearer ", "Bearer wrong", "Bearer correct-hors", "correct-horse"]
            wrong += ["Basic correct-horse", "Bearer correct-horse battery-staple", "Bearer pässword".encode()]
            for method, path in paths:
                if path in OPEN_PATHS:
                    assert (await client.request(method, path)).status_code == 200
                    continue
                for value in wrong:
                    headers = {} if value is None else {"Authorization": value}
                    response = await client.request(method, path, headers=headers)
                    assert response.status_code == 401, (method, path, value)
                    if method != "HEAD":
                        assert response.json()["error"]["code"] == "invalid_api_key"
                    assert response.headers["x-request-id"]
            for key in keys:
                response = await client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
                assert response.status_code == 200

    run(llm, test, api_keys=keys)
    assert "correct-horse" not in repr(ServerConfig(api_keys=keys))


def test_prefixes_are_shared_within_a_key_only(llm: AsyncLLM) -> None:
    async def test(service: Steps, app: Any) -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:

            async def cached(key: str, **more: Any) -> int:
                body = {"prompt": [9] * 100, "max_tokens": 1, **more}
                answer = await client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})
                return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

            assert await cached("a") == 0
            assert await cached("a") > 0
            assert await cached("b") == 0
            assert await cached("b", cache_salt="mine") == 0
            assert await cached("b", cache_salt="mine") > 0

    run(llm, test, api_keys=["a", "b"])


def test_tokens_are_made_and_unmade_off_the_loop(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, threads = llm.engine.tokenizer, set()

    class Watched:
        def __getattr__(self, name: str) -> Any:
            threads.add(threading.current_thread())
            return getattr(tokenizer, name)

    monkeypatch.setattr(llm.engine, "tokenizer", Watched())

    async def test(service: Steps, app: Any) -> None:
        threads.clear()  # of the service's beginning
        for path, body in (
            ("/tokenize", {"prompt": "In the beginning", "return_token_strs": True}),
            ("/detokenize", {"tokens": [65, 66]}),
        ):
            client = Client(app, path, body)
            await client.task
            assert client.status == 200

    run(llm, test)
    assert threads
    assert threading.main_thread() not in threads
