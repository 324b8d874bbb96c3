"""Replicas on a Ray of this machine: what a lost replica costs, and that an update drops no stream."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

pytest.importorskip("ray")
LONG = {"prompt": "And it came to pass", "max_tokens": 900, "ignore_eos": True, "stream": True, "temperature": 0}
SMALL = ("--cpus", "0.5", "--device", "cpu", "--num-threads", "1", "--drain-timeout", "20")


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "flover", *words]


@contextlib.contextmanager
def running(*words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A command that says `Flover serves ... at URL`; -> it, URL."""
    process = subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("Flover serves")), "")
        assert line, "it did not start"
        yield process, line.split()[-1]
    finally:
        process.terminate()
        process.wait(60)


class Stream(threading.Thread):
    """A streamed request, read on a thread."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.url, self.body, self.events = url, body, list[str]()
        self.started = threading.Event()
        self.start()

    def run(self) -> None:
        with httpx.stream("POST", f"{self.url}/v1/completions", json=self.body, timeout=120) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    self.events.append(line.removeprefix("data: "))
                    self.started.set()

    def ending(self) -> str:
        """Its finish reason, or its error's code."""
        self.join(120)
        assert self.events[-1] == "[DONE]"
        last = json.loads(self.events[-2])
        return str(last["error"]["code"] if "error" in last else last["choices"][0]["finish_reason"])


def servers(pid: int) -> list[psutil.Process]:
    """The `flover serve` processes of the replicas below a process."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "flover.cluster.child" in process.cmdline():
                found.append(process)
    return found


@pytest.mark.slow
def test_a_lost_replica_costs_its_own_streams_only() -> None:
    with running("serve", "--replicas", "2", "--port", "0", *SMALL) as (process, url):
        prompts = [f"{i} {LONG['prompt']}" for i in range(8)]
        streams = [Stream(url, {**LONG, "prompt": prompt}) for prompt in prompts]
        assert all(stream.started.wait(60) for stream in streams)
        both = servers(process.pid)
        assert len(both) == 2
        both[0].send_signal(signal.SIGKILL)
        begin = time.monotonic()
        late = [Stream(url, {**LONG, "prompt": prompt, "max_tokens": 5}) for prompt in prompts]
        assert {stream.ending() for stream in late} == {"length"}  # some had the lost one as their home
        endings = [stream.ending() for stream in streams]
        assert set(endings) <= {"length", "replica_lost"}, endings
        assert "length" in endings
        assert "replica_lost" in endings
        while len([one for one in servers(process.pid) if one.is_running()]) < 2:  # Ray starts another
            assert time.monotonic() - begin < 90
            time.sleep(0.5)


@pytest.mark.slow
def test_an_update_drops_no_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else only the process that started Ray may join it
    with running("serve", "--replicas", "1", "--port", "0", *SMALL) as (process, url):
        before = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        address = _address(process.pid)
        stream = Stream(url, LONG)
        assert stream.started.wait(60)
        options = ("--ray-address", address, "--replicas", "1", "--served-model-name", "new", *SMALL)
        update = subprocess.run(command("cluster", "up", *options), timeout=120, capture_output=True, text=True)
        assert update.returncode == 0, update.stderr
        assert stream.ending() == "length"
        deadline = time.monotonic() + 20
        while (after := httpx.get(f"{url}/v1/models").json()["data"][0]["id"]) == before:
            assert time.monotonic() < deadline
        assert after == "new"


def _address(pid: int) -> str:
    """Of the head that a process has started."""
    for child in psutil.Process(pid).children(recursive=True):
        words = child.cmdline()
        for word in words:
            if word.startswith("--gcs-address="):
                return word.partition("=")[2]
    raise AssertionError("no head was started")


def fails(*words: str) -> str:
    result = subprocess.run(command(*words), capture_output=True, text=True, timeout=60)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_what_cannot_work_is_one_line() -> None:
    assert "Ray's head at 127.0.0.1:9 cannot be reached" in fails("cluster", "status", "--ray-address", "127.0.0.1:9")
    assert "--max-replicas, --ray-address and --nodes need --replicas" in fails("serve", "--nodes", "2")
    assert "max_replicas=1 is below replicas=2" in fails("serve", "--replicas", "2", "--max-replicas", "1")


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from flover.cluster import ray

    monkeypatch.setattr(ray, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "flover\[ray\]"'):
        ray.need_ray()
