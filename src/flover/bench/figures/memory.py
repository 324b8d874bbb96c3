"""Figure memory: live, reserved and released KV bytes over time, by layout of the cache."""

from __future__ import annotations

from flover.bench.figures import published
from flover.bench.figures.context import Bench
from flover.bench.figures.digests import Data
from flover.bench.figures.figure import Figure, grade
from flover.bench.figures.lengths import MODES, draw_jobs
from flover.bench.figures.servers import MissingError
from flover.bench.records import Run
from flover.config import DTYPE_BYTES
from flover.metrics import Timeline
from flover.model_config import ModelConfig

POINTS = 300  # of a curve


def figure_memory(bench: Bench) -> Figure:
    """Live, reserved and released KV bytes over time: slab, paged, and a buffer that keeps everything."""
    scale, model = bench.scale, "llama-13b"
    count, rows_at_most, upper = 32, 16, scale.limit
    token_bytes = ModelConfig.from_dict(scale.shapes[model]).kv_elements_per_token * DTYPE_BYTES[scale.dtype]
    slot = (upper + scale.num_prompt) * token_bytes

    def with_timeline(run: Run) -> Data:
        Timeline(run.steps).to_json(bench.folder / "memory-timeline.json")  # rows over steps, for the report
        return kv_curve(run)

    bench.config(model, rows_at_most, upper + scale.num_prompt)
    reference = bench.reference(model, scale.num_output)
    gap = published.INTERVAL / published.FIG_4A[model].single * reference["single"]
    jobs = draw_jobs(bench, model, count, upper, gap)
    cells = {
        mode: bench.measure(
            *("memory", model, name, {"": jobs}, reference["tokens"]),
            extra=with_timeline if mode == "move" else kv_curve,
            rows=rows_at_most,
            record=mode == "move",
        )
        for mode, name in MODES.items()
    }
    if not all(cells.values()):
        raise MissingError(f"not measured: {', '.join(mode for mode, cell in cells.items() if not cell)}")
    runs = {mode: cell[""] for mode, cell in cells.items()}
    keep = float(count * slot)
    table = [_memory_row(name, run, slot * rows_at_most) for name, run in runs.items()]
    end = max(run["seconds"] for run in runs.values())
    live = table[1]["live_mean_mb"]
    table.append({"mode": "keep everything", "live_mean_mb": live, "reserved_mean_mb": keep / 1e6})
    table[-1] |= {"reserved_peak_mb": keep / 1e6, "released_mean_mb": 0.0, "live_share": live * 1e6 / keep}
    by_mode = {row["mode"]: row for row in table}
    ours = {
        f"{mode}: mean reserved over keep everything": r["reserved_mean_mb"] * 1e6 / keep for mode, r in by_mode.items()
    }
    given = {mode: run["curve"][-1][2] < run["reserved_peak"] for mode, run in runs.items() if mode != "off"}
    verdict = (
        f"{grade(*given.values())}: finished requests give memory back with"
        f" {', '.join(mode for mode in given if given[mode]) or 'no layout'}."
        f" Of what a slot for each of {count} requests takes, move holds"
        f" {ours['move: mean reserved over keep everything']:.0%} on average, indirect"
        f" {ours['indirect: mean reserved over keep everything']:.0%}, off (every slot of {rows_at_most} rows)"
        f" {ours['off: mean reserved over keep everything']:.0%}, paged blocks"
        f" {ours['paged: mean reserved over keep everything']:.0%}; a slab reserves whole slots, paged what is live."
        " The paper gives no number for memory saved, and its release returns none."
    )
    notes = [
        f"{count} requests, outputs uniform({scale.lower}, {upper}), {rows_at_most} rows; the same trace for all.",
        "live: tokens that rows hold; in off also those of rows that have ended and are still in the window.",
        "reserved: slots backed by memory, or blocks in use; the pool that paged blocks come from stays allocated.",
        "keep everything: a slot of full length for each request of the run, as in the paper's release (computed).",
        published.MEMORY["note"],
    ]
    curves = {mode: run["curve"] for mode, run in runs.items()}
    plot: Data = {"curves": curves, "keep": keep, "end": end}
    return Figure({}, ours, verdict, table, [{"mode": m} | r["agree"] for m, r in runs.items()], notes, plot=plot)


def kv_curve(run: Run) -> Data:
    """At most `POINTS` of [seconds, live bytes, reserved bytes], and means over time."""
    steps = run.steps
    every = -(-len(steps) // POINTS)
    ends = [s.end for s in steps]
    spans = [b - a for a, b in zip([0.0, *ends], ends)]
    return {
        "curve": [[s.end, s.kv_used_bytes, s.kv_reserved_bytes] for s in steps[::every]],
        "live_mean": sum(s.kv_used_bytes * d for s, d in zip(steps, spans)) / sum(spans),
        "reserved_mean": sum(s.kv_reserved_bytes * d for s, d in zip(steps, spans)) / sum(spans),
        "reserved_peak": max(s.kv_reserved_bytes for s in steps),
    }


def _memory_row(mode: str, run: Data, capacity: float) -> Data:
    return {
        "mode": mode,
        "live_mean_mb": run["live_mean"] / 1e6,
        "reserved_mean_mb": run["reserved_mean"] / 1e6,
        "reserved_peak_mb": run["reserved_peak"] / 1e6,
        "released_mean_mb": (capacity - run["reserved_mean"]) / 1e6,
        "live_share": run["live_mean"] / run["reserved_mean"],
    }
