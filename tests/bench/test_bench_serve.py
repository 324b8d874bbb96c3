"""`flover bench serve` against a server whose answers come at times that the test wrote down."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from flover.bench.client import Endpoint, drive, events
from flover.bench.records import Job, Record, Run
from flover.bench.results import measure
from flover.cli import main
from flover.cli.bench import Load
from flover.cli.bench_load import make_source

SLACK = 0.3  # seconds that a busy machine may add to any time; every mistake looked for is larger
FIRST, GAP = 0.4, 0.15


class Stub:
    """First chunk after FIRST seconds, then one every GAP, as scripted by the request's max_tokens."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.now = self.most = 0
        self.refuse_over = 1000
        self.cut = False
        self.absent = 0  # times that it is not ready
        self.cached = 0

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/completions", self.generate)
        app.router.add_post("/v1/chat/completions", self.generate)
        app.router.add_post("/detokenize", self.detokenize)
        return app

    async def models(self, request: web.Request) -> web.Response:
        if self.absent:
            self.absent -= 1
            return web.Response(status=503)
        return web.json_response({"data": [{"id": "org/stub", "max_model_len": 64}]})

    async def detokenize(self, request: web.Request) -> web.Response:
        return web.json_response({"prompt": " ".join(map(str, (await request.json())["tokens"]))})

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("Authorization"))
        if self.now >= self.refuse_over:
            return web.json_response({"error": {"message": "the queue\nis full"}}, status=429)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            return await self.stream(request, body)
        finally:
            self.now -= 1

    async def stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        chat, count = "messages" in body, body["max_tokens"]
        if chat:
            await self.send(response, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for i in range(count):
            await asyncio.sleep(GAP if i else FIRST)
            text = f"w{i}"
            choice: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text}
            if i == count - 1 and not self.cut:
                choice["finish_reason"] = "length"
            await self.send(response, {"choices": [choice]})
        if not self.cut:
            usage = {"prompt_tokens": 7, "completion_tokens": count}
            await self.send(
                response, {"choices": [], "usage": {**usage, "prompt_tokens_details": {"cached_tokens": self.cached}}}
            )
            await response.write(b": a comment\n\ndata: [DONE]\n\n")
        return response

    async def send(self, response: web.StreamResponse, value: dict[str, Any]) -> None:
        raw = f"data: {json.dumps(value)}\r\n\r\n".encode()
        await response.write(raw[:9])  # in pieces, as networks have it
        await response.write(raw[9:])


@contextmanager
def serving() -> Iterator[tuple[Stub, str]]:
    stub, loop, started = Stub(), asyncio.new_event_loop(), threading.Event()
    ports: list[int] = []

    async def begin() -> web.AppRunner:
        runner = web.AppRunner(stub.app())
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        ports.append(runner.addresses[0][1])
        started.set()
        return runner

    def run() -> None:
        runner = loop.run_until_complete(begin())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(10)
    try:
        yield stub, f"http://127.0.0.1:{ports[0]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def near(found: float, wanted: float) -> bool:
    """Never early, and late by what a busy machine may need."""
    return wanted - 0.005 < found < wanted + SLACK


@pytest.mark.parametrize("kind", ["openai", "openai-chat"])
def test_times_are_those_of_the_script(kind: str) -> None:
    with serving() as (_, url):
        path = "/v1/chat/completions" if "chat" in kind else "/v1/completions"
        prompts = ["hello", "you"] if "chat" in kind else [(1, 2), (3,)]
        jobs = [Job(0.0, (1, 2), 5), Job(0.4, (3,), 1)]
        first, second = drive(Endpoint(url + path, "stub", kind), jobs, prompts)
    assert (first.error, second.error) == (None, None)
    assert near(first.ttft, FIRST)
    assert near(first.times[4] - first.arrival, FIRST + 4 * GAP)  # not all at once, in the end or at the beginning
    gaps = [b - a for a, b in zip(first.times, first.times[1:])]
    assert first.tpot == pytest.approx(sum(gaps) / 4)
    assert sum(gaps) > 4 * GAP - SLACK
    assert near(second.e2e, FIRST)
    assert second.sent is not None
    assert near(second.sent, 0.4)
    numbers = measure(Run("x", [first, second]), {"e2el": (second.e2e + first.e2e) / 2}, (50, 99.9))
    assert numbers["mean_itl_ms"] == pytest.approx(sum(gaps) / 4 * 1e3)
    assert numbers["p99.9_e2el_ms"] == first.e2e * 1e3
    assert (numbers["total_input_tokens"], numbers["total_output_tokens"]) == (14, 6)
    assert numbers["request_goodput"] * numbers["duration"] == pytest.approx(1)  # the first takes too long


