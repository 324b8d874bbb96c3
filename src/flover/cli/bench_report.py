"""`flover bench report`: the figures of a folder as one HTML page."""

from __future__ import annotations

from pathlib import Path

from flover.bench.keep import check_output
from flover.bench.report import report


def run_report(folder: Path, output: Path) -> int:
    """Write the page and say where it is."""
    check_output(output, "--output")
    count = report(folder, output)
    print(f"{count} figure{'s' * (count != 1)}: {output}")
    return 0
