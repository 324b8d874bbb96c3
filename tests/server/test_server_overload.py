"""Deadlines in each stage, sharing between keys, keep-alive comments, readers that stall; and who is told of an end."""

from __future__ import annotations

import asyncio
import http.server
import json
import random
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asgi import Client, Steps, run, until
from prometheus_client.parser import text_string_to_metric_families

from flover import AsyncLLM
from flover.server import http as server_http
from flover.server import sse
from flover.server.records import EndRecord, RequestLog
from flover.server.restarts import MAX_DELAY, STEADY_SECONDS, Restarts
from flover.server.tracing import Tracing
from flover.server.watchdog import Watchdog

ROWS = 4
LONG: dict[str, Any] = {"max_tokens": 900, "ignore_eos": True, "prompt": "And it came to pass"}
DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana-dashboard.json"


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    llm = AsyncLLM(device="cpu", num_threads=1, max_num_seqs=ROWS, max_num_batched_tokens=32, order="fair")
    yield llm
    llm.shutdown()


async def filled(service: Steps, app: Any) -> Client:
    """Every row is taken."""
    client = Client(app, "/v1/completions", {**LONG, "n": ROWS, "stream": True})
    await until(lambda: service.metrics.generation_tokens > 2 * ROWS)
    return client


async def leave(*clients: Client) -> None:
    for client in clients:
        client.gone.set()
    for client in clients:
        await client.task


@pytest.mark.parametrize("stream", [True, False])
def test_a_deadline_in_the_queue(llm: AsyncLLM, stream: bool) -> None:
    async def test(service: Steps, app: Any) -> None:
        first = await filled(service, app)
        late = Client(app, "/v1/completions", {**LONG, "queue_timeout": 0.05, "stream": stream})
        await late.task
        if stream:
            error = json.loads(late.sent.split(b"\n\n")[-3].removeprefix(b"data: "))["error"]
            assert late.sent.endswith(b"data: [DONE]\n\n")
        else:
            assert late.status == 503
            assert 1 <= int(late.headers[b"retry-after"]) <= 60
            error = json.loads(late.sent)["error"]
        assert error["code"] == "deadline_exceeded"
        assert not first.task.done()
        await until(lambda: service.metrics.aborted_for["deadline"] == 1)
        await leave(first)

    run(llm, test)


@pytest.mark.parametrize("stream", [True, False])
def test_a_deadline_while_it_runs_keeps_what_there_is(llm: AsyncLLM, stream: bool) -> None:
    async def test(service: Steps, app: Any) -> None:
        late = Client(app, "/v1/completions", {**LONG, "timeout": 0.25, "stream": stream})
        await late.task
        if stream:
            *chunks, last, done, rest = late.sent.split(b"\n\n")
            assert (done, rest) == (b"data: [DONE]", b"")
            error = json.loads(last.removeprefix(b"data: "))["error"]
            assert len(chunks) > 1
        else:
            assert late.status == 504
            answer = json.loads(late.sent)
            error, (choice,) = answer["error"], answer["partial"]["choices"]
            assert choice["text"]
            assert choice["finish_reason"] is None  # cut off
        assert error["code"] == "deadline_exceeded"
        await until(lambda: service.metrics.aborted_for["deadline"] == 1)

    run(llm, test)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_other_answers_are_cut_off_alike(llm: AsyncLLM, path: str) -> None:
    async def test(service: Steps, app: Any) -> None:
        prompt = {"input": "And"} if path.endswith("responses") else {"messages": [{"role": "user", "content": "And"}]}
        late = Client(app, path, {**prompt, "timeout": 0.25, "ignore_eos": True})
        await late.task
        answer = json.loads(late.sent)
        assert late.status == 504, answer
        assert answer["error"]["code"] == "deadline_exceeded"
        assert answer["partial"].get("choices") or answer["partial"].get("output")

    run(llm, test)


def test_embeddings_are_cut_off_as_embeddings(llm: AsyncLLM) -> None:
    async def test(service: Steps, app: Any) -> None:
        first = await filled(service, app)
        late = Client(app, "/v1/embeddings", {"input": "And", "timeout": 0.05})
        await late.task
        assert late.status == 504
        assert (partial := json.loads(late.sent)["partial"])["object"] == "list"
        assert partial["data"] == []
        await leave(first)

    run(llm, test)


def test_the_server_s_own_limit_is_a_ceiling(llm: AsyncLLM) -> None:
    async def test(service: Steps, app: Any) -> None:
        late = Client(app, "/v1/completions", {**LONG, "timeout": 1000})
        await late.task
        assert late.status == 504
        for name, value in (("timeout", 0), ("timeout", -1), ("queue_timeout", 1e9), ("timeout", "x")):
            bad = Client(app, "/v1/completions", {**LONG, name: value})
            await bad.task
            assert (bad.status, json.loads(bad.sent)["error"]["param"]) == (400, name)

    run(llm, test, request_timeout=0.2)


