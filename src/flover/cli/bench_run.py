"""`flover bench throughput | latency | compare`: run systems on jobs, print what came out, keep it as JSON.

Every system serves the same jobs; repeat r takes the seed + r. Nothing is written before the end, and then whole.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from flover.bench.keep import check_output, provenance, write_json
from flover.bench.records import Job, Record, Run, Watch
from flover.bench.results import (
    Estimate,
    Numbers,
    block,
    estimates_json,
    measure,
    over_repeats,
    parse_goals,
    percentile,
    run_json,
)
from flover.bench.systems import check_name, make_system, same_tokens, split_names
from flover.cli.bench import Load
from flover.cli.bench_load import Source, make_source
from flover.config import EngineConfig
from flover.engine.engine import survey

PERCENTAGES = (10, 25, 50, 75, 90, 99)
REFERENCE = "serial"
COLUMNS = {
    "duration": "seconds",
    "output_throughput": "tok/s",
    "mean_ttft_ms": "mean TTFT",
    "p99_ttft_ms": "p99 TTFT",
    "mean_tpot_ms": "mean TPOT",
    "mean_e2el_ms": "mean E2E",
}


class Bench:
    """A workload for this model and machine, and what a benchmark of it is kept with."""

    def __init__(self, load: Load, output: Path | None, options: Mapping[str, Any], **settings: Any) -> None:
        check_output(output, "--output-json")
        if load.dataset_name == "custom":
            raise ValueError("--dataset-name custom is for bench serve: here a trace of prompt_token_ids works")
        self.config = EngineConfig(**options)
        _, model, hardware, _ = survey(self.config)
        limit = self.config.max_model_len or model.max_position_embeddings
        self.source: Source = make_source(load, model.vocab_size, limit)
        self.seed, self.output, self._device = self.config.seed, output, hardware.device
        self._settings = {**settings, "workload": asdict(load), "engine": asdict(self.config)}

    def jobs(self, repeats: int) -> list[list[Job]]:
        """Of each repeat; every mistake shows before a model is loaded."""
        if repeats < 1:
            raise ValueError(f"--num-repeats must be at least 1, got {repeats}")
        return [self.source.jobs(self.seed + repeat) for repeat in range(repeats)]

    def print_workload(self) -> None:
        shrunk = self.source.num_shrunk(self.seed)
        note = f"; {shrunk} shortened to max_model_len={self.source.max_model_len}" if shrunk else ""
        print(f"workload: {self.source.text}, seed {self.seed}{note}", flush=True)

    def save(self, results: Mapping[str, Any]) -> None:
        """The JSON twin, if one is wanted."""
        if self.output is None:
            return
        head = {"environment": provenance(self._device), "workload": self.source.text, "seed": self.seed}
        write_json(self.output, {**head, "settings": self._settings, **results})
        print(f"written: {self.output}", file=sys.stderr)

    def run(self, policy: str, repeats: Sequence[Sequence[Job]], warm_ups: int = 1) -> list[Run]:
        """Load a system, warm it up, serve every repeat, close it."""
        system = make_system(policy, self.config)
        try:
            for i in range(warm_ups):
                system.run(self.source.warm_up(self.seed + i))
            runs = []
            for i, jobs in enumerate(repeats):
                title = policy if len(repeats) == 1 else f"{policy} {i + 1}/{len(repeats)}"
                with bar(title, jobs) as watch:
                    runs.append(system.run(jobs, watch))
            return runs
        finally:
            system.close()


class _Bar(Progress):
    """Looks at the records whenever it is drawn: a run that is timed does nothing for it."""

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            done, tokens = tally(task.fields["jobs"], task.fields["records"])
            self.update(task.id, completed=tokens, done=f"{done}/{len(task.fields['jobs'])}")
        return super().get_renderables()


def tally(jobs: Sequence[Job], records: Sequence[Record]) -> tuple[int, int]:
    """Requests that have ended and tokens so far, of an ended request all that it was to have."""
    ended = [
        record.error is not None or record.ended is not None or len(record.times) >= job.num_output
        for job, record in zip(jobs, records)
    ]
    tokens = [job.num_output if end else len(r.times) for job, r, end in zip(jobs, records, ended)]
    return sum(ended), sum(tokens)


@contextmanager
def bar(title: str, jobs: Sequence[Job]) -> Iterator[Watch]:
    """A progress bar on stderr, if that is a terminal; -> what watches the records of the run."""
    console = Console(stderr=True)
    counts = TextColumn("{task.fields[done]} requests, {task.completed}/{task.total} tokens")
    columns = (TextColumn("{task.description}"), BarColumn(), counts, TimeElapsedColumn())
    with _Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        total = sum(job.num_output for job in jobs)
        yield lambda records: progress.add_task(title, total=total, jobs=jobs, records=records)


def run_throughput(
    policy: str, load: Load, repeats: int, goodput: Sequence[str], output: Path | None, options: Mapping[str, Any]
) -> int:
    """-> 1 if a request failed."""
    check_name(policy)
    goals = parse_goals(goodput)
    bench = Bench(load, output, options, policy=policy, goodput=goals, num_repeats=repeats)
    jobs = bench.jobs(repeats)
    bench.print_workload()
    runs = bench.run(policy, jobs)
    numbers = [measure(run, goals) for run in runs]
    found = over_repeats(numbers)
    print(block(found))
    bench.save({"results": estimates_json(found), "runs": _runs_json(bench, runs, numbers)})
    return _failures(runs)


def run_latency(
    policy: str, load: Load, iters: int, warm_ups: int, output: Path | None, options: Mapping[str, Any]
) -> int:
    """-> 1 if a request failed."""
    check_name(policy)
    if iters < 1 or warm_ups < 0:
        raise ValueError(f"--num-iters must be at least 1, --num-iters-warmup at least 0, got {iters}, {warm_ups}")
    bench = Bench(load, output, options, policy=policy, num_iters=iters, num_iters_warmup=warm_ups)
    jobs = bench.jobs(iters)
    bench.print_workload()
    runs = bench.run(policy, jobs, warm_ups)
    latencies = [run.duration for run in runs]
    numbers = [measure(run) for run in runs]
    found = over_repeats(numbers)
    mean = Estimate.of(latencies)
    print(f"Avg latency: {mean.mean:.6f} seconds" + mean.margin)
    percentiles = {p: percentile(latencies, p) for p in PERCENTAGES}
    for percent, seconds in percentiles.items():
        print(f"{percent}% percentile latency: {seconds:.6f} seconds")
    print(block(found, "Mean of the batches"))
    summary = {"avg_latency": mean.mean, "latencies": latencies, "percentiles": percentiles}
    bench.save({**summary, "results": estimates_json(found), "runs": _runs_json(bench, runs, numbers)})
    return _failures(runs)


def run_compare(
    policies: str, load: Load, repeats: int, goodput: Sequence[str], output: Path | None, options: Mapping[str, Any]
) -> int:
    """The first policy is what ratios are of; -> 1 if a request failed."""
    names = split_names(policies)
    if not names:
        raise ValueError(f"--policy names nothing to compare, got {policies!r}")
    for name in names:
        check_name(name)
    goals = parse_goals(goodput)
    bench = Bench(load, output, options, policies=names, goodput=goals, num_repeats=repeats)
    jobs = bench.jobs(repeats)
    bench.print_workload()
    runs: dict[str, list[Run]] = {}
    gaps: dict[str, str] = {}
    for name in names:
        try:
            runs[name] = bench.run(name, jobs)
        except ValueError as error:  # absent, or it does not fit: what the others did is kept
            gaps[name] = str(error)
    if not runs:
        raise ValueError(next(iter(gaps.values())))
    numbers = {name: [measure(run, goals) for run in each] for name, each in runs.items()}
    found = {name: over_repeats(each) for name, each in numbers.items()}
    same = _same(runs)
    _print_comparison(names, found, same, gaps)
    kept = {
        name: {
            "same_tokens_as_serial": same.get(name),
            "results": estimates_json(found[name]),
            "runs": _runs_json(bench, each, numbers[name]),
        }
        for name, each in runs.items()
    }
    bench.save({"systems": kept, "missing": gaps})
    return _failures([run for each in runs.values() for run in each])


def _same(runs: Mapping[str, Sequence[Run]]) -> dict[str, float]:
    """Share of requests with the tokens of serial, by system, if serial ran."""
    reference = runs.get(REFERENCE)
    if reference is None:
        return {}
    return {
        name: statistics.fmean(same_tokens(ours, theirs)[0] for ours, theirs in zip(each, reference))
        for name, each in runs.items()
        if name != REFERENCE
    }


def _print_comparison(
    names: Sequence[str],
    found: Mapping[str, Mapping[str, Estimate]],
    same: Mapping[str, float],
    gaps: Mapping[str, str],
) -> None:
    """A row for each system; milliseconds."""
    ran = [name for name in names if name in found]
    goal = {"request_goodput": "goodput"} if any("request_goodput" in each for each in found.values()) else {}
    columns = {**COLUMNS, **goal}
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    table.add_column("system", no_wrap=True)
    for column in (*columns.values(), "failed", *([f"x {ran[0]}"] if ran else []), *(["same tokens"] if same else [])):
        table.add_column(column, justify="right", no_wrap=True)
    for name in ran:
        each = found[name]
        cells = [_cell(each[key]) for key in columns] + [f"{each['failed'].mean:.0f}"]
        cells.append(f"{each['output_throughput'].mean / max(found[ran[0]]['output_throughput'].mean, 1e-9):.2f}")
        table.add_row(name, *cells, *([f"{same[name]:.1%}" if name in same else ""] if same else []))
    console = Console(highlight=False, markup=False)
    console.width = max(console.width, 40 + 16 * len(table.columns))  # rows stay whole: a pipe is no 80 columns
    console.print(table)
    for name, reason in gaps.items():
        print(f"{name}: not measured: {reason}")
    if not all(each["mean_tpot_ms"].mean for each in found.values()):
        print("TPOT 0: no gap between tokens, as in a batch that leaves together")
    print("TTFT, TPOT, E2E in ms; x: ratio of tokens a second; ±: half of a 95 % confidence interval over repeats")


def _cell(value: Estimate) -> str:
    text = f"{value.mean:.4g}" if value.mean < 1e4 else f"{value.mean:.0f}"
    return text + value.margin


def _runs_json(bench: Bench, runs: Sequence[Run], numbers: Sequence[Numbers]) -> list[dict[str, Any]]:
    return [run_json(run, each, bench.seed + i) for i, (run, each) in enumerate(zip(runs, numbers))]


def _failures(runs: Sequence[Run]) -> int:
    """Say why requests failed, each reason once; -> 1 if any did."""
    errors = dict.fromkeys(f"{run.system}: {r.error}" for run in runs for r in run.records if r.error)
    for error in errors:
        print(f"flover: error: a request failed: {error}", file=sys.stderr)
    return int(bool(errors))
