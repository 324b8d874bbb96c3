"""The process: start, drain, second signals, a dead engine, a port in use; with keys from the environment."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import psutil
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


def test_a_second_signal_and_a_timeout_abort() -> None:
    for options, signals, code in ((), 2, 130), (("--drain-timeout", "0.3"), 1, 0):
        with keyed(*options) as server:
            with server.http.stream("POST", "/v1/completions", json=LONG) as response:
                lines = response.iter_lines()
                next(lines)
                for _ in range(signals):
                    server.process.send_signal(signal.SIGINT)
                    time.sleep(0.2)
                rest = events(lines)
            assert rest[-1] == "[DONE]"
            assert json.loads(rest[-2])["error"]["code"] == "aborted"
            assert server.process.wait(timeout=5) == code


def test_a_dead_engine_ends_streams_and_the_server() -> None:
    with keyed() as server:
        with server.http.stream("POST", "/v1/completions", json=LONG) as response:
            lines = response.iter_lines()
            next(lines)
            begin = time.monotonic()
            server.engine.kill()
            rest = events(lines)
            assert time.monotonic() - begin < 2
        assert rest[-1] == "[DONE]"
        assert json.loads(rest[-2])["error"]["code"] == "engine_dead"
        assert ready(server) != 200
        assert server.process.wait(timeout=5) == 1


def test_an_idle_server_notices_too() -> None:
    with keyed() as server:
        server.engine.kill()
        assert server.process.wait(timeout=5) == 1


def test_a_killed_front_takes_the_engine_along() -> None:
    with keyed() as server:
        engine = server.engine
        server.process.kill()
        psutil.wait_procs([engine], timeout=5)
        assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE


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
