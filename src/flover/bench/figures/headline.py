"""Figures 4a, 4b and 4c: 1 to 32 requests at a fixed interval; makespan, throughput, latency (HiPC Fig. 4).

All three are views of one set of runs. Serial at an interval is a queue with one server, computed from the service
times of one measured run: nothing else about it depends on when requests arrive.
"""

from __future__ import annotations

from typing import Any

from flover.bench.figures import published
from flover.bench.figures.context import OURS, Bench
from flover.bench.figures.digests import Data, curves_of
from flover.bench.figures.figure import Figure
from flover.bench.figures.scale import Gap
from flover.bench.figures.servers import MissingError
from flover.bench.figures.theory import arrival_bound, queue_ends, simulate
from flover.bench.records import Job, Run
from flover.bench.workload import Interval


def gaps_of(bench: Bench, model: str) -> list[Gap]:
    """The paper's 500 ms as a share of its single-request time comes first: it is what the verdicts are about."""
    single = published.FIG_4A[model].single
    share = round(published.INTERVAL / single, 3)
    gaps = [Gap(f"{share} of single", share=share), Gap("0")]
    short = Gap(f"{0.02 / single:.4f} of single", share=0.02 / single)
    return [*gaps, Gap("20 ms", 0.02), Gap("500 ms", published.INTERVAL)] if bench.scale.absolute else [*gaps, short]


def runs(bench: Bench) -> tuple[list[Data], list[Data], list[Data]]:
    """Rows of model x interval x requests, of tokens compared, and of what could not run."""
    rows: list[Data] = []
    tokens: list[Data] = []
    gaps: list[Data] = []
    for model in bench.has(*published.FIG_4A):
        try:
            rows += _model_rows(bench, model, tokens, gaps)
        except MissingError as error:
            gaps.append({"model": model, "what": "all systems", "why": str(error)})
    missing = [model for model in published.FIG_4A if model not in bench.scale.shapes]
    gaps += [{"model": model, "what": "all systems", "why": "not of this scale"} for model in missing]
    return rows, tokens, gaps


# requests, beside the most; processes: those only, at the scaled interval
FEW: dict[str, tuple[int, ...]] = {
    "fused": (8, 2, 4, 16, 1),
    "dynamic:50ms": (8,),
    "concurrent": (8, 2, 4, 1, 16),
    "processes": (),
}
NEAR = 0.9  # of what the arrivals allow
RULE_4A = (
    "Verdict: Reproduced if every model reaches the paper's ratio over concurrent instances; Partly if one does, or if"
    f" all reach {NEAR:.0%} of what the arrivals allow over serial; else No."
)
BASELINES = ("serial", "concurrent")  # x_over_best is over the better of them


def cells(bench: Bench, model: str, single: float, label: str) -> dict[str, list[Job]]:
    """Workloads of a system, the most important first: the scaled interval, 0, fewer requests, 20 and 500 ms."""
    main, *others = gaps_of(bench, model)
    if label == "processes":
        others = []
    elif label not in FEW:  # an outside system
        others = others[:1]
    late = [gap for gap in others if gap.label in ("20 ms", "500 ms")]
    few = [(main, n) for n in FEW.get(label, ()) if n in bench.scale.requests and n < bench.most]
    order = [(main, bench.most), *((gap, bench.most) for gap in others if gap not in late)]
    later = [(gap, bench.most) for gap in late]
    order += [*later, *few] if label == "fused" else [*few, *later]
    return {
        f"{gap.label} | {n}": bench.jobs(model, n, bench.scale.num_output, Interval(gap.of(single))) for gap, n in order
    }


def systems_of(bench: Bench) -> list[str]:
    """Labels of the systems of these figures, cheap ones first."""
    return [*(label for label in FEW if label != "processes" or bench.scale.processes), *bench.outside]


