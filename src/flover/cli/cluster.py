"""`flover serve --replicas N` and `flover cluster up | ingress | status | down`: replicas of the server on Ray."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from flover.cli.options import with_model, with_options
from flover.config import EngineConfig
from flover.server.config import ServerConfig

app = typer.Typer(help="Replicas of the server on a Ray cluster: they run until `down`.")
Address = Annotated[str, typer.Option("--ray-address", help="head of the cluster, HOST:PORT or auto")]
Name = Annotated[str, typer.Option("--name", help="of the application; several may share a cluster")]
DRAIN = 30.0


def run_replicas(
    api_keys: Sequence[str], server: Mapping[str, Any], engine: Mapping[str, Any], settings: Mapping[str, Any]
) -> int:
    """`flover serve --replicas`: replicas and an ingress for as long as this process lives. -> exit code."""
    from flover.cli.serve import KEYS, all_keys
    from flover.cluster.ray import ClusterConfig, connected, down, up

    config, keys = ClusterConfig(**settings), all_keys(api_keys)
    served, ranks = _check({**server, "api_keys": keys}, engine)
    with _listener(served) as listener, connected(config.address):
        if keys:
            os.environ[KEYS] = ",".join(keys)
        up(config, arguments(server, engine), ranks, served.drain_timeout)
        try:
            return _serve(listener, served, config.app)
        finally:
            down(config.app)


def run_batch_on_ray(
    input: Path, output: Path, engine: Mapping[str, Any], address: str | None, engines: int, cpus: float
) -> int:
    """`flover run-batch --ray`. -> exit code."""
    from flover.cli.serve import need_packages
    from flover.cluster.offline import run_batch_ray

    need_packages()
    served, failed = run_batch_ray(input, output, engine, address, engines, cpus)
    print(f"{output}: {served} served, {failed} failed", file=sys.stderr)
    return 1 if failed else 0


@app.command()
@with_options(engine=EngineConfig)
def up(
    name: Annotated[str | None, typer.Argument(metavar="[MODEL]", show_default=False)] = None,
    *,
    app_name: Name = "flover",
    ray_address: Address = "auto",
    replicas: Annotated[int, typer.Option(help="that run always")] = 1,
    max_replicas: Annotated[int | None, typer.Option(help="autoscale up to so many")] = None,
    target_queue_tokens: Annotated[int, typer.Option(help="waiting prompt tokens a replica, for autoscaling")] = 8192,
    nodes: Annotated[int, typer.Option(help="machines that a replica is spread over")] = 1,
    gpus: Annotated[float | None, typer.Option(help="of a replica on each node (default: one a rank)")] = None,
    cpus: Annotated[float, typer.Option(help="of a replica on each node")] = 1,
    served_model_name: Annotated[list[str] | None, typer.Option(help="as clients call it; may be repeated")] = None,
    drain_timeout: Annotated[float, typer.Option(help="seconds that requests of a replica have to finish")] = DRAIN,
    engine: dict[str, Any],
) -> int:
    """Start replicas, or roll others in: old ones finish what they have. Keys are taken from FLOVER_API_KEY."""
    from flover.cluster.ray import ClusterConfig, connected
    from flover.cluster.ray import up as bring_up

    rows = {"max_rows": engine["max_num_seqs"]} if "max_num_seqs" in engine else {}
    config = ClusterConfig(
        ray_address, app_name, replicas, max_replicas, target_queue_tokens, nodes, gpus, cpus, **rows
    )
    server = {"served_model_names": served_model_name or (), "drain_timeout": drain_timeout}
    engine = with_model(name, engine)
    _, ranks = _check(server, engine)
    with connected(ray_address):
        bring_up(config, arguments(server, engine), ranks, drain_timeout)
    return status(app_name, ray_address)


@app.command()
def ingress(
    host: Annotated[str, typer.Option(help="0.0.0.0 is every interface")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 is any free one")] = 8000,
    app_name: Name = "flover",
    ray_address: Address = "auto",
    drain_timeout: Annotated[float, typer.Option(help="seconds that requests have to finish")] = DRAIN,
) -> int:
    """A port for the replicas; any number of them may run, on any machine of the cluster."""
    from flover.cluster.ray import connected

    served, _ = _check({"host": host, "port": port, "drain_timeout": drain_timeout}, {})
    with _listener(served) as listener, connected(ray_address):
        return _serve(listener, served, app_name)


@app.command()
def status(app_name: Name = "flover", ray_address: Address = "auto") -> int:
    """Who serves, where, and what waits."""
    from flover.cluster.ray import connected, replicas

    with connected(ray_address):
        table = Table("replica", "url", "running", "waiting", "queue tokens", box=None, pad_edge=False)
        found = replicas(app_name)
        for name, (url, load) in sorted(found.items()):
            counts = (load.get(f"num_requests_{what}", 0) for what in ("running", "waiting"))
            table.add_row(name, url, *(f"{n:g}" for n in counts), f"{load.get('queue_tokens', 0):g}")
    Console(highlight=False, soft_wrap=True).print(table if found else f"no replica of {app_name} serves")
    return 0 if found else 1


@app.command()
def down(app_name: Name = "flover", ray_address: Address = "auto") -> int:
    """Let all replicas finish what they have, and end them."""
    from flover.cluster.ray import connected
    from flover.cluster.ray import down as bring_down

    with connected(ray_address):
        if not bring_down(app_name):
            raise ValueError(f"there is no application {app_name!r} on this cluster")
    return 0


def _check(server: Mapping[str, Any], engine: Mapping[str, Any]) -> tuple[ServerConfig, int]:
    """ValueError for settings that no replica would take, before any is started. -> the server's, a replica's ranks."""
    from flover.cli.serve import need_packages

    need_packages()
    served = ServerConfig(**server)
    return served, EngineConfig(**engine).num_ranks


def _listener(served: ServerConfig) -> Any:
    from flover.cli.serve import need_packages
    from flover.cluster.ray import need_ray

    need_packages()
    need_ray()
    from flover.server.serve import bind

    return bind(served.host, served.port)


def _serve(listener: Any, served: ServerConfig, app_name: str) -> int:
    from flover.cluster.ingress import Ingress
    from flover.cluster.serve import serve_ingress

    ingress = Ingress(served.max_body_bytes, served.body_timeout)
    return asyncio.run(serve_ingress(listener, ingress, app_name, served.drain_timeout))


NOT_THEIRS = ("host", "port", "admin_socket", "served_model_names")


def arguments(server: Mapping[str, Any], engine: Mapping[str, Any]) -> list[str]:
    """The command line of `flover serve` that has these settings."""
    given: dict[str, Any] = {k: v for k, v in server.items() if k not in NOT_THEIRS} | dict(engine)
    words = []
    for value in server.get("served_model_names", ()):
        words += ["--served-model-name", value]
    for name, value in given.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            for one in value if isinstance(value, list | tuple) else (value,):
                words += [f"--{flag}", str(one)]
    return words
