"""Several Ray nodes with processes of their own on this machine: one is lost, a group of ranks is spread over two."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from replicas import LONG, SMALL, Stream, command, running

pytest.importorskip("ray")
pytestmark = pytest.mark.slow
ROWS = 4


class Nodes:
    """A Ray cluster whose head runs no replica. Nodes have one CPU each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        self.address = self.cluster.address
        self.nodes = [self.add(), self.add()]

    def add(self) -> Any:
        return self.cluster.add_node(num_cpus=1)

    def flover(self, *words: str, codes: tuple[int, ...] = (0,)) -> str:
        done = subprocess.run(
            command("cluster", *words, "--ray-address", self.address), timeout=200, capture_output=True, text=True
        )
        assert done.returncode in codes, done.stderr
        return done.stdout

    def kill(self, node: Any) -> None:
        """All its processes at once, replicas and engines among them."""
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for process in (raylet, *raylet.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.cluster.remove_node(node, allow_graceful=False)

    def serving(self, count: int, seconds: float) -> None:
        """Wait until so many replicas serve; on a busy machine none may, for a moment (1)."""
        deadline = time.monotonic() + seconds
        while self.flover("status", codes=(0, 1)).count("http://") < count:
            assert time.monotonic() < deadline, f"{count} replicas do not serve after {seconds} s"
            time.sleep(1)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # cluster_utils hands no token to the nodes it starts
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made = Nodes()
    yield made
    made.cluster.shutdown()


def test_a_lost_node_costs_the_streams_it_had_begun(nodes: Nodes) -> None:
    nodes.flover("up", "--replicas", "2", "--max-num-seqs", str(ROWS), *SMALL)
    with running("cluster", "ingress", "--port", "0", "--ray-address", nodes.address) as (_, url):
        prompts = [f"{i} {LONG['prompt']}" for i in range(6 * ROWS)]
        streams = [Stream(url, {**LONG, "prompt": prompt, "max_tokens": 400}) for prompt in prompts]
        deadline = time.monotonic() + 60
        while sum(stream.started.is_set() for stream in streams) < 2 * ROWS:  # the others wait for a row
            assert time.monotonic() < deadline
            time.sleep(0.05)
        began = [stream.started.is_set() for stream in streams]
        assert not all(began)
        nodes.kill(nodes.nodes[0])
        endings = [stream.ending() for stream in streams]
        assert set(endings) == {"length", "replica_lost"}, endings
        assert 1 <= endings.count("replica_lost") <= ROWS  # what ran there, nothing else
        waited = [stream for stream, had in zip(streams, began) if not had]
        assert {stream.ending() for stream in waited} == {"length"}
        again = Stream(url, waited[-1].body)
        assert again.text() == waited[-1].text()
        nodes.add()
        nodes.serving(2, 90)


@pytest.mark.parametrize(("rank", "kind"), [(0, "-tp"), (1, "-pp")])
def test_a_group_of_ranks_over_two_nodes(nodes: Nodes, rank: int, kind: str) -> None:
    body = {**LONG, "max_tokens": 40}
    with running("serve", "--port", "0", "--device", "cpu", "--num-threads", "1") as (_, url):
        expected = Stream(url, body).text()
    nodes.flover("up", "--replicas", "1", "--nodes", "2", kind, "2", *SMALL)
    with running("cluster", "ingress", "--port", "0", "--ray-address", nodes.address) as (_, url):
        assert Stream(url, body).text() == expected
        held = [_ranks(node) for node in nodes.nodes]
        assert sorted(map(sorted, held)) == [[0], [1]]
        stream = Stream(url, LONG)
        assert stream.started.wait(60)
        nodes.kill(nodes.nodes[held.index({rank})])
        assert stream.ending() in ("replica_lost", "engine_dead")
        nodes.add()
        deadline = time.monotonic() + 90  # Ray starts the group again
        while httpx.post(f"{url}/v1/completions", json={**body, "stream": False}, timeout=60).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(1)
        assert Stream(url, body).text() == expected


def _ranks(node: Any) -> set[int]:
    """Whose processes run on a node."""
    below = psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True)
    return {int(one.environ()["RANK"]) for one in below if "flover.cluster.child" in one.cmdline()}