def measure_cells(bench: Bench, model: str, label: str, reference: Data, only: str = "") -> Data:
    """Those of a system, or one of them. Raises MissingError."""
    single: float = reference["single"]
    delay = 0.05 if bench.scale.absolute else 0.05 / published.FIG_4A[model].single * single
    names = {"fused": OURS, "concurrent": f"concurrent:{bench.most}", "dynamic:50ms": f"dynamic:{delay * 1e3:.3f}ms"}
    names |= {"processes": "concurrent-processes"} | {name: name for name in bench.outside}
    rows = bench.scale.processes if label == "processes" else bench.most
    jobs = cells(bench, model, single, label)
    if only:
        jobs = {only: jobs[only]}

    def extra(run: Run) -> Data:
        return curves_of(run) | {"system": run.system}

    tokens = [] if label in bench.outside else reference["tokens"]  # other weights, other tokens
    return bench.measure("headline", model, names[label], jobs, tokens, extra, label, rows)


def _model_rows(bench: Bench, model: str, tokens: list[Data], missing: list[Data]) -> list[Data]:
    scale = bench.scale
    bench.config(model, bench.most, scale.limit)  # what does not fit is said before anything is loaded
    reference = bench.reference(model, scale.num_output)
    single: float = reference["single"]
    measured: dict[str, Data] = {}
    for label in systems_of(bench):
        try:
            measured[label] = measure_cells(bench, model, label, reference)
        except MissingError as error:
            missing.append({"model": model, "what": label, "why": str(error)})
            continue
        if label not in bench.outside:
            tokens += [{"model": model, "system": label, "run": k} | v["agree"] for k, v in measured[label].items()]
    return [
        row_of(bench, model, gap, jobs, {s: runs.get(cell) for s, runs in measured.items()}, reference)
        for gap in gaps_of(bench, model)
        for cell, jobs in sorted(cells(bench, model, single, "fused").items(), key=lambda item: len(item[1]))
        if cell.startswith(f"{gap.label} |")
    ]


def row_of(bench: Bench, model: str, gap: Gap, jobs: list[Job], measured: Data, reference: Data) -> Data:
    """One line of the table; `x` is short for "times as fast as"."""
    single: float = reference["single"]
    arrivals, service = [job.arrival for job in jobs], reference["service"][: len(jobs)]
    ends = queue_ends(arrivals, service)
    num_tokens = sum(job.num_output for job in jobs)
    row: Data = {"model": model, "interval": gap.label, "requests": len(jobs), "single_s": single, "serial_s": ends[-1]}
    for system in (*FEW, *bench.outside):
        run = measured.get(system)
        row[f"{system}_s"] = run and run["seconds"]
        row[f"{system}_tokens_per_s"] = run and num_tokens / run["seconds"]
        row[f"{system}_latency_x"] = run and run["latency"] / single
    row["serial_tokens_per_s"] = num_tokens / ends[-1]
    row["serial_latency_x"] = sum(end - at for end, at in zip(ends, arrivals)) / len(jobs) / single
    share, size = gap.of(single) / single, bench.bytes_of(model)
    alone = size.request(len(jobs[0].prompt), jobs[0].num_output)
    ideal = simulate(
        [job._replace(arrival=job.arrival / single * alone) for job in jobs], lambda _, held: size.step(held)
    )
    row["bound_bytes"] = max(len(jobs), (len(jobs) - 1) * share + 1) * alone / ideal.seconds
    row["bound_arrivals"] = arrival_bound(len(jobs), share)
    row["latency_bound_x"] = ideal.latency / alone
    known = [name for name in BASELINES if row[f"{name}_s"]]
    row["best_of"] = ", ".join(known)
    row["processes"] = (measured.get("processes") or {}).get("system", "").rpartition(":")[2] or None
    if row["fused_s"]:
        best = min(row[f"{name}_s"] for name in known)
        row["x_over_best"] = best / row["fused_s"]
        row["x_over_concurrent"] = row["concurrent_s"] and row["concurrent_s"] / row["fused_s"]
        row["x_over_dynamic"] = row["dynamic:50ms_s"] and row["dynamic:50ms_s"] / row["fused_s"]
        for name in ("processes", *bench.outside):
            row[f"x_over_{name}"] = row[f"{name}_s"] and row[f"{name}_s"] / row["fused_s"]
        row["share_of_bound"] = row["x_over_best"] / row["bound_bytes"]
    return row


