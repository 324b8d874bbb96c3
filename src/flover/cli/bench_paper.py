"""`flover bench paper`: the paper's figures, one line for each thing that happens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run_paper(
    figures: Sequence[str],
    output: Path,
    scale: str,
    seed: int,
    device: str,
    models: Sequence[str],
    draws: int | None,
    budget: float | None,
    outside: Sequence[str],
    overwrite: bool,
) -> int:
    """-> 0; gaps are in the figures. ValueError for what is not known."""
    from flover.bench.paper import check, run_figures

    check(figures, scale, models, outside)
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output: {output} is a file; give a folder")
    started = time.monotonic()

    def say(line: str) -> None:
        print(line, flush=True)

    options: dict[str, Any] = {"seed": seed, "device": device, "models": models, "draws": draws, "budget": budget}
    try:
        run_figures(figures, output, scale, **options, outside=outside, overwrite=overwrite, say=say)
    except KeyboardInterrupt:
        say(f"interrupted: what was measured is in {output}, and the same command goes on")
        raise
    say(f"{output}: {time.monotonic() - started:.0f} s; flover bench report {output} makes a page of it")
    return 0


def draw_paper(figures: Sequence[str], output: Path) -> int:
    """-> 0. ValueError for a figure that is not known or not there."""
    from flover.bench.paper import FIGURES, check_names, draw_figures

    check_names("figure", figures, FIGURES)
    missing = [name for name in figures or FIGURES if not (output / f"{name}.json").is_file()]
    if (figures and missing) or len(missing) == len(FIGURES):
        raise ValueError(f"--output: {output} has no {', '.join(f'{name}.json' for name in missing)}")
    draw_figures(output, figures, print)
    return 0
