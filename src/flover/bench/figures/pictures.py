"""The pictures of figures 4a, 4b, 4c, progress, 8 and fixed. One message each, in the title."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure

from flover.bench.figures import published
from flover.bench.figures.digests import Data
from flover.bench.figures.headline import main_rows, over_serial
from flover.bench.figures.style import (
    BLUE,
    COLORS,
    GREY,
    MARKERS,
    ORANGE,
    PAPER,
    RED,
    SKY,
    counts,
    legend,
    panels,
    shown_as,
)

SYSTEMS = {"fused": "fused", "concurrent": "concurrent", "serial": "serial", "dynamic:50ms": "dynamic"}


def _by_model(data: Data, title: str, unit: str, draw: Callable[[Any, Sequence[Data]], None]) -> Figure:
    """A panel for each model, of its rows at the scaled interval."""
    models: dict[str, list[Data]] = {}
    for row in main_rows(data["rows"]):
        models.setdefault(row["model"], []).append(row)
    figure, axes = panels(len(models), title)
    for one, (model, rows) in zip(axes, models.items()):
        draw(one, rows)
        one.set_title(f"{shown_as(data, model)}, interval {rows[-1]['interval']}", loc="left")
    axes[0].set_ylabel(unit)
    legend(figure, axes)
    return figure


def _lines(axes: Any, rows: Sequence[Data], suffix: str) -> None:
    for system, kind in SYSTEMS.items():
        points = [(row["requests"], row[f"{system}{suffix}"]) for row in rows if row.get(f"{system}{suffix}")]
        if points:
            front = 3 if kind == "fused" else 2
            axes.plot(*zip(*points), color=COLORS[kind], marker=MARKERS[kind], label=system, zorder=front)
    counts(axes, [row["requests"] for row in rows], "requests")


def draw_4a(data: Data) -> Figure:
    title = "Fused ends soon after the last arrival, however many requests came"
    return _by_model(data, title, "seconds, first arrival to last token", _panel_4a)


def _panel_4a(axes: Any, rows: Sequence[Data]) -> None:
    _lines(axes, rows, "_s")
    last = rows[-1]
    if last.get("x_over_best"):
        other = last["x_over_concurrent"]
        axes.annotate(
            f"{over_serial(last):.1f}x over serial\n(arrivals allow {last['bound_arrivals']:.1f}x)"
            + (f"\n{other:.1f}x over concurrent" if other else ""),
            (0.03, 0.97),
            xycoords="axes fraction",
            va="top",
            fontsize=10,
        )
    axes.set_ylim(0, max(max(row[k] or 0 for k in row if k.endswith("_s") and "per" not in k) for row in rows) * 1.4)


def draw_4b(data: Data) -> Figure:
    title = "Throughput of fused grows with the requests; that of serial and concurrent does not"
    return _by_model(data, title, "output tokens per second", _panel_4b)


def _panel_4b(axes: Any, rows: Sequence[Data]) -> None:
    _lines(axes, rows, "_tokens_per_s")
    axes.set_ylim(bottom=0)


def draw_4c(data: Data) -> Figure:
    title = "Latency among many over latency alone: fused stays closest to 1"
    return _by_model(data, title, "mean latency over a single request's", _panel_4c)


def _panel_4c(axes: Any, rows: Sequence[Data]) -> None:
    _lines(axes, rows, "_latency_x")
    theirs = list(zip((8, 16, 32), published.FIG_4C[rows[0]["model"]]))
    axes.plot(*zip(*theirs), linestyle="none", label="paper, Flover", zorder=4, **PAPER)
    counts(axes, sorted({row["requests"] for row in rows} | {8, 16, 32}), "requests")
    axes.set_yscale("log", base=2)
    top = max(max(v for k, v in row.items() if k.endswith("_latency_x") and v) for row in rows)
    ticks = [t for t in (1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32) if t <= top * 1.2]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.axhline(1, color="#999999", linewidth=0.8)


def draw_progress(data: Data) -> Figure:
    curves, single = data["plot"]["curves"], data["plot"]["single"]
    figure, axes = panels(2, "Fused returns requests as they finish; a batch returns all at once, and late")
    dynamic = [name for name in curves if name.startswith("dynamic")]
    ends = {system: curve["finished"][-1][0] / single for system, curve in curves.items()}
    shown = 1.25 * max((end for system, end in ends.items() if system != "concurrent"), default=1.0)
    late = ends.get("concurrent", 0.0) > shown
    shades = dict(zip(dynamic, ("#f6d58a", "#edb84a", "#d99a1c", "#b57b0a", "#7d5404")))
    for one, key, name in zip(axes, ("tokens", "finished"), ("output tokens", "finished requests")):
        for system, curve in curves.items():
            x, y = zip(*((t / single, count) for t, count in curve[key]))
            color = COLORS.get(system, shades.get(system, GREY))
            style = "--" if system == "concurrent" else "-"
            wide = 2.8 if system == "fused" else 1.6
            one.plot(x, y, style, color=color, linewidth=wide, label=system, drawstyle="steps-post", zorder=3)
        one.set_xlabel("time, in single-request times; windows scaled alike")
        one.set_title(f"cumulative {name}", loc="left")
        one.set_xlim(0, shown)
        one.set_ylim(bottom=0)
    if late:
        axes[1].set_title(f"cumulative finished requests; concurrent ends at {ends['concurrent']:.1f}", loc="left")
    legend(figure, axes, 4)
    return figure


def draw_8(data: Data) -> Figure:
    rows = [row for row in data["rows"] if row["gap"] == "scaled"]
    at = [published.FIG_8["gap_ms"].index(row["gap_ms"]) for row in rows]
    figure, axes = panels(2, "The rarer requests arrive, the fewer overlap, and the less there is to gain")
    x = [row["gap_over_single"] for row in rows]
    left, right = axes
    left.plot(x, [row["overlap %"] for row in rows], "o-", color=BLUE, label="fused, here")
    left.plot(x, [published.FIG_8["overlap_percent"][i] for i in at], linestyle=":", label="paper", **PAPER)
    left.set_title("overlap, % of the requests in a step", loc="left")
    errors = [row["x_stdev"] for row in rows]
    right.errorbar(
        x, [r["x over serial"] for r in rows], errors, color=BLUE, marker="o", capsize=3, label="fused, here"
    )
    right.plot(x, [row["bound_bytes"] for row in rows], color=SKY, linestyle="--", label="bound by bytes, over serial")
    right.plot(x, [published.FIG_8["speedup"][i] for i in at], linestyle=":", label="paper", **PAPER)
    right.axhline(1, color="#999999", linewidth=0.8)
    right.set_title("speed-up: here over serial, paper over concurrent", loc="left")
    for one in axes:
        one.set_xscale("log")
        one.set_xlabel("mean gap over the single-request time")
        one.set_ylim(bottom=0)
    legend(figure, axes)
    return figure


def draw_fixed(data: Data) -> Figure:
    rows = [row for row in data["rows"] if "scaled" in row["interval"]]
    most = max(row["requests"] for row in rows)
    rows = [row for row in rows if row["requests"] == most]
    intervals = list(dict.fromkeys(row["interval"] for row in rows))
    figure, axes = panels(
        len(intervals), f"{most} arrivals: fused depends on when they come, not on how many come at once"
    )
    for one, interval in zip(axes, intervals):
        cells = [row for row in rows if row["interval"] == interval]
        for i, (system, color) in enumerate((("fused", BLUE), ("concurrent", RED), ("serial", GREY))):
            heights = [row[f"{system}_x"] or 0.0 for row in cells]
            bars = one.bar([x + (i - 1) * 0.27 for x in range(len(cells))], heights, 0.25, color=color, label=system)
            one.bar_label(bars, [f"{h:.1f}" if h else "gap" for h in heights], fontsize=9, padding=1)
        ideal = cells[0]["last_arrival_x"] + 1
        one.axhline(ideal, color=ORANGE, linestyle="--", linewidth=1.5, label="last arrival + one request")
        one.set_xticks(range(len(cells)), [str(row["batch"]) for row in cells])
        one.set_xlabel("sequences per arrival")
        one.set_title(f"interval {cells[0]['interval_over_single']:.2f} of a request", loc="left")
    axes[0].set_ylabel("makespan, in single-request times")
    legend(figure, axes)
    return figure