def test_the_loop_is_open_and_a_limit_closes_it() -> None:
    jobs = [Job(0.002 * i, (i,), 2) for i in range(10)]
    with serving() as (stub, url):
        endpoint = Endpoint(f"{url}/v1/completions", "stub", key="secret")
        records = drive(endpoint, jobs, [job.prompt for job in jobs])
        assert stub.most == 10  # all were sent, though none had been answered
        assert all(near(record.sent or 0, job.arrival) for job, record in zip(jobs, records))
        stub.most = 0
        limited = drive(endpoint, jobs, [job.prompt for job in jobs], 5)
        assert stub.most == 5
        assert set(stub.keys) == {"Bearer secret"}
    assert limited[9].arrival > FIRST + GAP - 0.005  # its clock starts with its place
    assert near(limited[9].ttft, FIRST)
    assert measure(Run("x", records))["max_concurrent_requests"] == 10
    assert measure(Run("x", limited))["max_concurrent_requests"] == 5


def test_refusals_and_cuts_are_told_apart() -> None:
    with serving() as (stub, url):
        stub.refuse_over = 1
        endpoint = Endpoint(f"{url}/v1/completions", "stub")
        records = drive(endpoint, [Job(0.0, (1,), 2)] * 3, [(1,)] * 3)
        assert sorted(record.status for record in records) == [200, 429, 429]
        assert {record.error for record in records} == {None, "HTTP Error 429: the queue is full"}
        numbers = measure(Run("x", records))
        assert (numbers["completed"], numbers["failed"], numbers["rejected"]) == (1, 2, 2)
        assert 0 < numbers["p99_rejection_ms"] < FIRST * 1e3
        stub.cut = True
        (record,) = drive(endpoint, [Job(0.0, (1,), 2)], [(1,)])
        assert record.error == "the stream was cut"
    (record,) = drive(endpoint, [Job(0.0, (1,), 2)], [(1,)])
    assert "Connect" in str(record.error)


def test_lateness_is_the_clients_and_counts_as_latency() -> None:
    late = Record(1.0, 3, times=[1.5, 1.6, 1.6], sent=1.25, ended=1.7, status=200)
    numbers = measure(Run("x", [late]))
    assert numbers["mean_late_ms"] == numbers["p99_late_ms"] == 250
    assert numbers["mean_ttft_ms"] == pytest.approx(500)
    assert numbers["mean_itl_ms"] == pytest.approx(100)  # two tokens of one chunk have no gap


def test_events_are_cut_anywhere() -> None:
    raw = 'event: x\ndata: {"a": "é"}\r\n\r\n: no\ndata:{"b":1}\n\ndata: [DONE]\n\n'.encode()

    async def pieces(size: int) -> AsyncIterator[bytes]:
        for i in range(0, len(raw), size):
            yield raw[i : i + size]

    async def read(size: int) -> list[Any]:
        return [event async for event in events(pieces(size))]

    for size in range(1, len(raw) + 1):
        assert asyncio.run(read(size)) == [{"a": "é"}, {"b": 1}, None]


