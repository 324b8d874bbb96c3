"""Figures random and tp: output lengths of uniform law, so that requests finish in the middle of the batch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

from flover.bench.figures import published
from flover.bench.figures.context import OURS, Bench
from flover.bench.figures.digests import Data
from flover.bench.figures.figure import Figure
from flover.bench.figures.servers import MissingError
from flover.bench.records import Job
from flover.bench.workload import Interval, Uniform

MODES = {"off": "fused:off", "move": OURS, "indirect": "fused:indirect", "paged": "fused:paged"}
GAINED, NOISE = 1.29, 1.02  # of the paper's least gains; what a gain has to be above
RULE_TP = f"Verdict: by the least gain at the most ranks; Reproduced from {GAINED} on, Partly above {NOISE}, else No."
REFERENCE = 504  # tokens of a request that serial computes at most; longer outputs are compared up to there


def draw_jobs(bench: Bench, model: str, count: int, upper: int, gap: float, repeat: int = 0) -> list[Job]:
    """The usual prompts, outputs uniform(lower, upper) of a repeat's own draw."""
    jobs = bench.jobs(model, count, upper, Interval(gap))
    lengths = Uniform(bench.scale.lower, upper).draw(count, np.random.default_rng([bench.seed, count, upper, repeat]))
    return [job._replace(num_output=int(n)) for job, n in zip(jobs, lengths)]


def measure_modes(
    bench: Bench,
    group: str,
    model: str,
    cells: Sequence[tuple[int, int]],
    modes: Sequence[str],
    instances: bool,
    ranks: int = 1,
) -> tuple[list[Data], list[Data], list[Data]]:
    """Rows of (requests, upper bound) x mode, tokens compared, gaps.

    Args:
        instances: concurrent instances too, on the largest number of requests. ranks: of a tensor-parallel group.

    Raises:
        MissingError: the model, or a first mode, cannot run.
    """
    scale = bench.scale
    most, longest = max(n for n, _ in cells), max(upper for _, upper in cells)
    bench.config(model, most, scale.num_prompt + longest)
    reference = bench.reference(model, min(longest, REFERENCE))
    single = reference["single"] * scale.num_output / min(longest, REFERENCE)  # of the request of Fig. 4
    gap = published.RANDOM_INTERVAL if scale.absolute else published.RANDOM_INTERVAL / published.POISSON_SINGLE * single
    jobs = {
        f"{n} | {upper} | {i}": draw_jobs(bench, model, n, upper, gap, i)
        for i in range(scale.repeats)
        for n, upper in cells
    }
    found: dict[str, Data] = {}
    gaps: list[Data] = []
    for mode in modes:
        system = MODES[mode] + (f":tp{ranks}" if ranks > 1 else "")
        found[mode] = bench.measure(group, model, system, jobs, reference["tokens"])
    if instances:
        top = max(published.RANDOM["v1_fig_9a_32_requests"]["upper"])
        keys = [f"{n} | {upper} | 0" for n, upper in cells if n == most and upper <= top]
        few = {key: jobs[key] for key in keys}
        try:
            found["concurrent"] = bench.measure(group, model, f"concurrent:{most}", few, reference["tokens"])
        except MissingError as error:
            gaps.append({"system": "concurrent", "why": str(error)})
    tokens = [{"mode": m, "run": key} | run["agree"] for m, runs in found.items() for key, run in runs.items()]
    weights = bench.bytes_of(model).weights
    rows = [_row(n, upper, mode, found, weights) for n, upper in cells for mode in found]
    return [row for row in rows if row], tokens, gaps


