"""`flover bench paper`: the paper's figures, one line for each thing that happens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path


def run_paper(
    figures: Sequence[str],
    output: Path,
    scale: str,
    seed: int,
    device: str,
    models: Sequence[str],
    draws: int | None,
    overwrite: bool,
) -> int:
    """-> 0; gaps are in the figures. ValueError for what is not known."""
    from flover.bench.paper import check, run_figures

    check(figures, scale, models)
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output: {output} is a file; give a folder")
    started = time.monotonic()

    def say(line: str) -> None:
        print(line, flush=True)

    run_figures(
        figures, output, scale, seed=seed, device=device, models=models, draws=draws, overwrite=overwrite, say=say
    )
    say(f"{output}: {time.monotonic() - started:.0f} s; flover bench report {output} makes a page of it")
    return 0