def test_the_command_prints_vllms_block_and_keeps_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--num-prompts 4 --request-rate 50 --burstiness 0.5 --random-input-len 8 --random-output-len 3"
    more = "--random-range-ratio 0.3 --seed 3 --ignore-eos --percentile-metrics ttft,itl --metric-percentiles 90,99"
    save = f"--save-result --result-dir {tmp_path}/new/results --result-filename out.json --max-concurrency 3"
    goals = "--goodput ttft:5000 e2el:60000"
    with serving() as (stub, url):
        command = f"bench serve --base-url {url} --backend openai-chat {flags} {more} {save} {goals}"
        assert main(command.split()) == 0
        assert len(stub.bodies) == 5  # one to try
        assert {len(body["messages"][0]["content"].split()) for body in stub.bodies} <= set(range(5, 12))
        assert {body["model"] for body in stub.bodies} == {"org/stub"}
    out = capsys.readouterr().out
    for label in ("Successful requests:                    4\n", "P90 TTFT (ms):", "P99 ITL (ms):", "Client lateness"):
        assert label.lower() in out.lower()
    assert "Request rate configured (RPS):          50.00" in out
    assert "Maximum request concurrency:            3\n" in out
    assert "Request goodput (req/s):" in out
    assert "TPOT" not in out
    kept = json.loads((tmp_path / "new" / "results" / "out.json").read_text())
    assert (kept["completed"], kept["request_rate"], kept["model_id"]) == (4, 50, "org/stub")
    assert len(kept["requests"]) == 4
    assert kept["p90_ttft_ms"] >= kept["median_ttft_ms"] >= FIRST * 1e3 - 20


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_prompts_of_a_file(tmp_path: Path, backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "custom.jsonl"
    file.write_text('{"prompt": "Who?", "output_tokens": 2}\n\n{"prompt": "Where?"}\n{"prompt": "When?"}\n')
    asked = f"--backend {backend} --dataset-name custom --dataset-path {file} --num-prompts 2 --num-warmups 3"
    more = ["--extra-body", '{"top_k": 5, "max_tokens": 1}', "--max-concurrency", "1"]
    with serving() as (stub, url):
        stub.cached = 3
        assert main(["bench", "serve", "--base-url", url, *asked.split(), *more]) == 0
        said = [body["prompt"] if backend == "openai" else body["messages"][0]["content"] for body in stub.bodies]
    assert said == [*["Hello"] * 3, "Who?", "Where?"]
    assert {(body["top_k"], body["max_tokens"]) for body in stub.bodies} == {(5, 1)}
    assert "the server had 43% of the prompt tokens in its prefix cache" in capsys.readouterr().err


def test_token_ids_of_a_trace_are_sent(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"arrival": 0, "prompt_token_ids": [5, 99999], "num_output": 1}\n')
    with serving() as (stub, url):
        assert main(f"bench serve --base-url {url} --dataset-path {file}".split()) == 0
    assert stub.bodies[-1]["prompt"] == [5, 99999]


def test_output_tokens_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "custom.jsonl"
    file.write_text('{"prompt": "Who?", "output_tokens": 2}\n{"prompt": "Where?"}\n')
    for given, wanted in ((None, [2, 256]), (-1, [2, 256]), (7, [7, 7])):
        load = Load(dataset_name="custom", dataset_path=str(file), custom_output_len=given)
        assert [job.num_output for job in make_source(load, 10, 64).jobs(0)] == wanted


def test_a_server_may_be_late_and_vllms_lists_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "--num-prompts 3 --random-input-len 4 --random-output-len 2 --ready-check-timeout-sec 30"
    ramp = "--ramp-up-strategy exponential --ramp-up-start-rps 20 --ramp-up-end-rps 40"
    with serving() as (stub, url):
        stub.absent = 1
        save = f"--save-result --save-detailed --result-dir {tmp_path}"
        assert main(f"bench serve --base-url {url} {flags} {ramp} {save}".split()) == 0
        assert (stub.absent, len(stub.bodies)) == (0, 4)
        stub.absent = 1
        assert main(f"bench serve --base-url {url}".split()) == 2
        monkeypatch.setattr("flover.bench.client.time.sleep", None)  # it is there and has no such path: no waiting
        assert main(f"bench serve --base-url {url}/nothing --ready-check-timeout-sec 30".split()) == 2
    (file,) = tmp_path.iterdir()
    assert "-ramp-up-exponential-20qps-40qps-stub-" in file.name
    kept = json.loads(file.read_text())
    assert (kept["input_lens"], kept["output_lens"], kept["errors"]) == ([7] * 3, [2] * 3, [""] * 3)
    assert [len(gaps) for gaps in kept["itls"]] == [1] * 3
    assert sum(kept["ttfts"]) / 3 == pytest.approx(kept["mean_ttft_ms"] / 1e3)
    assert kept["start_times"] == sorted(kept["start_times"])


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--backend tgi", "--backend must be openai or vllm or openai-chat"),
        ("--percentile-metrics tft", "--percentile-metrics knows ttft"),
        ("--metric-percentiles 0", "--metric-percentiles must be in"),
        ("--random-input-len 60 --random-output-len 60", "max_model_len=64"),
        ("ttft:5", "unexpected argument 'ttft:5'"),
        ("--endpoint /v1/nothing --random-input-len 4 --random-output-len 2", "failed: HTTP Error 404"),
        ("--base-url localhost:8000", "--base-url must be such as"),
        ("--save-result --result-dir /proc", "--save-result: /proc/a.json cannot be written: "),
        ("--save-result --result-dir /proc --result-filename r", "--save-result: /proc/r cannot be written: "),
        ("--extra-body [1]", "--extra-body must be a JSON object, got '[1]'"),
        ("--dataset-name hf --dataset-path org/set", "--dataset-name hf is not here: --dataset-name custom sends"),
        ("--dataset-name custom", 'custom needs --dataset-path, a JSON lines file of {"prompt": "Who was Moses?",'),
        ("--dataset-name custom --dataset-path /none", "/none: No such file"),
        ("--dataset-name custom --dataset-path x --custom-output-len 0", "--custom-output-len must be at least 1"),
        ("--dataset-name sharegpt --dataset-path x", "goes with --dataset-name trace or custom, got sharegpt"),
        ("--ramp-up-start-rps 5", "need --ramp-up-strategy"),
        ("--ramp-up-strategy linear --ramp-up-end-rps 5", "needs --ramp-up-start-rps and --ramp-up-end-rps"),
        ("--ramp-up-strategy linear --request-rate 5", "--ramp-up-strategy excludes --request-rate"),
    ],
)
def test_mistakes_are_one_line(flags: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as (_, url):
        assert main(["bench", "serve", "--base-url", url, *flags.split()]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1
