"""Routers of the fluid model: which replica each request of a tick goes to, by the policies of `cluster.policy`."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence

import numpy as np
from _scaling_rows import Floats, Ints

from flover.cluster import policy

# replicas, groups, replicas' loads, prompts -> a replica each
Router = Callable[[int, Ints, list[float], Floats], Ints]


def round_robin() -> Router:
    turn = [0]

    def route(active: int, groups: Ints, loads: list[float], prompts: Floats) -> Ints:
        turn[0] += len(groups)
        return np.arange(turn[0] - len(groups), turn[0]) % active

    return route


def least_loaded() -> Router:
    def route(active: int, groups: Ints, loads: list[float], prompts: Floats) -> Ints:
        adds = policy.load(1, prompts).tolist()
        heap = [(load, i) for i, load in enumerate(loads)]
        heapq.heapify(heap)
        at = np.empty(len(groups), dtype=int)
        for n in range(len(groups)):
            load, at[n] = heap[0]
            heapq.heapreplace(heap, (load + adds[n], int(at[n])))
        return at

    return route


def power_of_two_choices(seed: int = 0) -> Router:
    rng = random.Random(seed)

    def route(active: int, groups: Ints, loads: list[float], prompts: Floats) -> Ints:
        adds = policy.load(1, prompts).tolist()
        at = np.empty(len(groups), dtype=int)
        for n in range(len(groups)):
            at[n] = chosen = policy.power_of_two(loads, rng)
            loads[chosen] += adds[n]
        return at

    return route


def prefix_affinity(homes: Sequence[Sequence[int]], seed: int = 0) -> Router:
    """homes: of each group."""
    rng = random.Random(seed)

    def route(active: int, groups: Ints, loads: list[float], prompts: Floats) -> Ints:
        adds = policy.load(1, prompts).tolist()
        at = np.empty(len(groups), dtype=int)
        mean = sum(loads) / len(loads)
        for n, group in enumerate(groups.tolist()):
            at[n] = chosen = policy.choose(loads, homes[group], mean, rng)
            loads[chosen] += adds[n]
        return at

    return route
