"""What a figure of the paper is made into."""

from __future__ import annotations

from dataclasses import dataclass, field

from flover.bench.figures.digests import Data


@dataclass(slots=True)
class Figure:
    """What a figure function gives. `paper` and `ours` have the same keys where they can be compared.

    Args:
        verdict: begins with "Reproduced", "Partly" or "No", or with "Gap" if nothing could run.
        rows: of the figure's table, flat.
        tokens: rows of `agree`, one a run; none where no token is generated.
        plot: what the picture needs beside the rows.
    """

    paper: Data
    ours: Data
    verdict: str
    rows: list[Data]
    tokens: list[Data] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    gaps: list[Data] = field(default_factory=list)
    plot: Data = field(default_factory=dict)


def grade(*held: bool) -> str:
    """The first word of a verdict: all, some or none of what was claimed."""
    return "Reproduced" if all(held) else "Partly" if any(held) else "No"
