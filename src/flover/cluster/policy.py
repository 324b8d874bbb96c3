"""Which replica gets a request, and how many replicas there should be. Pure functions: Ray and the simulation ask them.

Routing by prefix needs no shared state: rendezvous hashing (Thaler and Ravishankar 1998) names the same few homes of a
prefix on every router, and a bound on their load (Mirrokni et al. 2018) sends what they cannot take to the better of
two others (Mitzenmacher 2001).
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import deque
from collections.abc import Sequence

HOMES = 2
SLACK, ROOM = 1.25, 40.0  # a home may have that many times the mean load, and that much more: some 2,000 tokens


def load(rows: float, waiting_tokens: float) -> float:
    """A replica's load: requests it has, and prompt tokens that wait there. TTFT is decided by the second: 50 of them
    weigh as much as a row.
    """
    return rows + waiting_tokens / 50


def homes(prefix: bytes, replicas: Sequence[str]) -> list[int]:
    """Indices of a prefix's homes, best first; a replica that comes or goes moves only what was or will be its own."""

    def weight(index: int) -> bytes:
        return hashlib.blake2b(prefix, digest_size=8, key=replicas[index].encode()[:64]).digest()

    return sorted(range(len(replicas)), key=weight, reverse=True)[:HOMES]


def choose(loads: Sequence[float], homes: Sequence[int], mean: float, rng: random.Random) -> int:
    """The less loaded home if it has at most SLACK times the mean load and ROOM; else the better of two at random."""
    best = min(homes, key=lambda i: loads[i], default=None)
    if best is not None and loads[best] <= SLACK * mean + ROOM:
        return best
    return power_of_two(loads, rng)


def power_of_two(loads: Sequence[float], rng: random.Random) -> int:
    """The less loaded of two at random."""
    count = len(loads)
    first, second = int(rng.random() * count), int(rng.random() * count)
    return first if loads[first] <= loads[second] else second


def desired_replicas(
    current: int, queued_tokens: float, rows: float, max_rows: float, target_queued_tokens: float, least: int, most: int
) -> int:
    """Replicas for a load; at most twice what works already, at a time.

    Args:
        current: that work.
        queued_tokens: prompt tokens without a first token, over all replicas. rows: that run, over all replicas.
        max_rows: of a replica. target_queued_tokens: that a replica should have waiting at most.
    """
    by_queue = queued_tokens / target_queued_tokens
    by_rows = rows / (0.5 * max_rows)  # more are started before a queue forms
    wanted = math.ceil(min(max(by_queue, by_rows), 2 * current))
    return min(max(wanted, least), most)


class Steady:
    """The most that was wanted within some seconds: what is given up is only what nobody has missed for as long."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._wanted: deque[tuple[float, int]] = deque()

    def __call__(self, now: float, wanted: int) -> int:
        self._wanted.append((now, wanted))
        while self._wanted[0][0] < now - self._seconds:
            self._wanted.popleft()
        return max(wanted for _, wanted in self._wanted)
