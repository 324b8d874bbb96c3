"""`flover bench report`: the figures of a folder as one HTML page."""

from __future__ import annotations

from pathlib import Path

from flover.bench.report import report


def run_report(folder: Path, output: Path) -> int:
    """Write the page and say where it is."""
    if output.is_dir() or not output.parent.is_dir():
        raise ValueError(f"--output: {output} is not a file in a folder that exists")
    count = report(folder, output)
    print(f"{count} figure{'s' * (count != 1)}: {output}")
    return 0
