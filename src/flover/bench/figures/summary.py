"""The headline: what figures 4a and 4c say at the most requests, as a table in Markdown and one picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from flover.bench.figures import published
from flover.bench.figures.digests import Data
from flover.bench.figures.headline import paper_at
from flover.bench.figures.style import BLUE, GREY, ORANGE, PAPER, RED, legend, panels, shown_as

COLUMNS = (
    "model",
    "interval",
    "requests",
    "fused, s",
    "serial, s",
    "concurrent, s",
    "over serial",
    "over concurrent",
    "bytes and arrivals allow",
    "over dynamic:50ms",
    "mean latency over one alone",
    "paper, over concurrent",
)
COLORS = (BLUE, ORANGE, GREY, RED)


def rows_at_most(data: Data) -> list[Data]:
    """Those of the most requests that fused has run, by model and interval."""
    most = max((row["requests"] for row in data["rows"]), default=0)
    return [row for row in data["rows"] if row["requests"] == most and row["fused_s"]]


def table(data: Data, latency: Data | None) -> str:
    """Figure 4a, and 4c if it is there, in Markdown, with the machine and what made them."""
    found = {(r["model"], r["interval"], r["requests"]): r for r in (latency or {"rows": []})["rows"]}
    lines = [" | ".join(("", *COLUMNS, "")).strip(), "|" + "---|" * len(COLUMNS)]
    for row in rows_at_most(data):
        other = found.get((row["model"], row["interval"], row["requests"]), {})
        main = _kind(row).startswith("500 ms")
        theirs = paper_at(published.FIG_4A[row["model"]].speedup, row["requests"]) if main else None
        cells = [
            *(row["model"], row["interval"], str(row["requests"])),
            *(_number(row[f"{name}_s"], "", 2) for name in ("fused", "serial", "concurrent")),
            *(_number(_over(row, name), "x") for name in ("serial", "concurrent")),
            _number(row["bound_bytes"], "x"),
            _number(row["x_over_dynamic"], "x"),
            _number(other.get("fused_latency_x"), "", 2),
            _number(theirs, "x"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    machine = data["environment"]
    where = machine.get("gpu") or f"{machine.get('cores')} cores"
    return "\n".join(
        [*lines, "", f"{where}, scale {data['scale']}, commit {machine.get('commit')}, {machine['date']}.", ""]
    )


def _over(row: Data, system: str) -> float | None:
    """Times as fast as; None: that system was not measured on it."""
    seconds = row[f"{system}_s"]
    return None if seconds is None else float(seconds / row["fused_s"])


def _number(value: float | None, unit: str, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}{unit}"


def draw(data: Data) -> Figure:
    """Speed-up over serial, and over concurrent where it was measured, by model and interval, and what is possible."""
    rows = rows_at_most(data)
    models = list(dict.fromkeys(row["model"] for row in rows))
    most = rows[0]["requests"]
    figure, (axes,) = panels(1, f"{most} requests in one fused batch: times as fast as one after the other")
    kinds = [_kind(row) for row in rows if row["model"] == models[0]]
    for i, kind in enumerate(kinds):
        cells = [(models.index(row["model"]), row) for row in rows if _kind(row) == kind]
        at = [x + (i - (len(kinds) - 1) / 2) * 0.8 / len(kinds) for x, _ in cells]
        bars = axes.bar(at, [_over(r, "serial") for _, r in cells], 0.7 / len(kinds), color=COLORS[i % 4], label=kind)
        texts = [_number(_over(r, "serial"), "") for _, r in cells]
        axes.bar_label(bars, texts, label_type="center", color="white", fontsize=12, fontweight="bold")
        axes.scatter(
            at,
            [r["bound_bytes"] for _, r in cells],
            marker="_",
            s=300,
            color="black",
            label="bound by bytes, over serial",
        )
        beside = [(x, _over(r, "concurrent")) for x, (_, r) in zip(at, cells) if r["concurrent_s"]]
        if beside:
            axes.plot(*zip(*beside), "D", color="white", markeredgecolor="black", label="over concurrent", zorder=4)
        _paper(axes, at, cells)
    axes.set_xticks(range(len(models)), [shown_as(data, model) for model in models])
    axes.set_ylim(0, 1.12 * max(max(row["bound_bytes"], row["serial_s"] / row["fused_s"]) for row in rows))
    legend(figure, [axes], 4)
    return figure


def _kind(row: Data) -> str:
    """The interval, in words that are the same for all models."""
    if row["interval"].endswith("single"):
        return "20 ms, scaled" if float(row["interval"].split()[0]) < 0.01 else "500 ms, scaled as the request"
    return "all at once" if row["interval"] == "0" else str(row["interval"])


def _paper(axes: Any, at: Sequence[float], cells: Sequence[tuple[int, Data]]) -> None:
    """The paper's ratio, beside the interval that is its own."""
    points = [
        (x, paper_at(published.FIG_4A[row["model"]].speedup, row["requests"]))
        for x, (_, row) in zip(at, cells)
        if _kind(row).startswith("500 ms, scaled")
    ]
    points = [point for point in points if point[1]]
    if points:
        axes.plot(*zip(*points), linestyle="none", label="paper, over concurrent", zorder=4, **PAPER)
