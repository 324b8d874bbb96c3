"""The pictures of figures random, tp, reorder and memory."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from flover.bench.figures.digests import Data
from flover.bench.figures.style import (
    BLUE,
    GREEN,
    MODES,
    ORANGE,
    PAPER,
    PLAN_MARKERS,
    PLANS,
    SKY,
    counts,
    legend,
    panels,
)

SHOWN = ("off", "move", "indirect")
FEW_DEAD = 0.05  # share of dead slots of the calls that are shown


def draw_random(data: Data) -> Figure:
    rows = data["rows"]
    groups = sorted({row["requests"] for row in rows}, reverse=True)
    figure, axes = panels(
        1 + len(groups), "Reordering saves the rows that have ended; what a row costs decides the gain"
    )
    most = [row for row in rows if row["requests"] == groups[0]]
    found = {(row["mode"], row["upper"]): row for row in most}
    uppers = sorted(u for u in {row["upper"] for row in most} if all((m, u) in found for m in SHOWN))
    for i, mode in enumerate(SHOWN):
        cells = [found[mode, upper] for upper in uppers]
        at = [x + (i - 1) * 0.27 for x in range(len(cells))]
        bars = axes[0].bar(at, [r["rows_computed"] for r in cells], 0.25, color=MODES[mode], label=mode)
        if len(cells) < 4:
            axes[0].bar_label(bars, [f"{r['rows_computed']:.1f}" for r in cells], fontsize=9)
    _ticks(axes[0], uppers)
    axes[0].set_title(f"rows computed a step, {groups[0]} requests", loc="left")
    axes[0].set_xlabel("longest output")
    for one, count in zip(axes[1:], groups):
        moved = [row for row in rows if (row["requests"], row["mode"]) == (count, "move")]
        _gains(
            one, moved, {k.split("up to ")[1].split(":")[0]: v for k, v in data["paper"].items() if f"{count} req" in k}
        )
        one.set_title(f"gain of move over off, {count} requests", loc="left")
    legend(figure, axes, 4)
    return figure


def _gains(axes: Any, moved: list[Data], theirs: dict[str, float]) -> None:
    x = list(range(len(moved)))
    axes.plot(x, [row["gain"] for row in moved], "o-", color=BLUE, label="measured gain", zorder=4)
    axes.plot(x, [row["gain_by_bytes"] for row in moved], "--", color=GREEN, label="as bytes predict")
    axes.plot(x, [row["gain_by_rows"] for row in moved], ":", color=ORANGE, linewidth=2, label="at most, by rows")
    paper = [(i, theirs[str(row["upper"])]) for i, row in enumerate(moved) if str(row["upper"]) in theirs]
    if paper:
        axes.plot(*zip(*paper), linestyle="none", label="paper", **PAPER)
    axes.axhline(1, color="#999999", linewidth=0.8)
    _ticks(axes, [row["upper"] for row in moved])
    axes.set_xlabel("longest output")


def _ticks(axes: Any, uppers: list[int]) -> None:
    axes.set_xticks(range(len(uppers)), [str(upper) for upper in uppers], fontsize=9 if len(uppers) > 6 else None)


def draw_tp(data: Data) -> Figure:
    rows = [row for row in data["rows"] if row["mode"] == "move"]
    figure, axes = panels(1, "Reordering by tensor-parallel ranks: here, and in the paper")
    labels = [f"here\n{_ranks(row['ranks'])}\n{row['requests']} requests\nup to {row['upper']}" for row in rows]
    values, colors = [row["gain"] for row in rows], [BLUE] * len(rows)
    for name, gain in data["paper"].items():
        ranks, rest = name.removesuffix(": gain").split(", ")
        words = rest.replace("length ", "up to ").replace(" by requests", "").split()
        labels.append("\n".join(["paper", ranks, *_chunks(words)]))
        values.append(gain)
        colors.append("#cccccc")
    bars = axes[0].bar(range(len(values)), values, 0.7, color=colors)
    axes[0].bar_label(bars, [f"{value:.2f}" for value in values], fontsize=10, padding=2)
    axes[0].set_xticks(range(len(values)), labels, fontsize=8)
    axes[0].axhline(1, color="#999999", linewidth=0.8)
    axes[0].set_ylabel("seconds with off over seconds with move")
    return figure


def _ranks(count: int) -> str:
    return f"{count} rank{'' if count == 1 else 's'}"


def _chunks(words: list[str]) -> list[str]:
    """ "up to 1000 16" -> "16 requests", "up to 1000"."""
    length = " ".join(words[:3])
    rest = [word for word in words[3:] if word != "requests"]
    return [f"{rest[0]} requests", length] if rest else ["", length]


def draw_reorder(data: Data) -> Figure:
    traces, calls = data["rows"], data["plot"]["calls"]
    names = list(dict.fromkeys(row["plan"] for row in traces))
    figure, axes = panels(
        4, "No call of another plan moves fewer tokens, and planning is a matter of microseconds", 3.6
    )
    lens = sorted({row["max_len"] for row in traces})
    slots = sorted({row["slots"] for row in calls})
    for name, color, marker in zip(names, PLANS, PLAN_MARKERS):
        style: dict[str, Any] = {"color": color, "marker": marker, "label": name, "markersize": 5}
        style |= {"linewidth": 2.4 if name == "ours" else 1.4, "zorder": 4 if name == "ours" else 3}
        for one, pace in zip(axes, ("spread", "burst")):
            of = {r["max_len"]: r["tokens"] for r in traces if (r["plan"], r["pace"]) == ("ours", pace)}
            cells = [r for r in traces if (r["plan"], r["pace"]) == (name, pace)]
            one.plot(lens, [row["tokens"] / of[row["max_len"]] for row in cells], **style)
        of = {r["slots"]: r["tokens"] for r in calls if (r["plan"], r["dead"]) == ("ours", FEW_DEAD)}
        cells = [row for row in calls if (row["plan"], row["dead"]) == (name, FEW_DEAD)]
        axes[2].plot(slots, [row["tokens"] / max(of[row["slots"]], 1) for row in cells], **style)
        if cells[0]["us"] is not None:
            axes[3].plot(slots, [row["us"] for row in cells], **style)
    titles = ("a trace of 32 requests, 28 steps apart", "a trace of 32 requests, 1 step apart")
    for one, title in zip(axes, (*titles, f"a call, {FEW_DEAD:.0%} of the slots dead")):
        one.set_title(f"{title}: tokens over ours", loc="left")
        one.set_yscale("log")
        ticks = [t for t in (1, 1.5, 2, 4, 8, 16, 32, 64, 128, 256) if t <= one.get_ylim()[1]]
        one.set_yticks(ticks, [f"{t:g}" for t in ticks])
        one.minorticks_off()
    for one in axes[:2]:
        one.set_xticks(lens)
        one.set_xlabel("longest output, tokens")
    for one in axes[2:]:
        counts(one, slots, "slots")
    axes[3].set_yscale("log")
    axes[3].set_title("the same calls: microseconds to plan", loc="left")
    legend(figure, axes, 7)
    return figure


def draw_memory(data: Data) -> Figure:
    plot = data["plot"]
    size, unit = (1e9, "GB") if plot["keep"] > 1e9 else (1e6, "MB")
    figure, axes = panels(2, "Memory follows the live requests; a buffer that keeps everything never gives any back")
    left, right = axes
    for mode, curve in plot["curves"].items():
        times, _, reserved = zip(*curve)
        style = {"off": "-.", "move": "-", "indirect": "--", "paged": "-"}[mode]
        left.step(
            times, [v / size for v in reserved], style, where="post", color=MODES[mode], label=f"{mode}: reserved"
        )
    times, used, _ = zip(*plot["curves"]["move"])
    left.fill_between(times, [v / size for v in used], step="post", color=SKY, alpha=0.5, label="live", linewidth=0)
    left.plot([0, plot["end"]], [plot["keep"] / size] * 2, color="black", linestyle=":", label="keep everything")
    left.set_title(f"KV cache over the run, {unit}", loc="left")
    left.set_xlabel("seconds")
    left.set_ylim(0, plot["keep"] / size * 1.08)
    rows = data["rows"]
    names = [row["mode"].replace(" ", "\n") for row in rows]
    colors = [MODES.get(row["mode"], "#333333") for row in rows]
    bars = right.bar(names, [row["reserved_mean_mb"] * 1e6 / size for row in rows], 0.7, color=colors)
    right.bar_label(bars, [f"{row['live_share']:.0%} used" for row in rows], fontsize=10, padding=2)
    right.set_ylim(0, plot["keep"] / size * 1.12)
    right.set_title(f"mean reserved, {unit}, and how much of it is used", loc="left")
    legend(figure, axes, 3)
    return figure
