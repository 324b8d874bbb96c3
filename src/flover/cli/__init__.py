"""The command line: `flover generate | chat | serve | run-batch | plan | profile | doctor | bench | cluster | admin`.

Errors of the user are one line on stderr and exit code 2, Ctrl-C is 130; a traceback is a bug. torch is imported only
by commands that need it.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import flover
from flover.cli import admin, bench, cluster
from flover.cli.options import with_model, with_options
from flover.config import EngineConfig
from flover.engine.launch import COMMAND, launched
from flover.sampling_params import SamplingParams
from flover.server.config import ServerConfig

app = typer.Typer(
    help="Temporal fusion of autoregressive decoding: many requests, one running batch.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench.app, name="bench")
app.add_typer(cluster.app, name="cluster")
app.add_typer(admin.app, name="admin")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"flover {flover.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version, help="print it")] = False,
) -> None:
    pass


@app.command()
@with_options(sampling=SamplingParams, engine=EngineConfig)
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", show_default=False)] = None,
    *,
    input: Annotated[Path | None, typer.Option(help="JSON lines: prompt, prompt_token_ids or messages")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON lines; an interrupted run goes on")] = None,
    timeline: Annotated[Path | None, typer.Option(help="rows x steps, to .png or .json")] = None,
    explain: Annotated[bool, typer.Option(help="print every effective setting with its origin")] = False,
    sampling: dict[str, Any],
    engine: dict[str, Any],
) -> int:
    """Generate text from prompts; several run as one batch, streamed to the terminal."""
    from flover.cli.generate import run_generate

    return run_generate(prompts or [], input, output, timeline, explain, sampling, engine)


@app.command()
@with_options(sampling=SamplingParams, engine=EngineConfig)
def chat(
    *,
    system: Annotated[str, typer.Option(help="a system message before the conversation")] = "",
    sampling: dict[str, Any],
    engine: dict[str, Any],
) -> int:
    """Talk to a model. /reset forgets, Ctrl-C interrupts an answer, Ctrl-D ends."""
    from flover.cli.chat import run_chat

    return run_chat(system, sampling, engine)


@app.command()
@with_options("api_keys", server=ServerConfig, engine=EngineConfig)
def serve(
    name: Annotated[str | None, typer.Argument(metavar="[MODEL]", show_default=False)] = None,
    *,
    api_key: Annotated[list[str] | None, typer.Option(help="may be repeated; better in FLOVER_API_KEY")] = None,
    replicas: Annotated[
        int | None, typer.Option(help="engines behind this port, on Ray", rich_help_panel="Ray")
    ] = None,
    max_replicas: Annotated[int | None, typer.Option(help="autoscale up to so many", rich_help_panel="Ray")] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="head of a cluster, HOST:PORT or auto; else this machine", rich_help_panel="Ray")
    ] = None,
    nodes: Annotated[int, typer.Option(help="machines that a replica is spread over", rich_help_panel="Ray")] = 1,
    cpus: Annotated[float, typer.Option(help="of a replica on each node, for Ray", rich_help_panel="Ray")] = 1,
    server: dict[str, Any],
    engine: dict[str, Any],
) -> int:
    """Serve the OpenAI API: /v1/chat/completions, /v1/completions and more."""
    from flover.cli.serve import names, run_serve

    for option in {"allowed_origins", "allowed_methods", "allowed_headers"} & server.keys():
        server[option] = names(f"--{option.replace('_', '-')}", server[option])
    if server.get("log_prompts"):
        server["log_requests"] = True
    if replicas is None:
        if max_replicas is not None or ray_address is not None or nodes != 1 or cpus != 1:
            raise ValueError("--max-replicas, --ray-address, --nodes and --cpus need --replicas")
        return run_serve(api_key or (), server, with_model(name, engine))
    from flover.cli.cluster import run_replicas

    settings: dict[str, Any] = {"address": ray_address, "replicas": replicas, "max_replicas": max_replicas}
    settings |= {"nodes": nodes, "cpus": cpus}
    return run_replicas(api_key or (), server, with_model(name, engine), settings)


@app.command("run-batch")
@with_options(engine=EngineConfig)
def run_batch(
    *,
    input: Annotated[Path, typer.Option("--input-file", "-i", help="requests in OpenAI's batch format, JSON lines")],
    output: Annotated[Path, typer.Option("--output-file", "-o", help="a line for each of them, once all are there")],
    ray: Annotated[bool, typer.Option("--ray", help="on Ray Data: several engines, lines in any order")] = False,
    replicas: Annotated[int, typer.Option(help="engines, with --ray", rich_help_panel="Ray")] = 1,
    ray_address: Annotated[
        str | None, typer.Option(help="head of a cluster, HOST:PORT or auto; else this machine", rich_help_panel="Ray")
    ] = None,
    cpus: Annotated[float, typer.Option(help="of an engine, for Ray", rich_help_panel="Ray")] = 1,
    engine: dict[str, Any],
) -> int:
    """Serve a file of requests: chats, completions, responses, embeddings."""
    if ray:
        from flover.cli.cluster import run_batch_on_ray

        return run_batch_on_ray(input, output, engine, ray_address, replicas, cpus)
    if replicas != 1 or ray_address is not None or cpus != 1:
        raise ValueError("--replicas, --ray-address and --cpus need --ray")
    from flover.cli.serve import run_batch_file

    return run_batch_file(input, output, engine)


@app.command()
@with_options(engine=EngineConfig)
def plan(
    name: Annotated[str | None, typer.Argument(metavar="[MODEL]", show_default=False)] = None,
    *,
    hardware: Annotated[
        str | None, typer.Option(help="h200, h100, a100 or a .toml: predict speed and memory there")
    ] = None,
    replicas: Annotated[int, typer.Option(help="of the whole, with --hardware")] = 1,
    engine: dict[str, Any],
) -> int:
    """What fits on this machine, or with --hardware on others, and how fast it would be. Nothing is loaded."""
    from flover.cli.plan import run_plan
    from flover.cli.plan_cluster import run_cluster_plan

    engine = with_model(name, engine)
    if hardware is None:
        if replicas != 1:
            raise ValueError("--replicas of a plan needs --hardware h200, h100, a100 or a .toml file")
        return run_plan(engine)
    return run_cluster_plan(hardware, replicas, engine)


@app.command()
@with_options(engine=EngineConfig)
def profile(
    *,
    batch: Annotated[str, typer.Option(help="rows that decode together, one or several: 1,32")] = "1,32",
    context: Annotated[int, typer.Option(help="tokens of each prompt")] = 128,
    steps: Annotated[int, typer.Option(help="decode steps to time, and as many to record")] = 20,
    prefill: Annotated[int | None, typer.Option(help="also profile a prompt of that many tokens")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON of everything")] = None,
    engine: dict[str, Any],
) -> int:
    """Where a model's steps spend their time, kernel by kernel, beside what the machine could do."""
    from flover.cli.profile import run_profile

    return run_profile(batch, context, steps, prefill, output, engine)


