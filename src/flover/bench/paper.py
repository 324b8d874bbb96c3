"""`flover bench paper`: every figure of the paper as JSON and PNG in one folder.

`ID.json` says what the paper has, what we have, on what machine, by which command, and whether the claim holds;
`ID.png` shows it. What is measured is kept cell by cell (`figures.pieces`), so a run that was interrupted, or whose
budget was too small, goes on; the figure is made of what there is, and names the rest. One that is whole and was made
with the same settings is not made again. A figure that cannot run is written with its reason in `gap`.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from flover.bench.figures import arrivals, headline, lengths, memory, progress, reorder
from flover.bench.figures.context import Bench
from flover.bench.figures.digests import Data, total
from flover.bench.figures.figure import Figure
from flover.bench.figures.scale import SCALES
from flover.bench.figures.servers import MissingError
from flover.bench.keep import check_output, provenance, write_json, write_text
from flover.bench.systems import OUTSIDE, check_name
from flover.show import nearest

WARNED = 5  # cells that a note names


@dataclass(frozen=True, slots=True)
class Entry:
    """A figure: its title, its function, and where its picture is drawn (`module:function`, loaded with matplotlib)."""

    title: str
    make: Callable[[Bench], Figure]
    draw: str


FIGURES: dict[str, Entry] = {
    "4a": Entry("Overall time of 1 to 32 requests at a fixed interval", headline.figure_4a, "pictures:draw_4a"),
    "4b": Entry("Throughput of 1 to 32 requests at a fixed interval", headline.figure_4b, "pictures:draw_4b"),
    "4c": Entry("Latency among many over latency alone", headline.figure_4c, "pictures:draw_4c"),
    "progress": Entry(
        "Progress over time: fused, concurrent instances, dynamic batching",
        progress.figure_progress,
        "pictures:draw_progress",
    ),
    "8": Entry("Poisson arrivals: iterations, overlap, speed-up", arrivals.figure_8, "pictures:draw_8"),
    "fixed": Entry("Few arrivals of several sequences each", arrivals.figure_fixed, "pictures:draw_fixed"),
    "random": Entry("Random output lengths: what reordering gains", lengths.figure_random, "pictures_kv:draw_random"),
    "reorder": Entry("Reorder plans: moves, bytes, milliseconds", reorder.figure_reorder, "pictures_kv:draw_reorder"),
    "memory": Entry("KV memory over time: live, reserved, released", memory.figure_memory, "pictures_kv:draw_memory"),
    "tp": Entry("Random lengths under tensor parallelism", lengths.figure_tp, "pictures_kv:draw_tp"),
}


def check(figures: Sequence[str], scale: str, models: Sequence[str], outside: Sequence[str] = ()) -> None:
    """ValueError naming an unknown figure, scale, model or outside system, and the known ones."""
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    check_names("figure", figures, FIGURES)
    check_names("model", models, SCALES[scale].shapes)
    for name in outside:
        if not name.startswith(OUTSIDE):
            raise ValueError(f"--outside {name!r} is not an outside system: {', '.join(OUTSIDE)}:URL")
        check_name(name)


def check_names(kind: str, names: Sequence[str], known: Collection[str]) -> None:
    """ValueError for one that is not known."""
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {kind} {name!r}{nearest(name, set(known))}; known: {', '.join(known)}")


def run_figures(
    figures: Sequence[str],
    output: Path,
    scale: str = "tiny",
    *,
    seed: int = 0,
    device: str = "auto",
    models: Sequence[str] = (),
    overwrite: bool = False,
    draws: int | None = None,
    budget: float | None = None,
    outside: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> int:
    """Make the figures (none named: all); -> how many have no gap for a verdict.

    Args:
        output: a folder, made if need be. models: those of the paper to run; none: all. Others are shown as stored.
        overwrite: make again what is there. draws: of each Poisson gap; by default the scale's.
        budget: seconds, after which nothing is measured any more; 0 makes the figures of what has been measured.
        outside: systems that are not ours, to be shown beside the others (figures 4 and progress); one that is not
            there is a gap.
        say: told what happens, a line at a time; first how long it should take.

    Raises:
        ValueError: an unknown figure, scale, model or outside system, or no such device.
    """
    check(figures, scale, models, outside)
    done = 0
    with tempfile.TemporaryDirectory() as place:
        settings = device, models, overwrite, draws, budget, outside
        bench = Bench(SCALES[scale], seed, output, Path(place), *settings, say=lambda line: say(f"  {line}"))
        output.mkdir(parents=True, exist_ok=True)
        check_output(output / "headline.md", "--output")
        stored = {name: None if overwrite else _stored(output, name, bench) for name in figures or FIGURES}
        _estimate([name for name, data in stored.items() if data is None], bench, say)
        try:
            for name, data in stored.items():
                if data is None:
                    say(f"{name}: {FIGURES[name].title}")
                    data = _make(name, bench)
                    write_json(output / f"{name}.json", data)
                else:
                    say(f"{name}: kept from an earlier run")
                say(f"  {data['verdict']}")
                done += not data["verdict"].startswith("Gap")
        finally:
            bench.servers.close()
    draw_figures(output, list(stored), say)
    return done


def draw_figures(output: Path, figures: Sequence[str], say: Callable[[str], None]) -> None:
    """The pictures of the figures that are in the folder, of their JSON alone; with 4a the headline too."""
    if find_spec("matplotlib") is None:
        say('no pictures, only JSON: matplotlib is missing (pip install -e ".[plot]"); --draw makes them later')
        return
    for name in figures or FIGURES:
        data = _read(output / f"{name}.json")
        if data and data["rows"]:
            _draw(FIGURES[name].draw, data, output / f"{name}.png")
    headline = _read(output / "4a.json")
    if headline and any(row["fused_s"] for row in headline["rows"]):
        from flover.bench.figures.summary import table

        _draw("summary:draw", headline, output / "headline.png")
        write_text(output / "headline.md", table(headline, _read(output / "4c.json")))


def _estimate(names: Sequence[str], bench: Bench, say: Callable[[str], None]) -> None:
    """Say how long what is not measured yet should take, by figure; cells that several figures share count once."""
    bench.planning = True
    known: set[tuple[str, str]] = set()
    for name in names:
        bench.todo.clear()
        _figure(name, bench)
        pieces: dict[str, list[float]] = {}
        for piece, cell, seconds in bench.todo:
            if (piece, cell) not in known:
                pieces.setdefault(piece, []).append(seconds)
            known.add((piece, cell))
        if pieces:
            parts = ", ".join(f"{piece} {sum(each):.0f} s" for piece, each in pieces.items())
            say(f"{name}: about {sum(map(sum, pieces.values())):.0f} s: {parts}")
    bench.planning = False
    bench.unmeasured.clear()


def _read(path: Path) -> Data | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def _stored(output: Path, name: str, bench: Bench) -> Data | None:
    """A finished figure of the same settings."""
    data = _read(output / f"{name}.json")
    same = data is not None and data.get("settings") == bench.identity and data.get("complete")
    return data if same else None


def _figure(name: str, bench: Bench) -> Figure:
    """One that cannot run is a gap."""
    try:
        return FIGURES[name].make(bench)
    except MissingError as error:
        why = str(error)
    except (MemoryError, torch.OutOfMemoryError) as error:
        bench.servers.close()
        why = f"out of memory: {' '.join(str(error).split())}"
    return Figure({}, {}, f"Gap: {why}", [], gaps=[{"what": "the figure", "why": why}])


def _make(name: str, bench: Bench) -> Data:
    bench.unmeasured.clear()
    bench.stood_still.clear()
    bench.pieces.commits.clear()
    figure = _figure(name, bench)
    gaps = figure.gaps + bench.unmeasured
    if figure.verdict.startswith("Gap") and gaps and gaps[0]["why"] not in figure.verdict:
        figure.verdict += f" {gaps[0]['why']}"
    if bench.stood_still:
        figure.notes.append(_warning(bench.stood_still))
    environment = provenance(bench.device)
    environment["commit"] = ", ".join(sorted(filter(None, bench.pieces.commits))) or environment["commit"]
    command = re.sub(r" --budget[ =]\S+", "", environment.pop("command"))  # which only says how much of it was measured
    stand_in = (
        f"Scale {bench.scale.name}: random models of two layers stand in for the paper's, and the fastest of"
        f" {bench.scale.runs} runs counts; compare shapes and ratios."
    )
    data: Data = {
        "id": name,
        "title": FIGURES[name].title,
        "claim": (FIGURES[name].make.__doc__ or "").strip(),
        "verdict": figure.verdict,
        "paper": figure.paper,
        "ours": figure.ours,
        "environment": environment,
        "command": command,
        "seed": bench.seed,
        "scale": bench.scale.name,
        "settings": bench.identity,
        "notes": figure.notes if bench.scale.name == "full" else [stand_in, *figure.notes],
        "same_tokens_as_serial": _same(figure.tokens),
        "rows": figure.rows,
        "tokens": figure.tokens,
        "gaps": gaps,
        "complete": not bench.unmeasured and not figure.verdict.startswith("Gap"),
        "plot": figure.plot,
    }
    if figure.verdict.startswith("Gap"):
        data["gap"] = figure.verdict.removeprefix("Gap: ")
    normal: Data = json.loads(json.dumps(data))  # as the next run will read it
    return normal


def _warning(cells: Mapping[str, tuple[float, float]]) -> str:
    """Which cells stood still, the longest first."""
    worst = sorted(cells.items(), key=lambda item: -item[1][0])
    named = [f"{cell} ({long:.2f} s, median {1e3 * median:.2g} ms)" for cell, (long, median) in worst[:WARNED]]
    more = f"; {len(worst) - WARNED} more" if len(worst) > WARNED else ""
    return (
        f"A step stood still, as on a machine that others disturb; do not trust these cells: {'; '.join(named)}{more}."
    )


def _same(tokens: Sequence[Data]) -> Data | None:
    """Over all runs of a figure; None where none generated a token."""
    if not tokens:
        return None
    data = total(tokens)
    return data | {"share_identical": data["identical"] / max(data["requests"], 1)}


def _draw(where: str, data: Data, path: Path) -> None:
    from importlib import import_module

    from flover.bench.figures.style import FONT, save

    module, _, function = where.partition(":")
    import matplotlib

    draw: Any = getattr(import_module(f"flover.bench.figures.{module}"), function)
    with matplotlib.rc_context(FONT):
        save(draw(data), path)