def test_keys_share(llm: AsyncLLM) -> None:
    """One key asks for thirty times as much, and comes first; both get about half until the other is served."""

    async def test(service: Steps, app: Any) -> None:
        def ask(key: str) -> Client:
            body = {"prompt": "And", "max_tokens": 20, "ignore_eos": True}
            return Client(app, "/v1/completions", body, [(b"authorization", f"Bearer {key}".encode())])

        loud = [ask("loud") for _ in range(60)]
        await until(lambda: len(service.load.live) >= 60)
        quiet = [ask("quiet") for _ in range(8)]
        await asyncio.gather(*(client.task for client in quiet))
        assert sum(client.task.done() for client in loud) < 40
        await asyncio.gather(*(client.task for client in loud))
        assert {client.status for client in loud + quiet} == {200}

    run(llm, test, api_keys=("loud", "quiet"))


def test_comments_keep_a_connection_while_it_waits(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE", 0.02)

    async def test(service: Steps, app: Any) -> None:
        first = await filled(service, app)
        waiting = Client(app, "/v1/completions", {**LONG, "stream": True, "max_tokens": 3})
        await until(lambda: waiting.sent.count(b": keep-alive\n\n") > 3)
        assert b"data" not in waiting.sent
        await leave(first)
        await waiting.task
        assert waiting.sent.endswith(b"data: [DONE]\n\n")

    run(llm, test)


def test_a_reader_that_stalls_is_cut_off_and_others_are_not(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_http, "WRITE_SECONDS", 0.5)
    monkeypatch.setattr(server_http, "SEND_BUFFER", 4096)

    async def test(service: Steps, app: Any) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        server = server_http.HttpServer(app)
        serving = asyncio.create_task(server.serve([listener]))
        stalled = socket.socket()
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.setblocking(False)
        await asyncio.get_running_loop().sock_connect(stalled, listener.getsockname())
        body = json.dumps({**LONG, "stream": True, "n": 2, "logprobs": 20}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        await asyncio.get_running_loop().sock_sendall(stalled, head.encode() + b"\r\n\r\n" + body)
        other = Client(app, "/v1/completions", {**LONG, "stream": True})
        await until(lambda: service.metrics.aborted_for["disconnect"] == 1)
        assert not other.task.done() or other.sent.endswith(b"[DONE]\n\n")
        await other.task
        assert other.sent.endswith(b"data: [DONE]\n\n")
        stalled.close()
        server.should_exit = True
        await serving

    run(llm, test)


def test_every_query_of_the_dashboard_resolves(llm: AsyncLLM) -> None:
    """Its metrics are exposed, with the labels that it uses, under both prefixes."""

    async def test(service: Steps, app: Any) -> None:
        await Client(app, "/v1/completions", {"prompt": "And", "max_tokens": 3}).task
        samples: dict[str, set[str]] = {}
        for family in text_string_to_metric_families(service.metrics.text().decode()):
            for sample in family.samples:
                samples.setdefault(sample.name, set()).update(sample.labels)
        panels = json.loads(DASHBOARD.read_text())["panels"]
        queries = [target for panel in panels for target in panel["targets"]]
        assert len(queries) > 25
        for target in queries:
            names = re.findall(r"flover:[a-z0-9_]+", target["expr"])
            assert names, target
            for name in names:
                assert name in samples, name
                for label in re.findall(r"{{(\w+)}}", target["legendFormat"]) + re.findall(
                    r"by \((\w+)\)", target["expr"]
                ):
                    assert label in samples[name], (name, label)

    run(llm, test)


def test_vllm_s_names(llm: AsyncLLM) -> None:
    """Those of the dashboard that vLLM publishes."""

    async def test(service: Steps, app: Any) -> None:
        await Client(app, "/v1/completions", {"prompt": "And", "max_tokens": 3}).task
        text = service.metrics.text().decode()
        for name in (
            "e2e_request_latency_seconds_bucket", "prompt_tokens_total", "generation_tokens_total",
            "inter_token_latency_seconds_bucket", "num_requests_running", "num_requests_waiting",
            "time_to_first_token_seconds_bucket", "kv_cache_usage_perc", "request_prompt_tokens_bucket",
            "request_generation_tokens_bucket", "request_success_total", "request_queue_time_seconds_sum",
            "request_prefill_time_seconds_sum", "request_decode_time_seconds_sum", "iteration_tokens_total_bucket",
            "prefix_cache_queries_total", "prefix_cache_hits_total", "num_preemptions_total",
        ):  # fmt: skip
            assert f"\nvllm:{name}{{" in text, name
        assert "flover:" not in text

    run(llm, test, metrics_compat="vllm")


def test_every_scrape_adds_up(llm: AsyncLLM) -> None:
    """accepted = finished + aborted + failed + live, whatever goes on."""
    chance = random.Random(5)

    async def test(service: Steps, app: Any) -> None:
        async def one() -> None:
            await asyncio.sleep(chance.random())
            body = {
                **LONG,
                "n": chance.randint(1, 3),
                "max_tokens": chance.randint(1, 60),
                "stream": chance.random() < 0.5,
            }
            if chance.random() < 0.2:
                body["timeout"] = 0.001 + 0.2 * chance.random()
            client = Client(app, "/v1/completions", body)
            if chance.random() < 0.3:
                await asyncio.sleep(0.3 * chance.random())
                client.gone.set()
            await client.task

        async def scrape() -> int:
            count = 0
            while True:
                total: dict[str, float] = {}
                for family in text_string_to_metric_families(service.metrics.text().decode()):
                    for sample in family.samples:
                        total[sample.name] = total.get(sample.name, 0) + sample.value
                ended = sum(total[f"flover:request_{kind}_total"] for kind in ("success", "aborted", "failed"))
                assert total["flover:request_accepted_total"] == ended + total["flover:num_requests_live"]
                count += 1
                if requests.done():
                    return count
                await asyncio.sleep(0.005)

        requests = asyncio.gather(*(one() for _ in range(80)))
        assert await scrape() > 20
        assert service.metrics.rejected["queue_full"] > 0
        assert service.metrics.aborted_for.total() > 0
        await until(lambda: service.metrics.blocks[2] == 0)

    run(llm, test, max_queued_requests=20)


def test_listeners_are_told_of_each_end(llm: AsyncLLM, capfd: pytest.CaptureFixture[str]) -> None:
    async def test(service: Steps, app: Any) -> None:
        records: list[EndRecord] = []
        log = RequestLog(prompts=False)
        service.metrics.listeners = [records.append, log]
        ok = Client(app, "/v1/completions", {"prompt": "And secrets", "max_tokens": 3}, [(b"x-request-id", b"mine")])
        await ok.task
        gone = Client(app, "/v1/completions", LONG)
        await until(lambda: service.load.live)
        await leave(gone)
        await until(lambda: len(records) == 2)
        assert (records[0].label, records[0].outcome, records[0].output_tokens) == ("mine", "finished", 3)
        assert records[0].prompt == "And secrets"
        assert 0 <= (records[0].queue or 0) <= (records[0].ttft or 0) <= records[0].e2e
        assert (records[1].outcome, records[1].reason) == ("aborted", "disconnect")
        log.close()
        lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
        assert [line["outcome"] for line in lines] == ["finished", "aborted"]
        assert not any("secrets" in str(line) for line in lines)

    run(llm, test)


def test_traces_go_where_they_were_asked_to(llm: AsyncLLM) -> None:
    got: list[bytes] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    collector = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()

    async def test(service: Steps, app: Any) -> None:
        tracing = Tracing(f"http://127.0.0.1:{collector.server_address[1]}/v1/traces")
        service.metrics.listeners = [tracing]
        await Client(app, "/v1/completions", {"prompt": "And", "max_tokens": 3}, [(b"x-request-id", b"mine")]).task
        await asyncio.to_thread(tracing.close)

    run(llm, test)
    collector.shutdown()
    collector.server_close()
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    (span,) = ExportTraceServiceRequest.FromString(got[0]).resource_spans[0].scope_spans[0].spans
    values = {one.key: one.value for one in span.attributes}
    assert span.name == "llm_request"
    assert values["gen_ai.request.id"].string_value == "mine"
    assert values["gen_ai.usage.completion_tokens"].int_value == 3
    assert 0 < span.end_time_unix_nano - span.start_time_unix_nano < 30e9


def test_restarts_back_off_and_give_up() -> None:
    restarts = Restarts(8)
    assert [restarts.failed(1.0) for _ in range(9)] == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, MAX_DELAY, MAX_DELAY, None]
    assert restarts.failed(STEADY_SECONDS) == 0.0
    assert Restarts(0).failed(0.0) is None


def test_a_watchdog_counts_only_what_it_saw() -> None:
    dog = Watchdog()
    for now, work, progress, stalled in (
        (0.0, False, 0, 0.0),
        (0.5, True, 1, 0.0),
        (1.0, True, 1, 0.5),
        (60.0, True, 1, 1.5),  # the caller itself was stopped
        (60.5, True, 2, 0.0),
        (61.0, True, 2, 0.5),
        (61.5, False, 2, 0.0),
    ):
        dog.tick(now, work, progress)
        assert dog.stalled == stalled