def main_rows(rows: list[Data], most: int = 0) -> list[Data]:
    """At the scaled interval; at that many requests, if given."""
    return [r for r in rows if r["interval"].endswith("single") and not _short(r) and most in (0, r["requests"])]


def _short(row: Data) -> bool:
    return float(row["interval"].split()[0]) < 0.01


def paper_at(values: Any, requests: int, counts: tuple[int, ...] = published.REQUESTS) -> float | None:
    return values[counts.index(requests)] if requests in counts else None


def figure_4a(bench: Bench) -> Figure:
    """Seconds from the first arrival to the last token."""
    rows, tokens, gaps = runs(bench)
    most = bench.most
    last = [r for r in main_rows(rows, most) if r["fused_s"]]
    paper: Data = {}
    ours: Data = {}
    for model, numbers in published.FIG_4A.items():
        paper[f"{model}, {most} requests, x over concurrent"] = paper_at(numbers.speedup, most)
    for row in last:
        if row["concurrent_s"]:
            ours[f"{row['model']}, {most} requests, x over concurrent"] = row["x_over_concurrent"]
        ours[f"{row['model']}, {most} requests, x over serial"] = over_serial(row)
        ours[f"{row['model']}, {most} requests, x over serial that the arrivals allow"] = row["bound_arrivals"]
    notes = [
        RULE_4A,
        "x over concurrent is the paper's speed-up; its FasterTransformer instances took 231 s (GPT-J) and 454 s (65B)"
        " where 32 requests one after the other need 179 s and 346 s.",
        "bound_arrivals = max(N, (N - 1) i + 1) / ((N - 1) i + 1) for an interval of i single-request times: that of"
        " any batcher over serial. bound_bytes also counts the bytes that each step must read.",
        "The release's 65B has an intermediate size of 11008, here it has its true 22016.",
        "serial_s is computed from the measured service times, as a queue with one server; where serial ran fewer"
        " requests than a row has (33B, 65B), the others take the median: all are of one length.",
        "best_of: what x_over_best is over; concurrent instances are not measured in every cell. processes: how many,"
        " each with weights of its own, as many as fit up to 8; on a GPU they take turns.",
    ]
    shown = ("_latency_x", "_per_s", "latency_bound_x")
    table = [{k: v for k, v in row.items() if not k.endswith(shown)} for row in rows]
    return Figure(paper, ours, _verdict_4a(last), table, tokens, notes, gaps)


def _over_baselines(row: Data) -> str:
    """How many times as fast as each baseline, with what the arrivals allow and the paper has."""
    theirs = paper_at(published.FIG_4A[row["model"]].speedup, row["requests"])
    beyond = "" if theirs is None else f" (paper {theirs}x)"
    x, bound, other = over_serial(row), row["bound_arrivals"], row["x_over_concurrent"]
    better = ", the better baseline"
    first = f"{x:.1f}x over serial" + (better if other and other > x else "")
    first += f" ({x / bound:.0%} of the {bound:.1f}x that arrivals allow)"
    if not other:
        return f"{first}, concurrent not measured{beyond}"
    return f"{first}, {other:.1f}x over concurrent{better if other <= x else ''}{beyond}"


def over_serial(row: Data) -> float:
    """Times as fast as one request after the other."""
    return float(row["serial_s"] / row["fused_s"])


