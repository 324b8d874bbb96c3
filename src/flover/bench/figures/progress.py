"""Figure progress: tokens and finished requests over time, fused and request-level batching (HiPC, progress.png)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from flover.bench.figures import published
from flover.bench.figures.context import Bench
from flover.bench.figures.digests import Data, curves_of
from flover.bench.figures.figure import Figure, grade
from flover.bench.figures.headline import cells, measure_cells
from flover.bench.figures.servers import MissingError
from flover.bench.figures.theory import queue_ends
from flover.bench.systems import OUTSIDE

WINDOWS = (0.05, *published.PROGRESS["windows_s"])


def figure_progress(bench: Bench) -> Figure:
    """Tokens and finished requests over time, fused against request-level batching (HiPC, progress.png; 13B)."""
    model, scale = "llama-13b", bench.scale
    if not bench.has(model):
        raise MissingError(f"{model} was not asked for")
    count = bench.most
    bench.config(model, count, scale.limit)
    reference = bench.reference(model, scale.num_output)
    theirs = published.FIG_4A[model].single
    single: float = reference["single"]
    stretch = single / theirs
    cell, jobs = next(iter(cells(bench, model, single, "fused").items()))  # that of figure 4
    windows = {f"dynamic {_seconds(w)}": f"dynamic:{w * stretch * 1e3:.3f}ms" for w in WINDOWS}
    rows: list[Data] = []
    tokens: list[Data] = []
    gaps: list[Data] = []
    curves: Data = {}
    for label in ("fused", *windows, "concurrent", *bench.outside):
        try:
            if label in windows:
                found = bench.measure(
                    "progress", model, windows[label], {cell: jobs}, reference["tokens"], curves_of, label
                )
            else:
                found = measure_cells(bench, model, label, reference, only=cell)
        except MissingError as error:
            gaps.append({"system": label, "why": str(error)})
            continue
        for run in found.values():
            if label not in bench.outside:
                tokens.append({"system": label} | run["agree"])
            curves[label] = {"tokens": run["curve_tokens"], "finished": run["curve_finished"]}
            rows.append(_progress_row(label, run, single))
    ends = queue_ends([job.arrival for job in jobs], reference["service"])
    latency = statistics.fmean(end - job.arrival for end, job in zip(ends, jobs)) / single
    rows.append({"system": "serial", "end_x": ends[-1] / single, "half_x": ends[count // 2 - 1] / single})
    rows[-1] |= {"first_x": ends[0] / single, "latency_x": latency}
    by_name = {row["system"]: row for row in rows}
    paper = {"fused ends": published.PROGRESS["flover_ends_s"] / theirs}
    paper["dynamic 16 s ends"] = published.PROGRESS["dynamic_16s_ends_s"] / theirs
    ours = {f"{name} ends": by_name[name]["end_x"] for name in ("fused", "dynamic 16 s") if name in by_name}
    notes = [
        "Times are in single-request times, here and in the paper; the windows are the paper's seconds, stretched by"
        f" the ratio of the single-request times, {stretch:.3g}.",
        "A batch that holds all requests does not wait for its window to end, so windows longer than the arrivals are"
        " alike; at tiny scale those of 4, 8 and 16 s differ by noise only.",
        "The paper's windows of 2 to 16 s are far from Triton's shipped setting of 50 ms.",
        "In the paper the concurrent instances had done 13 % of the work after 37 s.",
    ]
    return Figure(paper, ours, _progress_verdict(rows), rows, tokens, notes, gaps, {"curves": curves, "single": single})


def _seconds(value: float) -> str:
    return f"{value:g} s" if value >= 1 else f"{value * 1e3:g} ms"


def _progress_row(label: str, run: Data, single: float) -> Data:
    finished = run["curve_finished"]
    return {
        "system": label,
        "end_x": run["seconds"] / single,
        "half_x": finished[len(finished) // 2][0] / single,
        "first_x": finished[1][0] / single,
        "latency_x": run["latency"] / single,
    }


def _progress_verdict(rows: Sequence[Data]) -> str:
    fused = next((row for row in rows if row["system"] == "fused"), None)
    others = [row for row in rows if row["system"] != "fused" and not row["system"].startswith(OUTSIDE)]
    if fused is None or len(others) < 2:
        return "Gap: fused, or what it is compared with, could not run here."
    best, last = min(others, key=lambda row: float(row["end_x"])), max(others, key=lambda row: float(row["end_x"]))
    soonest = min(others, key=lambda row: float(row["half_x"]))
    word = grade(fused["end_x"] <= best["end_x"], fused["half_x"] <= soonest["half_x"])
    return (
        f"{word}: half of the requests are back after {fused['half_x']:.2f} single-request times with fused, after"
        f" {soonest['half_x']:.2f} with the best other ({soonest['system']}); all after {fused['end_x']:.2f} against"
        f" {best['end_x']:.2f} ({best['system']}) to {last['end_x']:.2f} ({last['system']}): a window delays what"
        " arrived first, and its batch returns together."
    )
