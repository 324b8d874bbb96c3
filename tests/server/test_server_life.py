"""The process: start, drain, second signals, a dead engine, a port in use; with keys from the environment."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from serving import CODE, Server, serve

KEY = "open-sesame"
LONG = {"prompt": "And it came to pass", "max_tokens": 250, "ignore_eos": True, "stream": True}


def keyed(*options: str):  # type: ignore[no-untyped-def]
    return serve(*options, key=KEY, env={"FLOVER_API_KEY": f"another,{KEY}"})


def ready(server: Server) -> int:
    """The status of /readyz, on a connection of its own; 0 if there is none to be had."""
    try:
        return httpx.get(f"{server.url}/readyz", timeout=5).status_code
    except httpx.TransportError:
        return 0


def events(lines: Iterator[str]) -> list[str]:
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


def test_sigterm_lets_streams_finish() -> None:
    with keyed() as server:
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        assert server.http.get("/v1/models").status_code == 200
        with server.http.stream("POST", "/v1/completions", json=LONG) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 1
            while ready(server) != 503 and time.monotonic() < deadline:
                pass
            assert ready(server) == 503
            assert httpx.get(f"{server.url}/livez").status_code == 200
            refused = httpx.post(
                f"{server.url}/v1/completions", json=LONG, headers={"Authorization": f"Bearer {KEY}"}, timeout=5
            )
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "draining"
            rest = events(lines)
        assert rest[-1] == "[DONE]"
        assert json.loads(rest[-2])["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(timeout=5) == 0


@pytest.mark.slow
def test_a_second_signal_and_a_timeout_abort() -> None:
    for options, number, signals, code in (
        ((), signal.SIGINT, 2, 130),
        ((), signal.SIGTERM, 2, 0),
        (("--drain-timeout", "0.3"), signal.SIGINT, 1, 0),
    ):
        with keyed(*options) as server:
            with server.http.stream("POST", "/v1/completions", json=LONG) as response:
                lines = response.iter_lines()
                next(lines)
                for _ in range(signals):
                    server.process.send_signal(number)
                    time.sleep(0.2)
                rest = events(lines)
            assert rest[-1] == "[DONE]"
            assert json.loads(rest[-2])["error"]["code"] == "aborted"
            assert server.process.wait(timeout=5) == code


def test_an_engine_that_hangs_does_not_keep_streams_from_their_end() -> None:
    with keyed("--drain-timeout", "0.3") as server:
        with server.http.stream("POST", "/v1/completions", json=LONG) as response:
            lines = response.iter_lines()
            next(lines)
            server.engine.suspend()
            server.process.send_signal(signal.SIGTERM)
            rest = events(lines)
        assert rest[-1] == "[DONE]"
        assert json.loads(rest[-2])["error"]["code"] == "aborted"
        assert server.process.wait(timeout=10) == 0
        assert server.process.stderr is not None
        assert "Traceback" not in server.process.stderr.read()


def until_ready(server: Server, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while ready(server) != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def canary(server: Server) -> None:
    response = httpx.post(
        f"{server.url}/v1/completions",
        json={"prompt": "And", "max_tokens": 2},
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=30,
    )
    assert response.status_code == 200


def test_a_dead_engine_ends_streams_and_is_started_again() -> None:
    with keyed() as server:
        front, engine = server.front, server.engine
        with server.http.stream("POST", "/v1/completions", json=LONG) as response:
            lines = response.iter_lines()
            next(lines)
            begin = time.monotonic()
            engine.kill()
            rest = events(lines)
            assert time.monotonic() - begin < 2
        assert rest[-1] == "[DONE]"
        assert json.loads(rest[-2])["error"]["code"] == "engine_dead"
        assert ready(server) == 503
        assert httpx.get(f"{server.url}/livez").status_code == 200
        until_ready(server)
        assert server.engine.pid != engine.pid
        canary(server)
        assert server.front == front  # whose counters go on
        assert server.metric("engine_restarts_total") == 1
        assert server.metric("request_failed_total") == 1
        server.check_conservation()


def test_an_engine_that_keeps_dying_is_given_up() -> None:
    with keyed("--max-restarts", "1") as server:
        server.engine.kill()
        time.sleep(0.3)
        until_ready(server)
        server.engine.kill()
        assert server.process.wait(timeout=10) == 1
        assert server.process.stderr is not None
        assert "killed by SIGKILL" in server.process.stderr.read().splitlines()[-1]


@pytest.mark.slow
def test_an_engine_that_hangs_is_not_ready_and_is_started_again() -> None:
    with keyed("--engine-iteration-timeout", "2") as server:
        engine = server.engine
        with server.http.stream("POST", "/v1/completions", json=LONG) as response:
            lines = response.iter_lines()
            next(lines)
            begin = time.monotonic()
            engine.suspend()
            while ready(server) == 200:
                assert httpx.get(f"{server.url}/livez").status_code == 200
                assert time.monotonic() - begin < 10
            rest = events(lines)
        assert json.loads(rest[-2])["error"]["code"] == "engine_dead"
        assert rest[-1] == "[DONE]"
        until_ready(server)
        canary(server)
        server.check_conservation()
        assert server.metric("request_accepted_total") == 2  # each ended once
        server.process.terminate()
        assert server.process.wait(timeout=5) == 0
        assert server.process.stderr is not None
        assert "Thread 0x" in server.process.stderr.read()  # the stacks of the engine that hung


@pytest.mark.slow
def test_a_stopped_rank_0_ends_its_group_in_time() -> None:
    with keyed("-tp", "2") as server:
        with server.http.stream("POST", "/v1/completions", json=LONG) as response:
            lines = response.iter_lines()
            next(lines)
            begin = time.monotonic()
            server.engine.suspend()
            rest = events(lines)
        assert time.monotonic() - begin < 5
        assert json.loads(rest[-2])["error"]["code"] == "engine_dead"
        until_ready(server)
        canary(server)


def test_an_engine_that_does_not_read_holds_nobody_up() -> None:
    """Its socket fills with requests, which must not stop the event loop."""
    with keyed() as server:
        server.engine.suspend()
        body = {"prompt": [7] * 1000, "max_tokens": 1, "stream": True}
        headers = {"Authorization": f"Bearer {KEY}"}
        clients = [httpx.Client(base_url=server.url, headers=headers) for _ in range(4)]
        waiting = []
        for client in clients:
            for _ in range(60):
                connection = socket.create_connection(("127.0.0.1", server.port))
                data = json.dumps(body).encode()
                head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
                head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
                connection.sendall(head.encode() + data)
                waiting.append(connection)
            assert client.get("/livez").status_code == 200
        deadline = time.monotonic() + 10
        while server.metric("num_requests_live") < len(waiting) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert server.metric("num_requests_live") == len(waiting)
        server.engine.resume()
        while server.metric("num_requests_live"):
            time.sleep(0.05)
        assert server.metric("request_success_total") == len(waiting)
        for connection in waiting:
            connection.close()


def test_a_killed_front_comes_back_on_the_same_socket() -> None:
    with keyed() as server:
        front, engine = server.front, server.engine
        front.kill()
        psutil.wait_procs([engine], timeout=5)
        assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE
        canary(server)  # its connection waits in the backlog
        assert server.front != front
        server.process.terminate()
        assert server.process.wait(timeout=5) == 0


def test_admin_verbs(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "admin.sock"

    def admin(*arguments: str) -> tuple[int, Any]:
        command = [sys.executable, "-m", "flover", "admin", *arguments, "--socket", str(path)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
        return result.returncode, json.loads(result.stdout) if result.stdout else result.stderr

    assert "no server listens" in admin("status")[1]
    with keyed("--admin-socket", str(path)) as server:
        assert path.stat().st_mode & 0o777 == 0o600
        longer = {**LONG, "max_tokens": 900, "n": 8}
        with server.http.stream("POST", "/v1/completions", json=longer, headers={"X-Request-Id": "mine"}) as response:
            lines = response.iter_lines()
            next(lines)
            code, status = admin("status")
            assert (code, status["state"]) == (0, "ready")
            assert [one["label"] for one in status["live"].values()] == ["mine"]
            assert admin("abort", "nobody")[0] == 1
            assert admin("abort", "mine") == (0, {"aborted": list(status["live"])})
            rest = events(lines)
        assert json.loads(rest[-2])["error"]["code"] == "aborted"
        assert server.metric("request_aborted_total") == 1
        assert admin("status")[1]["kv_blocks"]["cached"] > 0
        assert admin("reset-cache")[0] == 0
        assert admin("status")[1]["kv_blocks"]["cached"] == 0
        assert httpx.post(f"{server.url}/drain", headers={"Authorization": f"Bearer {KEY}"}).status_code == 404
        with server.http.stream("POST", "/v1/completions", json=LONG) as response:
            lines = response.iter_lines()
            next(lines)
            assert admin("drain") == (0, {"draining": 1})
            rest = events(lines)
        assert json.loads(rest[-2])["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(timeout=5) == 0
    assert not path.exists()


def test_no_process_outlives_the_supervisor() -> None:
    with keyed() as server:
        processes = [server.front, server.engine]
        server.process.kill()
        _, alive = psutil.wait_procs(processes, timeout=5)
        assert all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


@pytest.mark.slow
def test_interrupts_while_it_starts_leave_no_traceback() -> None:
    for delay in (0.05, 0.1, 0.2, 0.4, 0.8, 1.6):
        command = [sys.executable, "-m", "flover", "serve", "--port", "0", "--device", "cpu"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        time.sleep(delay)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=10)
        drained = process.returncode == 0 and "http://" in out  # a fast machine: it served already
        assert process.returncode in (130, -signal.SIGINT) or drained, (delay, errors)
        ours = "flover/cli" in errors or "flover/server" in errors  # Python's own start is not
        assert not (ours and "Traceback" in errors), (delay, errors)
        _, alive = psutil.wait_procs(children, timeout=5)
        assert all(child.status() == psutil.STATUS_ZOMBIE for child in alive)


def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-c", CODE, "serve", "--port", str(taken.getsockname()[1])]
        begin = time.monotonic()
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert time.monotonic() - begin < 5
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("flover: error: cannot listen on 127.0.0.1 port")
    assert "in use" in line
