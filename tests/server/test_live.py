"""`/live`: nothing while nobody watches, every step for who does, bounded for who is slow; and the page's files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from asgi import Client, run, until
from starlette.applications import Starlette
from starlette.testclient import TestClient
from test_server_requests import LONG

from flover import AsyncLLM
from flover.metrics import StepStats
from flover.server.errors import ApiError
from flover.server.live import MAX_STEPS, MAX_WATCHERS, Live, Watcher
from flover.server.metrics import Latencies
from flover.server.page import FOLDER, PAGE, page_routes


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    llm = AsyncLLM(device="cpu", num_threads=1, max_num_seqs=4, max_num_batched_tokens=32)
    yield llm
    llm.shutdown()


def events(client: Client) -> list[dict[str, Any]]:
    lines = client.sent.decode().split("\n\n")[:-1]
    return [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]


def test_a_watcher_sees_every_step_and_leaves_no_trace(llm: AsyncLLM) -> None:
    async def test(service: Any, app: Any) -> None:
        stats: list[StepStats] = []
        real = service.live.stepped
        service.live.stepped = lambda latencies, new: (stats.append(new), real(latencies, new))
        body = {"prompt": "And", "max_tokens": 6, "ignore_eos": True}
        await Client(app, "/v1/completions", body).task
        assert all(not each.rows for each in stats)  # nobody watched: the engine named no rows

        head = Client(app, "/live", {}, method="HEAD")
        await head.task  # ends by itself
        assert (head.status, head.sent) == (200, b"")
        watcher = Client(app, "/live", {}, method="GET")
        await until(lambda: watcher.sent)
        stats.clear()
        await Client(app, "/v1/completions", {**body, "prompt": ["And", "Or"], "n": 2, "max_tokens": 20}).task

        def compared() -> tuple[list[Any], list[StepStats]]:
            """Steps as told and as made; the last one, of who leaves, may still come."""
            told = [step for event in events(watcher)[1:] for step in event["steps"]]
            return told, list({each.step: each for each in stats if each and (each.rows or each.leaves)}.values())

        await until(lambda: len(compared()[0]) >= max(20, len(compared()[1])))
        steps, wanted = compared()
        hello, *rest = events(watcher)
        assert hello["hello"]["max_num_seqs"] == 4
        assert [step["n"] for step in steps] == [each.step for each in wanted]
        names: dict[str, str] = {}
        for event in rest:
            names |= event["names"]
        rows: list[int] = []
        for step, each in zip(steps, wanted):
            rows = step.get("rows", rows)
            assert [names[str(number)] for number in rows] == each.rows
            assert [row for row, _ in step.get("pre", ())] == [i for i, on in enumerate(each.prefilling) if on]
        assert sum("rows" in step for step in steps) < 10  # only where they change
        assert sum(event["tokens"] for event in rest) == 80
        assert sum(sum(event["ttft"].values()) for event in rest) == 2  # prompts
        assert all(event["lost"] == 0 for event in rest)

        watcher.gone.set()
        await watcher.task
        stats.clear()
        await Client(app, "/v1/completions", body).task
        assert not service.live.watchers
        assert not any(each.rows for each in stats[2:])  # two may have been under way

    run(llm, test)


def test_draining_ends_the_stream(llm: AsyncLLM) -> None:
    async def test(service: Any, app: Any) -> None:
        watcher = Client(app, "/live", {}, method="GET")
        running = Client(app, "/v1/completions", {**LONG, "max_tokens": 60, "stream": True})
        await until(lambda: running.sent)
        service.draining = True
        await until(lambda: b'"draining"' in watcher.sent)  # who runs is still shown
        await watcher.task
        assert watcher.sent.endswith(b"data: [DONE]\n\n")
        await running.task

    run(llm, test)


def test_an_engine_that_is_started_again_is_watched_too(llm: AsyncLLM) -> None:
    async def test(service: Any, app: Any) -> None:
        watcher = Client(app, "/live", {}, method="GET")
        await until(lambda: watcher.sent)
        llm.attach()
        llm.engine.core.kill()
        await until(service.dead.is_set)
        await until(lambda: b'"engine dead"' in watcher.sent)
        await llm.restart()
        service.revived()
        await Client(app, "/v1/completions", {"prompt": "And", "max_tokens": 6, "ignore_eos": True}).task
        await until(lambda: b'"rows":[0]' in watcher.sent)
        watcher.gone.set()
        await watcher.task

    run(llm, test)


def test_watchers_are_few_and_hold_little() -> None:
    told: list[bool] = []
    live = Live(told.append)
    watchers = [live.open() for _ in range(MAX_WATCHERS)]
    with pytest.raises(ApiError) as refused:
        live.open()
    assert (refused.value.status, told) == (429, [True])
    for i in range(MAX_STEPS + 7):
        stats = StepStats(i, 0.0, rows=["a"], num_scheduled=[1], prefilling=[False], dead=[False])
        live.stepped(Latencies(1, (), (0.01,)), stats)
    taken = watchers[0].take()
    assert (len(taken["steps"]), taken["lost"], taken["steps"][0]["n"]) == (MAX_STEPS, 7, 7)
    assert taken["tokens"] == sum(taken["itl"].values()) == MAX_STEPS + 7
    assert taken["steps"][0]["rows"] == [0]
    assert "rows" not in taken["steps"][1]
    for watcher in watchers:
        live.close(watcher)
    live.close(watchers[0])
    assert told[:2] == [True, False]


def test_numbers_do_not_pile_up() -> None:
    watcher = Watcher()
    for i in range(1000):
        row = [f"r{i}"]
        watcher.add(StepStats(i, 0.0, rows=row, num_scheduled=[1], prefilling=[False], dead=[False]))
        assert watcher.take()["names"] == {i: f"r{i}"}
    assert len(watcher._numbers) < 100


def test_the_files_are_whole_strict_and_cached() -> None:
    client = TestClient(Starlette(routes=page_routes()))
    for path, name in PAGE.items():
        response = client.get(path)
        assert response.content == (FOLDER / name).read_bytes()
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        again = client.get(path, headers={"If-None-Match": response.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert {entry.name for entry in FOLDER.iterdir()} == set(PAGE.values())  # each has a type, and none is a stray
    text = " ".join((FOLDER / name).read_text() for name in PAGE.values())
    addresses = set(re.findall(r"https?://[\w.]+", text))
    assert addresses <= {"http://www.w3.org"}  # of the icon's SVG, a name and no place
    assert "innerHTML" not in text