def _row(count: int, upper: int, mode: str, found: dict[str, Data], weights: float) -> Data:
    """Means over the repeats. Gains are over `off`: measured, and as the bytes or the rows of the steps predict."""
    keys = [key for key in found[mode] if key.startswith(f"{count} | {upper} |") and key in found["off"]]
    runs, base = [found[mode][key] for key in keys], [found["off"][key] for key in keys]
    if not runs:
        return {}
    row: Data = {"requests": count, "upper": upper, "mode": mode, "draws": len(runs)}
    row["seconds"] = statistics.fmean(run["seconds"] for run in runs)
    row["gain"] = statistics.fmean(b["seconds"] / run["seconds"] for b, run in zip(base, runs))
    if mode == "concurrent":
        return row

    def mean(key: str) -> float:
        return statistics.fmean(run[key] for run in runs)

    def read(run: Data) -> float:
        return float(run["steps"] * weights + run["kv_token_bytes_read"])

    row["gain_by_bytes"] = statistics.fmean(read(b) / read(run) for b, run in zip(base, runs))
    row["gain_by_rows"] = statistics.fmean(
        b["steps"] * b["rows_computed"] / (run["steps"] * run["rows_computed"]) for b, run in zip(base, runs)
    )
    row["rows_computed"], row["rows_live"], row["steps"] = mean("rows_computed"), mean("rows_live"), mean("steps")
    row["kv_moved_mb"] = mean("kv_moved_bytes") / 1e6
    row["reorder_host_ms"], row["reorder_device_ms"] = mean("reorder_host") * 1e3, mean("reorder_device") * 1e3
    row["reorder_share_%"] = 100 * (mean("reorder_host") + mean("reorder_device")) / mean("busy")
    row["reorder_device_share_%"] = 100 * mean("reorder_device") / mean("busy")
    return row


def figure_random(bench: Bench) -> Figure:
    """Reorder off, move and indirect on the same requests of random length (v1 Fig. 9a and 9b)."""
    scale, model = bench.scale, "gptj-6b"
    cells = [(count, upper) for count, uppers in scale.upper.items() for upper in uppers]
    rows, tokens, gaps = measure_modes(bench, "random", model, cells, ("off", "move", "indirect"), instances=True)
    if not any(row["mode"] == "move" for row in rows):
        raise MissingError("off and move are not measured on the same requests")
    paper: Data = {}
    a, b = published.RANDOM["v1_fig_9a_32_requests"], published.RANDOM["v1_fig_9b_16_requests"]
    for upper, off, shuffle in zip(a["upper"], a["off_s"], a["shuffle_s"]):
        paper[f"32 requests, up to {upper}: gain"] = off / shuffle
    paper |= {f"16 requests, up to {upper}: gain": gain for upper, gain in zip(b["upper"], b["gain"])}
    moved = [row for row in rows if row["mode"] == "move"]
    ours: Data = {f"{row['requests']} requests, up to {row['upper']}: gain": row["gain"] for row in moved}
    notes = [
        "gain: seconds with off over seconds with the mode, same requests; off keeps computing rows that have ended"
        " until an edge of the window frees them.",
        "gain_by_bytes: what the weights and the keys and values that the steps read predict; gain_by_rows: the gain if"
        " time were proportional to rows computed, an upper bound.",
        "reorder_share_%: planning on the host, copies of keys and values and moves of rows on host and device, over"
        " the time of all steps. The host's part mostly passes beside the device's work, so it is an upper bound of"
        " what is lost. All modes close up rows; off plans too, to find its edges.",
        f"Intervals of 20 ms{'' if scale.absolute else ', as a share of the single request'}; outputs"
        f" uniform({scale.lower}, upper), mean of {_plural('draw', scale.repeats)}.",
    ]
    return Figure(paper, ours, _random_verdict(rows), rows, tokens, notes, gaps)


def _random_verdict(rows: Sequence[Data]) -> str:
    moved = [row for row in rows if row["mode"] == "move"]
    best, worst = max(moved, key=lambda row: float(row["gain"])), min(moved, key=lambda row: float(row["gain"]))
    off = next(
        r for r in rows if r["mode"] == "off" and (r["requests"], r["upper"]) == (best["requests"], best["upper"])
    )
    noisy = any(row["gain"] > 1.05 * row["gain_by_rows"] for row in moved)
    real = min(best["gain"], best["gain_by_rows"])  # no reordering saves more than all dead rows

    def most(mode: str, share: str) -> float:
        return max((r[share] for r in rows if r["mode"] == mode), default=0.0)

    word = "Reproduced" if worst["gain"] >= 1 and real >= 1.29 else "Partly" if real > 1.02 else "No"
    return (
        f"{word}: reordering makes the run {worst['gain']:.2f} to {best['gain']:.2f} times as fast as off (paper 1.14"
        f" to 1.93); at the best, {off['rows_computed']:.1f} rows a step are computed without it and"
        f" {best['rows_computed']:.1f} with it, the bytes predict {best['gain_by_bytes']:.2f} and the rows at most"
        f" {best['gain_by_rows']:.2f}. A gain follows from what a dead row costs: on a device that is bound by weight"
        " bytes that is its keys and values only, in the paper it was also its launches."
        f" Reordering takes at most {most('move', 'reorder_share_%'):.2g} % of the time of steps with move,"
        f" {most('indirect', 'reorder_share_%'):.2g} % with indirect, of which the device"
        f" {most('move', 'reorder_device_share_%'):.2g} and {most('indirect', 'reorder_device_share_%'):.2g} %."
        + (" Gains above what the rows allow are noise: something else was busy on the machine." if noisy else "")
    )


