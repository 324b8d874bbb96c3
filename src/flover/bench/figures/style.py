"""How the pictures look: one place for colours, sizes and fonts. The only module of the figures with matplotlib.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; lines differ by marker too. What the paper
reports is black and hollow in every figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#777777",
)
COLORS = {"fused": BLUE, "concurrent": RED, "serial": GREY, "dynamic": ORANGE}
MARKERS = {"fused": "o", "concurrent": "s", "serial": "D", "dynamic": "^"}
MODES = {"off": GREY, "move": BLUE, "indirect": ORANGE, "paged": GREEN}
PAPER: dict[str, Any] = {"color": "black", "marker": "*", "markerfacecolor": "white", "markersize": 11}
PLANS = (BLUE, SKY, RED, GREEN, ORANGE, PURPLE, GREY)
PLAN_MARKERS = "o^sDvPX"
DPI = 160  # 10 inches are 1600 pixels
FONT: dict[Any, Any] = {"font.size": 11, "axes.titlesize": 11.5, "legend.fontsize": 10}


def panels(count: int, title: str, height: float = 4.2) -> tuple[Figure, list[Any]]:
    """A figure of that many panels side by side, two a row where they are more than three."""
    columns = count if count <= 3 else 2
    lines = -(-count // columns)
    figure = Figure(figsize=(10, height * lines if lines > 1 else height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for extra in axes[count:]:
        extra.set_visible(False)
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        one.set_axisbelow(True)
    figure.suptitle(title, x=0.012, ha="left", fontsize=14, fontweight="bold")
    return figure, axes[:count]


def legend(figure: Figure, axes: Sequence[Any], columns: int = 6) -> None:
    """One legend for all panels, below them."""
    entries: dict[str, Any] = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside lower center",
        ncols=min(columns, len(entries)),
        frameon=False,
    )


def counts(axes: Any, values: Sequence[int], label: str) -> None:
    """A logarithmic axis that shows exactly these numbers."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()
    axes.set_xlabel(label)


def shown_as(data: Mapping[str, Any], model: str) -> str:
    """A model's name in a title: at tiny scale it is only stood in for."""
    return model if data["scale"] == "full" else f"{data['scale']} {model.partition('-')[0]}"


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png", dpi=DPI)
