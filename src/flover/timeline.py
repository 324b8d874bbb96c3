"""Draws the running batch: rows x steps, one colour a request, with strips of rows, tokens and KV memory below.

matplotlib (an optional extra) is imported here and nowhere else. Requests are told apart by label and position too, and
prefill from decode by shade and hatching, so that no colour has to be recognised.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from flover.metrics import PALETTE, StepStats

Image = npt.NDArray[np.float64]
PLAIN, DARK, PALE = "#7d93ad", "#3d4c5f", "#dbe2ea"  # no request's colour: legend and strips
DEAD, INK, LEAVE = "#cfcbc6", "#222222", {"length": "|", "stop": "|", "abort": "X", "error": "X", "preempted": "v"}
UNITS = ((30, "GiB"), (20, "MiB"), (10, "KiB"), (0, "bytes"))
WIDTH, HEIGHT, DPI = 16.0, 9.0, 100


class _Stretch(NamedTuple):
    """A request in one row over steps [start, end)."""

    request_id: str
    row: int
    start: int
    end: int


def draw(stats: Sequence[StepStats], path: Path) -> None:
    """Write the picture as PNG, 1600 x 900."""
    steps = [s for s in stats if s.rows or s.leaves]
    num_rows = max(len(s.rows) for s in steps)
    order = {name: i for i, name in enumerate(dict.fromkeys(name for s in steps for name in s.rows))}
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid, rows, tokens, memory = figure.subplots(4, 1, sharex=True, height_ratios=(6.4, 1, 1, 1))
    cell = 1450 / max(len(steps), 1)  # pixels, about
    height = 560 / num_rows
    grid.imshow(
        _cells(steps, num_rows, order), aspect="auto", interpolation="nearest", extent=(0, len(steps), num_rows, 0)
    )
    _grid_lines(grid, num_rows, len(steps), cell)
    _hatch(grid, steps, cell)
    _marks(grid, steps, max(2.0, min(9.0, cell * 0.8, height * 0.5)))
    if cell >= 3:
        _moves(grid, steps, max(2.0, min(4.0, cell * 0.3)))
    _labels(grid, _stretches(steps), cell, height)
    _strips(rows, tokens, memory, steps)
    grid.set_title(_title(steps, len(order)), loc="left", fontsize=15, fontweight="bold", pad=30)
    grid.set_ylabel("row of the running batch")
    shown = np.arange(0, num_rows, -(-num_rows // 16))
    grid.set_yticks(shown + 0.5, [str(row) for row in shown])
    grid.set_ylim(num_rows, 0)
    memory.set_xlabel("step")
    memory.set_xlim(0, len(steps))
    _legend(grid, steps, with_moves=cell >= 3)
    figure.savefig(path, format="png", dpi=DPI)


def _title(steps: Sequence[StepStats], num_requests: int) -> str:
    tokens = sum(s.num_prefill_tokens + s.num_decode_tokens for s in steps)
    busy = [s.num_running for s in steps if s.num_prefill_tokens or s.num_decode_tokens]
    mean = sum(busy) / max(len(busy), 1)
    work = f"{tokens} tokens computed in {len(busy)} steps, {mean:.1f} rows a step"
    return f"{num_requests} requests, one fused batch: {work}"


def _cells(steps: Sequence[StepStats], num_rows: int, order: dict[str, int]) -> Image:
    """One RGB pixel per row and step: white is idle, dark prefill, plain decode, pale a row that got no token."""
    image = np.ones((num_rows, len(steps), 3))
    palette = [np.array(to_rgb(color)) for color in PALETTE]
    for x, step in enumerate(steps):
        for row, request_id in enumerate(step.rows):
            color = palette[order[request_id] % len(palette)]
            if step.dead[row]:
                color = np.array(to_rgb(DEAD))
            elif not step.num_scheduled[row]:
                color = 1 - (1 - color) * 0.3
            elif step.prefilling[row]:
                color = color * 0.55
            image[row, x] = color
    return image


def _grid_lines(axes: Any, num_rows: int, num_steps: int, cell: float) -> None:
    axes.hlines(np.arange(1, num_rows), 0, num_steps, color="white", linewidth=2.0 if num_rows <= 24 else 0.6)
    if cell >= 8:
        axes.vlines(np.arange(1, num_steps), 0, num_rows, color="white", linewidth=0.5)


def _hatch(axes: Any, steps: Sequence[StepStats], cell: float) -> None:
    """Prefill cells are hatched, where they are wide enough to show it."""
    boxes = [
        Rectangle((x, row), 1, 1)
        for x, step in enumerate(steps)
        for row in range(len(step.rows))
        if step.prefilling[row] and step.num_scheduled[row]
    ]
    if boxes and cell >= 5:
        axes.add_collection(PatchCollection(boxes, hatch="////", facecolor="none", edgecolor="#ffffffb0", linewidth=0))


def _marks(axes: Any, steps: Sequence[StepStats], size: float) -> None:
    """Joins at the left edge of a request's first cell, leaves at the right edge of its last, moves between rows."""
    join = [(x, row + 0.5) for x, step in enumerate(steps) for row, _, _ in step.joins]
    style = {"linestyle": "none", "markersize": size, "clip_on": False, "zorder": 4}
    if join:
        axes.plot(*zip(*join), marker=">", color="white", markeredgecolor=INK, markeredgewidth=0.8, **style)
    for marker in sorted(set(LEAVE.values())):
        places = [
            (x, row + 0.5)
            for x, step in enumerate(steps)
            for row, _, reason in step.leaves
            if LEAVE.get(reason, "|") == marker
        ]
        if places:
            wide = {"markeredgewidth": max(1.2, size * 0.3)} if marker == "|" else {"markeredgewidth": 0.5}
            axes.plot(*zip(*places), marker=marker, color=INK, **wide, **style)