def figure_tp(bench: Bench) -> Figure:
    """As random, under tensor parallelism (v1 Fig. 10), at the numbers of ranks that there are."""
    model, (upper, counts) = "llama-13b", bench.scale.tp
    cells = [(count, upper) for count in counts]
    rows: list[Data] = []
    tokens: list[Data] = []
    gaps: list[Data] = []
    for ranks in (1, 2, 4, 8):
        if ranks > (have := bench.most_ranks):
            kind = "CPU core" if bench.device == "cpu" else "GPU"
            gaps.append({"ranks": ranks, "why": f"this machine has {_plural(kind, have)}"})
            continue
        try:
            made, agreed, missing = measure_modes(bench, "tp", model, cells, ("off", "move"), False, ranks)
        except MissingError as error:
            gaps.append({"ranks": ranks, "why": str(error)})
            continue
        rows += [{"ranks": ranks} | row for row in made]
        tokens += [{"ranks": ranks} | row for row in agreed]
        gaps += missing
    moved = [row for row in rows if row["mode"] == "move"]
    if not moved:
        raise MissingError(gaps[0]["why"] if gaps else "off and move are not measured on the same requests")
    ours: Data = {
        f"{_plural('rank', r['ranks'])}, length {upper} by requests {r['requests']}: gain": r["gain"] for r in moved
    }
    notes = [
        RULE_TP,
        "The paper does not name the model; LLaMA 13B is used. Its two-rank runs had outputs up to 1000 tokens.",
    ]
    if bench.device == "cpu":
        notes.append("Ranks are processes that share the cores of one machine and talk through gloo.")
    return Figure(_paper_tp(), ours, _tp_verdict(moved, upper, counts), rows, tokens, notes, gaps)


def _plural(word: str, count: int) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _paper_tp() -> Data:
    paper: Data = {}
    for ranks, numbers in published.TENSOR_PARALLEL.items():
        for key, value in numbers.items():
            pairs = value.items() if isinstance(value, dict) else [("", value)]
            paper |= {
                f"{ranks} ranks, {key.replace('_', ' ')} {n}: gain".replace(" :", ":"): a / b for n, (a, b) in pairs
            }
    return paper


def _tp_verdict(moved: Sequence[Data], upper: int, counts: Sequence[int]) -> str:
    """Its first word follows RULE_TP."""
    by_ranks: dict[int, list[Data]] = {}
    for row in moved:
        by_ranks.setdefault(row["ranks"], []).append(row)

    def each(ranks: int, key: str) -> str:
        return ", ".join(f"{row[key]:.2f}" for row in by_ranks[ranks])

    gains = "; ".join(
        f"{each(n, 'gain')} on {_plural('rank', n)} (bytes predict {each(n, 'gain_by_bytes')})" for n in by_ranks
    )
    most, rows = max(by_ranks), [row["gain_by_rows"] for row in moved]
    # no reordering saves more than all dead rows; what goes beyond is noise
    real = min(min(row["gain"], row["gain_by_rows"]) for row in by_ranks[most])
    word = "Gap" if most == 1 else "Reproduced" if real >= GAINED else "Partly" if real > NOISE else "No"
    return (
        f"{word}: gains of move over off, at {', '.join(map(str, counts))} requests of up to {upper} tokens: {gains};"
        f" in the paper 1.46 to 3.30 on 2 to 8 ranks. By bytes a dead row costs its keys and values only; if it cost as"
        f" much as a live one, the gains would be {min(rows):.2f} to {max(rows):.2f}."
    )
