"""Outside systems: transformers gives our tokens; a server with an OpenAI endpoint is asked and read rightly."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from flover.bench import outside
from flover.bench.records import Job, Run
from flover.bench.systems import SystemMissing, make_system, same_tokens
from flover.config import EngineConfig

KJV = EngineConfig("kjv-llama", dtype="float64", device="cpu", num_threads=1)  # no near-tie is decided by rounding
JOBS = [Job(0.0, (11, 12, 13), 6), Job(0.0, (700, 20, 5, 9), 12), Job(0.05, (42,), 9)]


@pytest.fixture(scope="module")
def serial() -> Run:
    system = make_system("serial", KJV)
    result = system.run(JOBS)
    system.close()
    return result


@pytest.mark.parametrize("name", ["fused", "dynamic", "concurrent:2", "transformers", "transformers:batch"])
def test_a_real_model_has_the_same_tokens_everywhere(serial: Run, name: str) -> None:
    watched: list[Any] = []
    system = make_system(name, KJV)
    result = system.run(JOBS, watched.append)
    system.close()
    assert same_tokens(result, serial) == (1.0, None)
    assert watched == [result.records]
    for job, record in zip(JOBS, result.records):
        assert len(record.times) == job.num_output
        assert record.times == sorted(record.times)
        assert record.times[0] > job.arrival
        assert record.error is None


def test_transformers_does_not_stop_at_eos(monkeypatch: pytest.MonkeyPatch, serial: Run) -> None:
    system: Any = make_system("transformers", KJV)
    eos = serial.records[0].token_ids[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(system.model.config, "eos_token_id", eos)
        assert system.run(JOBS[:1]).records[0].token_ids == serial.records[0].token_ids
    system.close()


def test_a_missing_package_is_a_named_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "find_spec", lambda name: None)
    with pytest.raises(SystemMissing, match="transformers:batch needs the package transformers"):
        make_system("transformers:batch", KJV)


# ---- a server --------------------------------------------------------------------------------------------------------


def answer(prompt: list[int], count: int) -> list[int]:
    return [(sum(prompt) + i) % 97 for i in range(count)]


class Fake(ThreadingHTTPServer):
    """together: requests that must be in flight at once before any is answered; with_ids: tokens come as ids."""

    daemon_threads = True

    def __init__(self, together: int = 1, with_ids: bool = True, status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.barrier, self.with_ids, self.status = threading.Barrier(together, timeout=10), with_ids, status
        self.bodies: list[dict[str, Any]] = []
        self.name = f"openai:http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Fake

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self._begin(200)
        self.wfile.write(json.dumps({"data": [{"id": "fake"}]}).encode())

    def do_POST(self) -> None:
        assert self.path == "/v1/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.barrier.wait()
        self._begin(self.server.status)
        ids = answer(body["prompt"], body["max_tokens"])
        for i in range(0, len(ids), 2):  # two tokens a chunk
            choice: dict[str, Any] = {"index": 0, "text": f"w{i} "}
            if self.server.with_ids:
                choice["token_ids"] = ids[i : i + 2]
            self._event({"choices": [choice]})
        self._event({"choices": [], "usage": {"completion_tokens": len(ids)}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _begin(self, status: int) -> None:
        self.send_response(status)
        self.end_headers()

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(**options: Any) -> Iterator[Fake]:
    server = Fake(**options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_server_gets_token_ids_greedy_and_without_eos() -> None:
    with serving(together=2) as server:
        result = make_system(server.name, KJV).run([Job(0.0, (1, 2), 4), Job(0.0, (3,), 5)])
    assert [record.error for record in result.records] == [None, None]
    assert [record.token_ids for record in result.records] == [answer([1, 2], 4), answer([3], 5)]
    assert [len(record.times) for record in result.records] == [4, 5]
    body = min(server.bodies, key=lambda body: body["max_tokens"])
    assert (body["model"], body["prompt"], body["max_tokens"]) == ("fake", [1, 2], 4)
    assert (body["temperature"], body["ignore_eos"], body["stream"]) == (0, True, True)


def test_a_job_is_not_sent_before_it_arrives() -> None:
    with serving() as server:
        result = make_system(server.name, KJV, model="mine").run([Job(0.0, (1,), 1), Job(0.3, (2,), 1)])
    assert result.records[0].times[0] < 0.3 <= result.records[1].times[0]
    assert server.bodies[0]["model"] == "mine"


def test_a_server_without_ids_is_counted_by_its_usage() -> None:
    with serving(with_ids=False) as server:
        (record,) = make_system(server.name + "/v1", KJV).run([Job(0.0, (1,), 7)]).records
    assert (record.token_ids, len(record.times), record.error) == ([], 7, None)


def test_what_a_server_refuses_is_an_error_of_that_record() -> None:
    watched: list[Any] = []
    with serving(status=500) as server:
        result = make_system(server.name, KJV).run([Job(0.0, (1,), 3)], watched.append)
    assert "HTTP Error 500" in str(result.records[0].error)
    assert (result.records[0].times, watched) == ([], [result.records])


def test_no_server_is_a_named_gap() -> None:
    with serving() as server:
        name = server.name
    with pytest.raises(SystemMissing, match=r"/v1/models gives no model: .*refused"):
        make_system(name, KJV)