def _moves(axes: Any, steps: Sequence[StepStats], size: float) -> None:
    """Rows that closed a hole: from where the request ran to where it goes on."""
    moves = [((x, src + 0.5), (x + 0.5, dst + 0.5)) for x, step in enumerate(steps) for src, dst in step.relocations]
    if moves:
        axes.add_collection(LineCollection(moves, colors=INK, linewidths=1.0, linestyles="dotted", zorder=3))
        ends = zip(*(end for _, end in moves))
        axes.plot(*ends, marker="o", color=INK, linestyle="none", markersize=size, zorder=4)


def _stretches(steps: Sequence[StepStats]) -> list[_Stretch]:
    done: list[_Stretch] = []
    current: list[_Stretch] = []
    for x, step in enumerate(steps):
        for row in range(max(len(step.rows), len(current))):
            name = step.rows[row] if row < len(step.rows) else None
            if row < len(current) and current[row].request_id == name:
                current[row] = current[row]._replace(end=x + 1)
            else:
                if row < len(current):
                    done.append(current[row])
                fresh = _Stretch(name or "", row, x, x + 1)
                current[row : row + 1] = [fresh]
        del current[len(step.rows) :]
    return done + current


def _labels(axes: Any, stretches: list[_Stretch], cell: float, height: float) -> None:
    """The id where a request has a row for long enough to hold it."""
    if height < 12:
        return
    font = min(10.0, height * 0.45)
    for stretch in stretches:
        if stretch.request_id and (stretch.end - stretch.start - 1) * cell > (len(stretch.request_id) + 2) * font * 0.9:
            axes.text(
                stretch.start + 1 + 8 / cell,
                stretch.row + 0.52,
                stretch.request_id,
                fontsize=font,
                color=INK,
                va="center",
                clip_on=True,
                zorder=5,
            )


def _strips(rows: Any, tokens: Any, memory: Any, steps: Sequence[StepStats]) -> None:
    edges = np.arange(len(steps) + 1)
    values = {"step": "post", "linewidth": 0}

    def area(axes: Any, low: Any, high: Any, color: str, label: str) -> None:
        low, high = np.append(low, low[-1]), np.append(high, high[-1])
        axes.fill_between(edges, low, high, color=color, label=label, **values)

    zero = np.zeros(len(steps))
    running = np.array([s.num_running for s in steps])
    area(rows, zero, running, PLAIN, "running")
    waiting = np.array([s.num_waiting for s in steps])
    if waiting.any():
        area(rows, running, running + waiting, PALE, "waiting")
    decode = np.array([s.num_decode_tokens for s in steps])
    dead = np.array([s.num_dead_rows for s in steps])
    prefill = np.array([s.num_prefill_tokens for s in steps])
    area(tokens, zero, decode, PLAIN, "decode")
    area(tokens, decode, decode + prefill, DARK, "prefill")
    if dead.any():
        area(tokens, decode + prefill, decode + prefill + dead, DEAD, "dead rows")
    reserved = np.array([s.kv_reserved_bytes for s in steps])
    size, unit = next((1 << n, name) for n, name in UNITS if reserved.max() >> n or not n)
    area(memory, zero, reserved / size, PALE, "reserved")
    area(memory, zero, np.array([s.kv_used_bytes for s in steps]) / size, PLAIN, "in use")
    for axes, name in ((rows, "requests"), (tokens, "tokens"), (memory, f"KV, {unit}")):
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper right", fontsize=9, ncols=3, framealpha=0.8, edgecolor="none", borderpad=0.2)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=3, steps=[1, 2, 5, 10]))


def _legend(axes: Any, steps: Sequence[StepStats], with_moves: bool) -> None:
    entries: list[Any] = [
        Patch(facecolor=DARK, hatch="////", edgecolor="#ffffffb0", linewidth=0, label="prefill"),
        Patch(facecolor=PLAIN, label="decode"),
        Patch(facecolor="white", edgecolor="#bbbbbb", label="idle"),
    ]
    if any(not n for s in steps for n, dead in zip(s.num_scheduled, s.dead) if not dead):
        entries.append(Patch(facecolor=PALE, label="no token this step"))
    if any(any(s.dead) for s in steps):
        entries.append(Patch(facecolor=DEAD, label="dead row, computed in vain"))
    mark: dict[str, Any] = {"linestyle": "none", "color": INK, "markersize": 8}
    entries.append(Line2D([], [], marker=">", label="join", **{**mark, "color": "white"}, markeredgecolor=INK))
    reasons = {reason for s in steps for _, _, reason in s.leaves}
    entries.append(Line2D([], [], marker="|", markeredgewidth=2.4, label="leave", **mark))
    if reasons & {"abort", "error"}:
        entries.append(Line2D([], [], marker="X", label="abort, error", **mark))
    if "preempted" in reasons:
        entries.append(Line2D([], [], marker="v", label="preempted", **mark))
    if with_moves and any(s.relocations for s in steps):
        entries.append(Line2D([], [], marker="o", color=INK, linestyle="dotted", markersize=4, label="row move"))
    axes.legend(
        handles=entries, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(entries), frameon=False, borderaxespad=0.2
    )
    axes.spines[["top", "right"]].set_visible(False)
