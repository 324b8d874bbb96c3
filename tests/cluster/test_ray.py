"""Replicas on a Ray of this machine: what a lost replica costs, and that an update drops no stream."""

from __future__ import annotations

import contextlib
import json
import secrets
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from replicas import LONG, SMALL, Stream, command, running

from flover.cluster.offline import BLOCK, _blocks

pytest.importorskip("ray")
HALF = ("--cpus", "0.5", *SMALL)


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
    with running("serve", "--replicas", "2", "--port", "0", *HALF) as (process, url):
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
    with running("serve", "--replicas", "1", "--port", "0", *HALF) as (process, url):
        before = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        address = _address(process.pid)
        stream = Stream(url, LONG)
        assert stream.started.wait(60)
        options = ("--ray-address", address, "--replicas", "1", "--served-model-name", "new", *HALF)
        update = subprocess.run(command("cluster", "up", *options), timeout=120, capture_output=True, text=True)
        assert update.returncode == 0, update.stderr
        assert stream.ending() == "length"
        deadline = time.monotonic() + 20
        while (after := httpx.get(f"{url}/v1/models").json()["data"][0]["id"]) == before:
            assert time.monotonic() < deadline
        assert after == "new"


@pytest.mark.slow
def test_a_batch_file_has_the_same_results_with_ray(tmp_path: Path) -> None:
    lines = [
        {"custom_id": f"r{i}", "url": "/v1/completions", "body": {"prompt": f"{i} And it", "max_tokens": 4, "seed": i}}
        for i in range(300)
    ]
    lines.append({"custom_id": "bad", "url": "/v1/completions", "body": {"prompt": 5.5}})
    given, plain, ray = (tmp_path / name for name in ("in.jsonl", "plain.jsonl", "ray.jsonl"))
    given.write_text("".join(json.dumps({**line, "method": "POST"}) + "\n" for line in lines))
    engine = ("--device", "cpu", "--num-threads", "1", "-i", str(given))
    half = str(_cpus() / 2)  # engines that take all the CPUs there are
    for words in (("-o", str(plain)), ("-o", str(ray), "--ray", "--replicas", "2", "--cpus", half)):
        done = subprocess.run(command("run-batch", *engine, *words), timeout=180, capture_output=True, text=True)
        assert done.returncode == 1, done.stderr  # one line is bad
        assert "300 served, 1 failed" in done.stderr
    assert len(ray.read_text().splitlines()) == len(lines)
    assert _results(ray) == _results(plain)


def _cpus() -> int:
    """As Ray counts them."""
    from ray._private.utils import get_num_cpus

    return int(get_num_cpus())


def _results(path: Path) -> dict[str, Any]:
    """Status and answer by custom_id, without what differs from run to run."""
    found = {}
    for line in path.read_text().splitlines():
        result = json.loads(line)
        body = result["response"]["body"]
        found[result["custom_id"]] = result["response"]["status_code"], body.get("choices"), body.get("usage")
    return found


def test_blocks_of_a_file_are_whole_lines_for_every_engine(tmp_path: Path) -> None:
    lines = [b"x" * (i % 7) + b"\n" for i in range(10)] + [b"no end"]
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(lines))
    data = path.read_bytes()
    blocks = [data[block["begin"] : block["end"]] for block in _blocks(path, 3)]
    assert b"".join(blocks) == data
    assert [block.count(b"\n") for block in blocks] == [4, 4, 2]
    path.write_bytes(b"a\n" * (BLOCK + 1))
    assert [block["end"] - block["begin"] for block in _blocks(path, 1)] == [2 * BLOCK, 2]
    path.write_bytes(b"")
    assert _blocks(path, 2) == []


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
    assert "--max-replicas, --ray-address, --nodes and --cpus need --replicas" in fails("serve", "--nodes", "2")
    assert "max_replicas=1 is below replicas=2" in fails("serve", "--replicas", "2", "--max-replicas", "1")


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from flover.cluster import ray

    monkeypatch.setattr(ray, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install -e "\.\[ray\]"'):
        ray.need_ray()