def _verdict_4a(last: list[Data]) -> str:
    """Its first word follows RULE_4A."""
    if not last:
        return "Gap: no model could run here."
    reached, here, there = [], [], []
    for row in last:
        numbers, got = published.FIG_4A[row["model"]], row["x_over_concurrent"]
        theirs, seconds = (paper_at(values, row["requests"]) for values in (numbers.speedup, numbers.seconds))
        reached.append(bool(got and theirs and got >= theirs))
        if got and theirs and seconds:
            here.append(f"{row['serial_s'] / row['concurrent_s']:.2f}")
            there.append(f"{row['requests'] * numbers.single / (seconds * theirs):.2f}")
    near = [over_serial(row) >= NEAR * row["bound_arrivals"] for row in last]
    parts = "; ".join(f"{row['model']} {_over_baselines(row)}" for row in last)
    pace = (
        f" Concurrent instances are {', '.join(here)} times as fast as serial here and were {', '.join(there)} times in"
        " the paper: the faster they are, the less can be gained over them."
    )
    rest = " What is missing to the arrivals' bound is time that each more row adds to a step."
    word, requests = _grade(reached, near), last[0]["requests"]
    return f"{word}: at {requests} requests {parts}.{pace if here else ''}{'' if all(near) else rest}"


def _grade(good: list[bool], half: list[bool]) -> str:
    return "Reproduced" if all(good) else "Partly" if any(good) or all(half) else "No"


def figure_4b(bench: Bench) -> Figure:
    """Output tokens per second."""
    rows, tokens, gaps = runs(bench)
    most, few = bench.most, min(bench.scale.requests)
    paper: Data = {}
    ours: Data = {}
    grows = []
    for row in main_rows(rows, most):
        first = next(r for r in main_rows(rows, few) if r["model"] == row["model"])
        if row["fused_s"] and first["fused_s"]:
            name = f"{row['model']}, tokens/s at {most} requests over tokens/s at 1"
            numbers = published.FIG_4A[row["model"]]
            at = paper_at(numbers.seconds, most)
            paper[name] = at and most * numbers.single / at
            ours[name] = row["fused_tokens_per_s"] / first["fused_tokens_per_s"]
            grows.append(ours[name] / (paper[name] or 1))
    word = _grade([share >= 0.9 for share in grows], [share >= 0.5 for share in grows])
    list_ = ", ".join(f"{name.split(',')[0]} {ours[name]:.1f}x (paper {paper[name]:.1f}x)" for name in ours)
    why = "it grows with the requests in flight, which the arrivals decide, less what each more row adds to a step"
    verdict = f"{word}: tokens/s from 1 to {most} requests: {list_}; {why}." if ours else "Gap: nothing could run."
    keep = [
        {k: v for k, v in r.items() if k in ("model", "interval", "requests") or k.endswith("_per_s")} for r in rows
    ]
    note = "The paper's curves end at about 770, 655, 540 and 605 tokens/s on its own, unnamed Ampere GPUs."
    return Figure(paper, ours, verdict, keep, tokens, [note], gaps)


def figure_4c(bench: Bench) -> Figure:
    """Mean latency over the latency of a request that has the machine to itself."""
    rows, tokens, gaps = runs(bench)
    paper: Data = {}
    ours: Data = {}
    for row in main_rows(rows):
        theirs = paper_at(published.FIG_4C[row["model"]], row["requests"], (8, 16, 32))
        name = f"{row['model']}, {row['requests']} requests"
        if theirs is not None and row["fused_s"]:
            paper[name], ours[name] = theirs, row["fused_latency_x"]
    list_ = ", ".join(f"{name} {ours[name]:.2f} (paper {paper[name]:.2f})" for name in ours)
    word = _grade([ours[name] <= max(1.15, paper[name]) for name in ours], [value <= 2 for value in ours.values()])
    bound = max((row["latency_bound_x"] for row in main_rows(rows)), default=1.0)
    why = f"the bytes of the steps allow {bound:.2f} at worst; the rest is time that a row adds on this device"
    verdict = f"{word}: mean latency over a single request's is {list_}; {why}." if ours else "Gap: nothing could run."
    keep = [{k: v for k, v in r.items() if k in ("model", "interval", "requests") or "latency" in k} for r in rows]
    note = "latency_bound_x: what the bytes of the fused steps allow. Serial and dynamic wait for others to finish."
    return Figure(paper, ours, verdict, keep, tokens, [note], gaps)
