"""`flover bench report`: the figures of a folder as one HTML page."""

from __future__ import annotations

from pathlib import Path

from flover.bench.report import report


def run_report(folder: Path, output: Path | None = None) -> int:
    """Write the page, beside its figures unless told where, and say where it is."""
    if output is None:
        output = folder / "report.html"
    elif output.is_dir() or not output.parent.is_dir():
        raise ValueError(f"--output: {output} is not a file in a folder that exists")
    count = report(folder, output)
    print(f"{count} figure{'s' * (count != 1)}: {output}")
    return 0
