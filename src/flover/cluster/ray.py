"""Replicas of `flover serve` on Ray Serve: deploy, update, ask, remove; and the autoscaling that Ray is told to use.

Ray places replicas, starts lost ones again and rolls updates; it sees no request. Calling `up` again with other
settings is the rolling update: Ray starts new replicas and lets old ones go, which drain first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from flover.cluster.policy import Steady, desired_replicas
from flover.cluster.registry import make_registry, registry

PATIENCE = 60.0  # seconds of too many replicas before some are given up
MAX_ROWS = 256  # of a replica, where its settings do not say
# of the environment of `up`, to replicas
PASSED_ON = ("FLOVER_API_KEY", "PYTHONPATH", "OMP_NUM_THREADS", "HF_HOME")
SERVE_OPTIONS = {"graceful_shutdown_wait_loop_s": 0.1, "health_check_period_s": 2.0}


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """What a user may set about a cluster.

    Args:
        address: of a running Ray cluster's head (`host:port`, "auto" for the one this machine is in); None starts Ray
            here, for as long as this process lives.
        app: name of the application; several may share a cluster.
        replicas: that run always. max_replicas: autoscaling up to so many.
        target_queue_tokens: prompt tokens that may wait on a replica before another one is started.
        nodes: machines that the ranks of one replica are spread over.
        gpus, cpus: of a replica, on each of its nodes; gpus None: one for each of its ranks, if the cluster has any.
    """

    address: str | None = None
    app: str = "flover"
    replicas: int = 1
    max_replicas: int | None = None
    target_queue_tokens: int = 8192
    nodes: int = 1
    gpus: float | None = None
    cpus: float = 1
    max_rows: int = MAX_ROWS

    def __post_init__(self) -> None:
        for name in ("replicas", "nodes", "target_queue_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("gpus", "cpus"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a number of at least 0, got {value}")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas={self.max_replicas} is below replicas={self.replicas}")


def need_ray() -> None:
    """ValueError if the extra is not installed."""
    if find_spec("ray") is None:
        raise ValueError('replicas and clusters need Ray: pip install -e ".[ray]"')


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """A connection to a cluster, or a cluster of this machine for as long as the context lasts.

    Raises:
        ValueError: no head answers at `address`.
    """
    need_ray()
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    import ray

    try:
        _check_head(address)
        ray.init(
            address=address or "local",
            logging_level=logging.WARNING,
            log_to_driver=True,
            include_dashboard=False if address is None else None,
        )
    except (OSError, RuntimeError, ValueError) as error:
        where = f"Ray's head at {address}" if address else "Ray on this machine"
        raise ValueError(f"{where} cannot be reached: {' '.join(str(error).split())[:200]}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_head(address: str | None) -> None:
    """OSError at once where nobody listens: Ray itself would try for half a minute."""
    host, colon, port = (address or "").rpartition(":")
    if colon and "//" not in host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=5).close()


def up(config: ClusterConfig, arguments: Sequence[str], ranks: int, drain: float, wait: float = 1800.0) -> None:
    """Deploy or update, and wait until `replicas` of them serve.

    Args:
        arguments: of `flover serve`, but for host and port. ranks: of its engine. drain: its drain_timeout.

    Raises:
        ValueError: what it asks for cannot be placed, or replicas do not come up; names what Ray says.
    """
    import ray
    from ray import serve

    from flover.cluster.replica import DRAIN_MARGIN, Replica

    local, more = divmod(ranks, config.nodes)
    if more:
        raise ValueError(f"the {ranks} ranks of -tp and -pp cannot be spread over {config.nodes} nodes evenly")
    if config.gpus is None:
        config = replace(config, gpus=local if ray.cluster_resources().get("GPU") else 0)
    check_room(config.replicas, config.cpus * config.nodes, (config.gpus or 0) * config.nodes)
    environment = {k: v for k, v in os.environ.items() if k in PASSED_ON}
    options: dict[str, Any] = {"graceful_shutdown_timeout_s": drain + 2 * DRAIN_MARGIN, **SERVE_OPTIONS}
    bundle = {"CPU": config.cpus, **({"GPU": config.gpus} if config.gpus else {})}
    options["placement_group_bundles"] = [bundle] * config.nodes
    options["placement_group_strategy"] = "STRICT_SPREAD" if config.nodes > 1 else "PACK"
    options["ray_actor_options"] = {"num_cpus": config.cpus, "num_gpus": config.gpus or 0}
    if config.max_replicas is None:
        options["num_replicas"] = config.replicas
    else:
        options["autoscaling_config"] = _autoscaling(config, config.max_replicas)
    deployment: Any = serve.deployment(Replica, name="replica", **options)
    target = deployment.bind(config.app, list(arguments), environment, drain, ranks if config.nodes > 1 else 1, local)
    make_registry(config.app)
    serve.start(proxy_location="Disabled")
    try:
        serve.run(target, name=config.app, route_prefix=None)
    except RuntimeError as error:
        raise ValueError(f"the replicas do not come up: {' '.join(str(error).split())[:300]}") from None
    deadline = time.monotonic() + wait
    while len(replicas(config.app)) < config.replicas:
        if time.monotonic() > deadline:
            raise ValueError(f"{len(replicas(config.app))} of {config.replicas} replicas serve after {wait:g} s")
        time.sleep(0.2)


def check_room(replicas: int, cpus: float, gpus: float) -> None:
    """ValueError if the whole cluster is too small for replicas of so much each."""
    import ray

    have = ray.cluster_resources()
    for name, each in (("CPU", cpus), ("GPU", gpus)):
        wanted = each * replicas
        if wanted > have.get(name, 0):
            raise ValueError(
                f"{replicas} replicas need {wanted:g} {name}, the cluster has {have.get(name, 0):g}: "
                f"fewer replicas or fewer --{name.lower()}s each would fit"
            )


def _autoscaling(config: ClusterConfig, most: int) -> Any:
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

    return AutoscalingConfig(
        min_replicas=config.replicas,
        initial_replicas=config.replicas,
        max_replicas=most,
        metrics_interval_s=1.0,
        look_back_period_s=5.0,
        upscale_delay_s=2.0,
        downscale_delay_s=0.0,
        policy=AutoscalingPolicy(
            policy_function=Scale,
            policy_kwargs={"target": config.target_queue_tokens, "max_rows": config.max_rows},
        ),
    )


class Scale:
    """Ray Serve's autoscaling policy: `cluster.policy.desired_replicas` of what the replicas report."""

    def __init__(self, target: int, max_rows: int) -> None:
        self._target, self._max_rows = target, max_rows
        self._steady = Steady(PATIENCE)

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        reported = context.aggregated_metrics or {}
        tokens, rows = (sum((reported.get(name) or {}).values()) for name in ("queue_tokens", "rows"))
        wanted = desired_replicas(
            context.current_num_replicas,
            tokens,
            rows,
            self._max_rows,
            self._target,
            context.capacity_adjusted_min_replicas,
            context.capacity_adjusted_max_replicas,
        )
        return self._steady(time.monotonic(), wanted), {}


def replicas(app: str) -> dict[str, tuple[str, Mapping[str, float]]]:
    """Those that serve: id -> url, load."""
    import ray

    found: dict[str, tuple[str, Mapping[str, float]]] = ray.get(registry(app).replicas.remote())
    return found


async def ask(app: str) -> dict[str, tuple[str, Mapping[str, float]]]:
    """The same, for `ingress.watch`."""
    found: dict[str, tuple[str, Mapping[str, float]]] = await asyncio.wait_for(registry(app).replicas.remote(), 5)
    return found


def down(app: str) -> bool:
    """Let all replicas drain, and forget the application. -> whether there was one."""
    import ray
    from ray import serve

    there = app in serve.status().applications
    if there:
        serve.delete(app)
    with contextlib.suppress(ValueError):  # somebody else was quicker
        ray.kill(registry(app))
    return there
