"""What a workload takes in theory: serial as a queue, fused by the bytes of its steps, and the arrivals' own bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from flover.bench.records import Job


def queue_ends(arrivals: Sequence[float], service: Sequence[float]) -> list[float]:
    """When each request ends with one server, first come first served."""
    ends: list[float] = []
    for arrival, seconds in zip(arrivals, service):
        ends.append(max(arrival, ends[-1] if ends else 0.0) + seconds)
    return ends


def arrival_bound(count: int, share: float) -> float:
    """Most that `count` requests, `share` of the single-request time apart, can gain over serial.

    The last one arrives (count - 1) share after the first and takes 1 itself; serial takes max(count, the same).
    """
    last = (count - 1) * share + 1
    return max(count, last) / last


class Fused(NamedTuple):
    """Seconds, steps that computed something, row-steps, and mean seconds from arrival to last token."""

    seconds: float
    steps: int
    row_steps: int
    latency: float


def simulate(jobs: Sequence[Job], step: Callable[[int, int], float]) -> Fused:
    """Temporal fusion without any overhead.

    A request joins at the first step that begins after it arrives; that step, its prefill, gives its first token.

    Args:
        jobs: ascending in arrival. step: seconds of a step of (rows, tokens that they hold).
    """
    now, waiting, steps, row_steps, latency = 0.0, 0, 0, 0, 0.0
    held: list[list[int]] = []  # tokens held, tokens left, which job
    while held or waiting < len(jobs):
        if not held:
            now = max(now, jobs[waiting].arrival)
        while waiting < len(jobs) and jobs[waiting].arrival <= now:
            held.append([len(jobs[waiting].prompt), jobs[waiting].num_output, waiting])
            waiting += 1
        now += step(len(held), sum(row[0] for row in held))
        steps, row_steps = steps + 1, row_steps + len(held)
        for row in held:
            row[0], row[1] = row[0] + 1, row[1] - 1
        latency += sum(now - jobs[row[2]].arrival for row in held if not row[1])
        held = [row for row in held if row[1]]
    return Fused(now - jobs[0].arrival, steps, row_steps, latency / len(jobs))
