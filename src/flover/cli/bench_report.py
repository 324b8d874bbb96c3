"""`flover bench report`: the figures of a folder as one HTML page."""

from __future__ import annotations

from pathlib import Path

from flover.bench.keep import check_output
from flover.bench.report import report


def run_report(folder: Path, output: Path | None = None) -> int:
    """Write the page, beside its figures unless told where, and say where it is."""
    check_output(output, "--output")
    output = output or folder / "report.html"
    count = report(folder, output)
    print(f"{count} figure{'s' * (count != 1)}: {output}")
    return 0
