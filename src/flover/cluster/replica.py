"""A replica: a Ray Serve actor that owns one `flover serve` process, and tells the registry where it listens.

Clients' bytes never pass the actor: the ingress speaks HTTP to the process itself. The actor watches it, reports its
load, and drains it (SIGTERM) when Ray Serve lets the replica go.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray import serve
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from flover.cluster.registry import registry

BEAT = 1.0  # seconds between reports
RANK_SECONDS = 5.0  # that a rank on another node has to say that it runs
DRAIN_MARGIN = 5.0  # seconds that Ray waits beyond the server's own drain


class Server:
    """A `flover serve` process of this machine; as an actor, a further rank of a group on the node of a bundle of the
    replica's placement group.

    Args:
        arguments: of `flover`. environment: on top of this process's.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flover.cluster.child", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def url(self) -> str:
        """Wait until it serves. RuntimeError if it ends before that."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("Flover serves "):
                threading.Thread(target=self.process.stdout.read, daemon=True).start()
                return line.split()[-1]
        raise RuntimeError(f"flover serve ended with code {self.process.wait()}: its reason is in this actor's log")

    def running(self) -> bool:
        return self.process.poll() is None

    def stop(self, seconds: float) -> None:
        """Let it drain, then end it."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Replica:
    """The class that Ray Serve deploys; `flover.cluster.ray` says with which options.

    Args:
        app: name of the application, and of its registry. arguments: of `flover serve`, but for host and port.
        ranks: processes of the engine, which are told by torchrun's variables; 1: the engine starts them.
        local_ranks: of them on a node.
    """

    def __init__(
        self,
        app: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        drain: float,
        ranks: int = 1,
        local_ranks: int = 1,
    ) -> None:
        self.drain, self.app = drain, app
        self._leaving, self._ranks = threading.Event(), list[Any]()
        self._key = environment.get("FLOVER_API_KEY", "").partition(",")[0]
        self.replica_id = serve.get_replica_context().replica_id.unique_id
        host = ray.util.get_node_ip_address()
        command = ["serve", *arguments, "--host", host, "--port", "0"]
        if ranks > 1:
            environment = {**environment, **self._start_ranks(command, environment, ranks, local_ranks, host)}
        self.server = Server(command, environment)
        self.url = self.server.url()
        self.load: dict[str, float] = {}
        self._beat()
        threading.Thread(target=self._beats, daemon=True).start()

    def _start_ranks(
        self, command: list[str], environment: Mapping[str, str], ranks: int, local: int, host: str
    ) -> dict[str, str]:
        """Ranks 1 and up, each an actor on its bundle; -> the variables of rank 0."""
        group: Any = get_current_placement_group()
        kind: Any = ray.remote(num_cpus=0)(Server)
        shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(local), "MASTER_ADDR": host}
        shared["MASTER_PORT"] = str(_free_port(host))
        for rank in range(1, ranks):
            own = {**environment, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank % local)}
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank // local)
            self._ranks.append(kind.options(scheduling_strategy=place).remote(command, own))
        return {**shared, "RANK": "0", "LOCAL_RANK": "0"}

    def _beats(self) -> None:
        while not self._leaving.wait(BEAT):
            self._beat()

    def _beat(self) -> None:
        try:
            request = urllib.request.Request(f"{self.url}/load", headers={"Authorization": f"Bearer {self._key}"})
            with urllib.request.urlopen(request, timeout=5) as answer:
                self.load = json.load(answer)
            if not self._leaving.is_set():
                ray.get(registry(self.app).beat.remote(self.replica_id, self.url, self.load), timeout=10)
        except (OSError, ray.exceptions.RayError):
            pass  # no beat is what says so

    def check_health(self) -> None:
        """Ray Serve asks; RuntimeError has it start another replica, with all its ranks."""
        if not self.server.running():
            raise RuntimeError(f"flover serve ended with code {self.server.process.returncode}")
        for number, rank in enumerate(self._ranks, 1):
            try:
                there = ray.get(rank.running.remote(), timeout=RANK_SECONDS)
            except ray.exceptions.RayError:
                there = False
            if not there:  # the server would wait in vain for it to join again
                raise RuntimeError(f"rank {number} is lost")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What `flover.cluster.ray.Scale` decides by."""
        return {"queue_tokens": self.load.get("queue_tokens", 0), "rows": self.load.get("num_requests_running", 0)}

    def __del__(self) -> None:
        """Ray Serve lets the replica go: no new requests, those that run finish."""
        self._leaving.set()
        with contextlib.suppress(Exception):  # this process may be ending
            ray.get(registry(self.app).leave.remote(self.replica_id), timeout=5)
        if hasattr(self, "server"):  # else it never came up
            self.server.stop(self.drain + DRAIN_MARGIN)


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as listener:
        return int(listener.getsockname()[1])
