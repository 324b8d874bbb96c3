"""`flover generate`: prompts from the command line or a file, shown as they grow or written to a file."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flover.bench.keep import check_output
from flover.cli.display import make_display
from flover.cli.jobs import Job, OutputFile, prompt_jobs, read_jobs
from flover.llm import LLM
from flover.metrics import check_timeline_path, summary
from flover.request import RequestOutput
from flover.sampling_params import SamplingParams

MAX_TOKENS = 128  # unless the user or the checkpoint says something else


def run_generate(
    prompts: Sequence[str],
    input: Path | None,
    output: Path | None,
    timeline: Path | None,
    explain: bool,
    sampling: Mapping[str, Any],
    engine: Mapping[str, Any],
) -> int:
    """-> exit code: 1 if a request ended with an error."""
    if not prompts and input is None and not explain:
        raise ValueError("give a prompt, or --input with a file of them")
    if prompts and input is not None:
        raise ValueError("give prompts or --input, not both")
    if output is not None and input is None:
        raise ValueError("--output needs --input")
    if timeline is not None:
        check_timeline_path(timeline)
        check_output(timeline, "--timeline")
    SamplingParams(**sampling)
    jobs = read_jobs(input) if input is not None else prompt_jobs(prompts)
    with ExitStack() as stack:
        llm = stack.enter_context(LLM(record_timeline=timeline is not None, **engine))
        base = base_params(llm, sampling, MAX_TOKENS)
        if explain:
            print_settings(llm, base, sampling)
            print_startup(llm)
        prepared = [job.prepare(llm, base) for job in jobs]
        results = None if output is None else OutputFile(output, jobs)
        if results is not None:
            stack.callback(results.close)
        todo = [job for job in jobs if results is None or job.index not in results.done]
        if len(todo) < len(jobs):
            kept = f"{len(jobs) - len(todo)} of {len(jobs)} are done already, with whatever parameters they had"
            print(f"{kept}; remove {output} to run them again", file=sys.stderr)
        try:
            done = _run(llm, todo, [prepared[job.index] for job in todo], results)
        except KeyboardInterrupt:
            if results is not None:
                print(
                    f"interrupted: {len(results.done)} of {len(jobs)} are in {output}; run again to go on",
                    file=sys.stderr,
                )
            raise
        if timeline is not None and done:
            llm.timeline.save(timeline)
            print(f"timeline: {timeline}", file=sys.stderr)
        if len(jobs) > 1 and done:
            _print_summary(llm, done, sys.stdout if results is None else sys.stderr)
        return int(any(choice.error for one in done for choice in one.outputs))


def base_params(llm: LLM, sampling: Mapping[str, Any], max_tokens: int | None) -> SamplingParams:
    """The checkpoint's sampling defaults with the command line's options on top."""
    defaults = llm.get_default_sampling_params()
    values = dict(sampling)
    if defaults.max_tokens == SamplingParams().max_tokens:
        values.setdefault("max_tokens", max_tokens)
    return SamplingParams.from_dict(values, defaults)


def _run(llm: LLM, jobs: Sequence[Job], prepared: Sequence[Any], results: OutputFile | None) -> list[RequestOutput]:
    done: list[RequestOutput] = []
    arrivals = [job.arrival_step for job in jobs]
    with make_display([job.request_id for job in jobs], to_file=results is not None) as display:
        for output in llm.run(prepared, arrivals, final_only=results is not None):
            if output.finished:
                done.append(output)
                if results is not None:
                    results.write(output)
            display.show(output)
    for output in done:
        for choice in output.outputs:
            if choice.error:
                print(f"flover: error: request {output.request_id}: {choice.error}", file=sys.stderr)
    return done


def _print_summary(llm: LLM, done: Sequence[RequestOutput], file: Any) -> None:
    s, engine = summary(done), llm.engine
    rows = engine.num_row_steps / max(engine.num_steps, 1)
    print(
        f"{s.num_requests} requests, {s.num_prompt_tokens} prompt tokens, {s.num_output_tokens} output tokens in"
        f" {s.duration:.2f} s: {s.tokens_per_second:.0f} tokens/s; {engine.num_steps} steps of {rows:.1f} rows on"
        f" average; TTFT {s.ttft.median * 1e3:.0f} ms, TPOT {s.tpot.median * 1e3:.1f} ms (medians)",
        file=file,
        flush=True,
    )


def print_startup(llm: LLM) -> None:
    """--explain: the memory plan, and what the start took."""
    console, times = Console(stderr=True, highlight=False, soft_wrap=True), llm.startup_times
    console.print(f"memory: {llm.engine.core.resolved.memory}")
    table = Table("start-up", "seconds", "", box=None, pad_edge=False)
    for name, seconds, amount in (*times.table(), ("total", times.total, "")):
        table.add_row(name, f"{seconds:.2f}", amount)
    console.print(table)


def print_settings(llm: LLM, params: SamplingParams, given: Mapping[str, Any]) -> None:
    """--explain: every effective setting, where it comes from and why; to stderr, as it is no result."""
    table = Table("setting", "value", "origin", "reason", box=None, pad_edge=False)
    for setting in llm.explain():
        table.add_row(setting.name, str(setting.value), setting.origin, setting.reason)
    table.add_section()
    defaults, usual = llm.get_default_sampling_params(), SamplingParams()
    for field in fields(params):
        value = getattr(params, field.name)
        origin, reason = "default", ""
        if field.name in given:
            origin = "given"
        elif getattr(defaults, field.name) != getattr(usual, field.name):
            origin, reason = "checkpoint", "generation_config.json"
        elif value != getattr(usual, field.name):
            reason = "of the command line"
        if field.name != "seed":
            table.add_row(field.name, str(value), origin, reason)
    Console(stderr=True, highlight=False, soft_wrap=True).print(table)
