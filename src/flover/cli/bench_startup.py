"""`flover bench startup`: a table of phases, with nothing compiled and with the kernels that this left."""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flover.bench.keep import check_output, provenance, write_json
from flover.bench.startup import fresh
from flover.config import EngineConfig
from flover.engine.engine import survey

ENDS = {"ready_s": "ready", "first_token_s": "first token", "second_token_s": "second token"}


def run_startup(repeats: int, output: Path | None, options: Mapping[str, Any]) -> int:
    """One process with an empty Triton cache, then `repeats` with the one that it left."""
    if repeats < 1:
        raise ValueError(f"--num-repeats must be at least 1, got {repeats}")
    check_output(output, "--output-json")
    survey(EngineConfig(**options))  # a mistake shows here rather than in another process
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="flover-triton-") as cache, console.status("a fresh process") as status:
        cold = fresh(options, cache)
        runs = []
        for i in range(repeats):
            status.update(f"a fresh process, {i + 1} of {repeats} with its kernels compiled")
            runs.append(fresh(options, cache))
    middle = statistics.median_low(run["first_token_s"] for run in runs)
    warm = next(run for run in runs if run["first_token_s"] == middle)
    _print(cold, warm, repeats)
    if output is not None:
        result = {"environment": provenance(cold["device"]), "settings": dict(options), "cold": cold, "warm": warm}
        write_json(output, {**result, "runs": runs})
        print(f"written: {output}", file=sys.stderr)
    return 0


def _print(cold: Mapping[str, Any], warm: Mapping[str, Any], repeats: int) -> None:
    table = Table("phase", box=None, pad_edge=False)
    for title in ("nothing compiled", f"compiled before, median of {repeats}"):
        table.add_column(title, justify="right")
    table.add_column("")
    for phase, seconds in warm["phases_s"].items():
        size = warm["nbytes"].get(phase)
        amount = "" if size is None else f"{size / 1e9:.3f} GB, {size / 1e9 / max(seconds, 1e-3):.2f} GB/s"
        table.add_row(phase, _seconds(cold["phases_s"].get(phase, 0.0)), _seconds(seconds), amount)
    table.add_row("rest", *(_seconds(run["ready_s"] - sum(run["phases_s"].values())) for run in (cold, warm)))
    table.add_section()
    for key, label in ENDS.items():
        table.add_row(label, _seconds(cold[key]), _seconds(warm[key]), "after the process began")
    Console(highlight=False).print(table)


def _seconds(value: float) -> str:
    return f"{value:.3f} s"
