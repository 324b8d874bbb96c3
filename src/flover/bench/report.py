"""One self-contained HTML page of a folder of figures: `ID.json` each, as `flover bench paper` writes them.

Tables are found by shape and charts are drawn from them by the page's script, so that a new figure needs nothing here.
Whatever comes from a file is escaped by the template, and the page's policy names the one script that may run by its
hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from flover.bench.keep import write_text
from flover.bench.report_tables import Chart, Table, is_rows, tables_of
from flover.bench.report_timeline import TimelineView

ORDER = ("4a", "4b", "4c", "progress", "8", "fixed", "random", "reorder", "memory", "tp")  # the paper's figures
VERDICTS = {"yes": "yes", "reproduced": "yes", "surpassed": "yes", "partly": "partly", "no": "no", "gap": "gap"}
KNOWN = (  # keys with a place of their own; whatever else is in tables is shown as tables
    *("id", "title", "claim", "paper", "ours", "verdict", "notes", "gap", "gaps"),
    *("environment", "command", "seed", "scale", "settings", "same_tokens_as_serial"),
)
INNER = ("data", "rows")  # keys that say nothing about the table
POINTS = {"progress": ("seconds", "count"), "memory": ("seconds", "live_bytes", "reserved_bytes")}


@dataclass(slots=True)
class Figure:
    """A figure as the page shows it."""

    id: str
    title: str
    claim: str
    verdict: str  # yes, partly, no, gap or unknown
    verdict_text: str
    notes: list[str]
    facts: list[tuple[str, str]]
    command: str
    compared: list[tuple[str, Any, Any]]  # what, the paper's, ours
    tables: list[Table] = field(default_factory=list)
    gaps: list[tuple[str, str]] = field(default_factory=list)  # what could not run, and why
    image: str | None = None

    @property
    def headline(self) -> tuple[str, Any, Any] | None:
        """What the summary shows: the first pair that can be compared."""
        pairs = [pair for pair in self.compared if None not in pair] or self.compared
        return pairs[0] if pairs else None


def report(folder: Path, output: Path) -> int:
    """Write the page, whole or not at all; -> the number of figures.

    Raises:
        ValueError: the folder is none, or holds no figure.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    figures: list[Figure] = []
    timelines: list[TimelineView] = []
    gaps: list[tuple[str, str]] = []
    for path in sorted(folder.glob("*.json")):
        try:
            raw = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)  # NaN is no JSON
            if "timeline" in path.stem and isinstance(raw, dict) and "steps" in raw:
                timelines.append(TimelineView.of(path.stem, raw["steps"]))
            elif isinstance(raw, dict) and "id" in raw:
                figures.append(_figure(raw, path.with_suffix(".png")))
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            gaps.append((path.name, f"cannot be read: {error}"))
    if not figures and gaps:
        raise ValueError(f"{folder} holds no figure that can be read: {gaps[0][0]} {gaps[0][1]}")
    if not figures:
        raise ValueError(f"{folder} holds no figure: flover bench paper --output {folder} makes them")
    figures.sort(key=lambda f: (ORDER.index(f.id) if f.id in ORDER else len(ORDER), f.id))
    shared: dict[tuple[str, str], list[str]] = {}  # figures of the same cells lack the same
    for figure in figures:
        for gap in figure.gaps:
            shared.setdefault(gap, []).append(figure.id)
    gaps += [(f"{', '.join(ids)} {where}".strip(), why) for (where, why), ids in shared.items()]
    for figure in figures:
        if figure.verdict == "gap" and not figure.gaps:
            gaps.append((figure.id, " ".join([figure.verdict_text, *figure.notes]).strip()))
    gaps += [(name, "not run") for name in ORDER if not any(f.id.split("-")[0] == name for f in figures)]
    write_text(output, _render(figures, timelines, gaps))
    return len(figures)


def _render(figures: Sequence[Figure], timelines: Sequence[TimelineView], gaps: Sequence[tuple[str, str]]) -> str:
    page = files("flover.bench") / "page"
    html, style, script = ((page / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"cell": cell, "data": _data}
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.from_string(html).render(
        figures=figures, timelines=timelines, gaps=gaps, style=style, script=script, digest=digest
    )


def _data(value: Any) -> str:
    """JSON that may stand inside a script element: nothing in it can end the element."""
    plain = asdict(value) if isinstance(value, Chart) else value
    return json.dumps(plain, separators=(",", ":")).replace("<", "\\u003c")


def cell(value: Any) -> str:
    """A value as people read it: four digits of a fraction, thousands apart."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(cell(v) for v in value)
    if isinstance(value, dict):
        return ", ".join(f"{k} {cell(v)}".replace("_", " ") for k, v in value.items() if v is not None)
    return str(value)


def _figure(raw: Mapping[str, Any], image: Path) -> Figure:
    text = cell(raw.get("gap") or raw.get("verdict") or "")
    first = re.match(r"(\w+)[\s:.,;]*", text)
    word = "gap" if raw.get("gap") else VERDICTS.get(first[1].lower() if first else "", "unknown")
    if first and word != "unknown" and not raw.get("gap"):
        text = text[first.end() :]  # the page shows the first word as a badge
    notes = raw.get("notes") or []
    hardware = raw.get("environment") or {}
    facts = [(key, cell(value)) for key, value in hardware.items() if value is not None and key != "command"]
    told = [(key, raw[key]) for key in ("seed", "scale", "same_tokens_as_serial") if raw.get(key) is not None]
    facts += [(key.replace("_", " "), cell(value)) for key, value in told]
    figure = Figure(
        id=str(raw["id"]),
        title=str(raw.get("title") or raw["id"]),
        claim=str(raw.get("claim") or raw.get("title") or ""),
        verdict=word,
        verdict_text=text,
        notes=[cell(note) for note in (notes if isinstance(notes, list) else [notes])],
        facts=facts,
        command=str(raw.get("command") or hardware.get("command") or ""),
        compared=_compared(raw.get("paper"), raw.get("ours")),
    )
    for name, value in _sources(raw):
        figure.tables += tables_of(name, value, POINTS.get(figure.id, ("x", "y")))
    for gap in raw.get("gaps") or []:
        what = {k: v for k, v in gap.items() if k != "why"} if isinstance(gap, dict) else {}
        where = ", ".join(v if isinstance(v, str) else f"{k} {cell(v)}" for k, v in what.items())
        cell_name, *more = where.split("; ")  # cells of a piece, hundreds maybe
        where = cell_name + (f"; {len(more)} more" if more else "")
        figure.gaps.append((where, cell(gap.get("why") if isinstance(gap, dict) else gap)))
    if not any(table.chart for table in figure.tables) and image.is_file():
        figure.image = base64.b64encode(image.read_bytes()).decode()
    return figure


def _sources(raw: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Whatever may hold tables, by the name they get."""
    for key, value in raw.items():
        if key == "plot" and isinstance(value, dict):  # its loose values are for the picture
            yield from ((name, inner) for name, inner in value.items() if isinstance(inner, dict | list))
        elif key not in KNOWN or (key in ("paper", "ours") and is_rows(value)):
            yield "" if key in INNER else key, value


def _compared(paper: Any, ours: Any) -> list[tuple[str, Any, Any]]:
    left, right = dict(_leaves("", paper)), dict(_leaves("", ours))
    return [(name, left.get(name), right.get(name)) for name in dict.fromkeys([*left, *right])]


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Values of nested objects by path. Rows are not compared: they are shown as a table."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{name} {key}".strip(), inner)
    elif value is not None and not is_rows(value):
        yield name, value
