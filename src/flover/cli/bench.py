"""`flover bench serve | throughput | latency | compare | startup | workloads | paper | report`: options, and no work.

Options are named as in vLLM's `bench`. Other commands of the group register with `app`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from flover.cli.options import with_options
from flover.config import EngineConfig

app = typer.Typer(help="Measure: throughput, latency, start-up; compare ways of scheduling on one workload.")

Policy = Annotated[str, typer.Option(help="who serves: fused, serial, dynamic:50ms:4,8, concurrent:4, ...")]
Output = Annotated[Path | None, typer.Option("--output-json", help="everything, with each request")]
Repeats = Annotated[int, typer.Option(help="runs, each with a seed of its own; more than one gives 95 % intervals")]
Goodput = Annotated[
    list[str] | None, typer.Option(help="ttft:MS, tpot:MS, e2el:MS; a request counts if it meets them all")
]


@dataclass(frozen=True, slots=True)
class Load:
    """Which requests, and when."""

    num_prompts: int | None = None
    dataset_name: str = "random"
    dataset_path: str | None = None
    input_len: str = "128"
    output_len: str = "128"
    range_ratio: float = 0.0
    request_rate: float | None = None
    request_interval: float | None = None
    burstiness: float | None = None
    ramp_up_strategy: str | None = None
    ramp_up_start_rps: float | None = None
    ramp_up_end_rps: float | None = None
    custom_output_len: int | None = None


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
@with_options("policy", "custom_output_len", load=Load, engine=EngineConfig)
def throughput(
    *,
    policy: Policy = "fused",
    num_repeats: Repeats = 1,
    goodput: Goodput = None,
    output_json: Output = None,
    load: dict[str, Any],
    engine: dict[str, Any],
) -> int:
    """Serve a workload, all of it at once unless a rate is given: tokens a second, TTFT, TPOT, ITL, E2E."""
    from flover.cli.bench_run import run_throughput

    return run_throughput(policy, Load(**load), num_repeats, goodput or [], output_json, engine)


@app.command()
@with_options(load=Load)
def serve(
    goals: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,  # vLLM's: --goodput ttft:500 tpot:50
    *,
    base_url: Annotated[str | None, typer.Option(help="of the server, instead of host and port")] = None,
    host: Annotated[str, typer.Option(help="of the server")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="of the server")] = 8000,
    endpoint: Annotated[str | None, typer.Option(help="its path (default: the backend's)")] = None,
    backend: Annotated[str, typer.Option(help="openai (or vllm: completions), openai-chat")] = "openai",
    model: Annotated[str | None, typer.Option("--model", "-m", help="default: the first that it lists")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="makes a chat's text (default: the server's)")] = None,
    max_concurrency: Annotated[int | None, typer.Option(min=1, help="requests in flight at most")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="exactly the output tokens asked for")] = False,
    goodput: Goodput = None,
    percentile_metrics: Annotated[str, typer.Option(help="those printed")] = "ttft,tpot,itl,e2el",
    metric_percentiles: Annotated[str, typer.Option(help="such as 50,90,99.9")] = "99",
    seed: Annotated[int, typer.Option(help="of prompts, lengths and arrivals")] = 0,
    num_warmups: Annotated[int, typer.Option(min=0, help="requests before, not counted; one is always tried")] = 0,
    ready_check_timeout_sec: Annotated[float, typer.Option(min=0, help="seconds to wait for the server")] = 0,
    extra_body: Annotated[str, typer.Option(help='JSON, into each request, as {"temperature": 1}')] = "{}",
    save_result: Annotated[bool, typer.Option("--save-result", help="as JSON, with each request")] = False,
    save_detailed: Annotated[bool, typer.Option("--save-detailed", help="and vLLM's lists: ttfts, itls, ...")] = False,
    result_dir: Annotated[Path, typer.Option(help="of the JSON")] = Path("."),
    result_filename: Annotated[str | None, typer.Option(help="default: made of backend, rate, model and time")] = None,
    load: dict[str, Any],
) -> int:
    """Send requests to an OpenAI endpoint on schedule, whatever it does: TTFT, TPOT, ITL, E2E, goodput."""
    from flover.cli.bench_serve import ServeBench, run_serve_bench

    if goals and not goodput:
        raise ValueError(f"unexpected argument {goals[0]!r}")
    bench = ServeBench(
        base_url or f"http://{host}:{port}",
        endpoint,
        backend,
        model,
        tokenizer,
        max_concurrency,
        ignore_eos,
        [*(goodput or ()), *(goals or ())],
        percentile_metrics,
        metric_percentiles,
        seed,
        num_warmups,
        ready_check_timeout_sec,
        extra_body,
        save_detailed,
    )
    path = None
    if save_result:
        result_dir.mkdir(parents=True, exist_ok=True)
        path = result_dir / result_filename if result_filename else result_dir
    return run_serve_bench(bench, Load(**load), path)


@app.command()
@with_options("policy", engine=EngineConfig)
def latency(
    *,
    policy: Policy = "fused",
    input_len: Annotated[int, typer.Option(min=1, help="tokens of each prompt")] = 32,
    output_len: Annotated[int, typer.Option(min=1, help="tokens of each output")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="requests at once")] = 8,
    num_iters: Annotated[int, typer.Option(help="batches, one after the other")] = 10,
    num_iters_warmup: Annotated[int, typer.Option(help="batches before, not counted")] = 2,
    output_json: Output = None,
    engine: dict[str, Any],
) -> int:
    """How long one batch of equal requests takes, again and again."""
    from flover.cli.bench_run import run_latency

    load = Load(num_prompts=batch_size, input_len=str(input_len), output_len=str(output_len))
    return run_latency(policy, load, num_iters, num_iters_warmup, output_json, engine)


@app.command()
@with_options("policy", "custom_output_len", load=Load, engine=EngineConfig)
def compare(
    *,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="those to compare; may be repeated (default serial,concurrent,dynamic:50ms,fused)"),
    ] = None,
    num_repeats: Repeats = 1,
    goodput: Goodput = None,
    output_json: Output = None,
    load: dict[str, Any],
    engine: dict[str, Any],
) -> int:
    """Several policies on the same requests: a table with ratios, and whether their tokens are those of serial."""
    from flover.cli.bench_run import run_compare

    policies = "serial,concurrent,dynamic:50ms,fused" if policy is None else ",".join(policy)
    return run_compare(policies, Load(**load), num_repeats, goodput or [], output_json, engine)


@app.command()
@with_options("policy", engine=EngineConfig)
def startup(
    *,
    num_repeats: Annotated[int, typer.Option(help="processes with the kernels compiled before")] = 3,
    output_json: Output = None,
    engine: dict[str, Any],
) -> int:
    """From the start of a fresh process to its first token, by phase; first with nothing compiled."""
    from flover.cli.bench_startup import run_startup

    return run_startup(num_repeats, output_json, engine)


@app.command()
def workloads() -> int:
    """The published workloads that --dataset-name knows, with their sources."""
    from flover.cli.bench_load import print_workloads

    return print_workloads()


@app.command()
def paper(
    *,
    figure: Annotated[list[str] | None, typer.Option(help="4a, 4b, 4c, progress, 8, ...; none: all")] = None,
    output: Annotated[Path, typer.Option(help="a folder: JSON and PNG of each figure")],
    scale: Annotated[str, typer.Option(help="tiny: a CPU, two minutes; full: true sizes, a GPU")] = "tiny",
    model: Annotated[list[str] | None, typer.Option(help="gptj-6b, llama-13b, ...; none: all")] = None,
    seed: Annotated[int, typer.Option(help="of prompts, lengths and arrivals")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    draws: Annotated[int | None, typer.Option(min=1, help="of each Poisson gap (tiny 3, full 20)")] = None,
    budget: Annotated[
        float | None, typer.Option(min=0, help="seconds; what is left goes on with the same command")
    ] = None,
    outside: Annotated[
        list[str] | None, typer.Option(help="beside ours: openai:URL, transformers, transformers:batch")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="make again what is there")] = False,
    draw: Annotated[bool, typer.Option("--draw", help="only the pictures, of the JSON in the folder")] = False,
) -> int:
    """The figures of the paper, made again: its numbers, ours, and whether the claim holds."""
    from flover.cli.bench_paper import draw_paper, run_paper

    if draw:
        return draw_paper(figure or [], output)
    return run_paper(figure or [], output, scale, seed, device, model or [], draws, budget, outside or [], overwrite)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="what `flover bench paper --output` has written")],
    output: Annotated[Path | None, typer.Option(help="one HTML file, self-contained (FOLDER/report.html)")] = None,
) -> int:
    """The figures of a folder as one page: the paper's numbers beside ours, charts, tables, timelines."""
    from flover.cli.bench_report import run_report

    return run_report(folder, output)
