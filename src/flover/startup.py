"""Where the time of a start goes: seconds by phase, in the order in which the phases began.

Phases may nest: what an inner one takes is not counted again in the outer one.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def process_age() -> float:
    """Seconds since this process was created (Linux), else 0. Resolution: 10 ms."""
    try:
        fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()  # from the third on
        started = int(fields[22 - 3]) / os.sysconf("SC_CLK_TCK")  # seconds from boot
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - started, 0.0)
    except (OSError, AttributeError, IndexError, ValueError):
        return 0.0


def settle() -> None:
    """Leave what the start has made out of later garbage collections, in a process that serves until it ends.

    A collection that looks at all of it takes 50 ms and more, and until it has ended no step is submitted.
    """
    gc.collect()
    gc.freeze()


class StartupTimes:
    """`seconds` by phase; `nbytes` of the phases that moved or took memory.

    Args:
        imports: seconds from the creation of the process until flover was imported; 0 if unknown.
    """

    def __init__(self, imports: float = 0.0) -> None:
        self.seconds: dict[str, float] = {"imports": imports} if imports else {}
        self.nbytes: dict[str, int] = {}
        self._inner: list[float] = []  # seconds of the phases inside each open one

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time that the body takes to a phase."""
        self.seconds.setdefault(name, 0.0)
        self._inner.append(0.0)
        begin = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - begin
            self.seconds[name] += elapsed - self._inner.pop()
            if self._inner:
                self._inner[-1] += elapsed

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def table(self) -> list[tuple[str, float, str]]:
        """Phase, seconds, and bytes with bytes per second where they are known."""
        return [(name, seconds, self._amount(name)) for name, seconds in self.seconds.items()]

    def _amount(self, name: str) -> str:
        size = self.nbytes.get(name)
        return "" if size is None else f"{size / 1e9:.2f} GB, {size / 1e9 / max(self.seconds[name], 1e-9):.1f} GB/s"

    def __str__(self) -> str:
        """One line, without what takes no time."""
        phases = [row for row in self.table() if row[1] >= 0.005]
        parts = [f"{name} {seconds:.2f}" + (f" ({amount})" if amount else "") for name, seconds, amount in phases]
        return f"start-up {self.total:.2f} s: {', '.join(parts)}"