@app.command()
def doctor() -> int:
    """Check this installation and say how to fix what is wrong."""
    from flover.cli.doctor import run_doctor

    return run_doctor()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; -> the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # text that the terminal's encoding lacks is no error
    if sys.stderr.isatty():
        _show_log()
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        if (code := _serve_rank_0(arguments)) is not None:
            return code
        result = app(args=arguments, prog_name="flover", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except ValueError as error:
        return _fail(str(error))
    except Exception as error:
        usage = getattr(error, "format_message", None)  # of click, or typer's copy of it
        if usage is None:
            raise
        wrong = getattr(error.__cause__, "errors", None)  # of pydantic, with which typer reads numbers
        return _fail(usage() + (f", got {wrong()[0]['input']!r}" if wrong else ""))


def _serve_rank_0(arguments: Sequence[str]) -> int | None:
    """Of the processes that torchrun starts with one command, the first runs it; -> the exit code of another."""
    launch = launched()
    if launch is None:
        return None
    os.environ[COMMAND] = " ".join(arguments)
    if launch.rank == 0:
        return None
    from flover.engine.rank import join

    return join(launch)


class _Dim(logging.Handler):
    """What the engine says about itself, such as the memory plan before it takes any; for a terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        Console(stderr=True, highlight=False, soft_wrap=True).print(record.getMessage(), style="dim", markup=False)


def _show_log() -> None:
    logger = logging.getLogger("flover")
    logger.addHandler(_Dim())
    logger.setLevel(logging.INFO)


def _fail(message: str) -> int:
    print(f"flover: error: {' '.join(message.split())}", file=sys.stderr)
    return 2
