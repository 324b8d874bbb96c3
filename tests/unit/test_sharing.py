"""Scheduling under load, simulated: a fake clock, a device that takes as long as a formula says, no model.

Fair sharing between clients, priorities that age, and steps that keep an ITL budget.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from flover.config import KVConfig, SchedulerConfig
from flover.engine.batch import StepResult
from flover.engine.cost import StepCost
from flover.engine.policy import PRIORITY_SECONDS
from flover.engine.scheduler import Scheduler
from flover.engine.step import StepOutput
from flover.kv.paged import PagedLayout
from flover.request import Request, RowSampling

A, B, C = 0.004, 0.0002, 0.00005  # seconds of a step, per decode row, per prefill token


class Simulation:
    """One scheduler and a device whose steps take A + B x decode rows + C x prefill tokens, more or less."""

    def __init__(self, rows: int = 8, scatter: float = 0.0, tokens: int = 2048, **settings: object) -> None:
        self.now, self.scatter, self.random = 0.0, scatter, np.random.default_rng(7)
        config = SchedulerConfig(rows, tokens, 32_768, **settings)  # type: ignore[arg-type]
        kv = KVConfig("paged", "move", 16, 8192, "float32", 1, False)
        self.scheduler = Scheduler(config, kv, PagedLayout(8192, 16, enable_prefix_caching=False), lambda: self.now)
        self.num_requests = 0
        self.took: list[tuple[float, int, int]] = []  # seconds, decode rows, prefill tokens of each step

    def add(self, prompt: int, output: int, client: str = "", priority: int = 0) -> Request:
        name = f"r{self.num_requests}"
        self.num_requests += 1
        request = Request(name, [1] * prompt, RowSampling(0), output, client=client, priority=priority)
        request.arrival_time = self.now
        self.scheduler.add(request)
        return request

    def step(self) -> StepOutput:
        step = self.scheduler.schedule()
        assert step is not None, "work, and no progress"
        stats = step.stats
        seconds = A + B * stats.num_decode_tokens + C * stats.num_prefill_tokens
        seconds *= 1 + self.scatter * self.random.standard_normal()
        self.now += seconds
        self.took.append((seconds, stats.num_decode_tokens, stats.num_prefill_tokens))
        count = len(step.sampled)
        return self.scheduler.update(step, StepResult(np.full(count, 5), np.ones(count, bool)))

    def run(self, until: Callable[[], bool], limit: int = 50_000) -> None:
        for _ in range(limit):
            if until():
                return
            self.step()
        raise AssertionError("not reached")


def flood(simulation: Simulation, seconds: float, order: list[str]) -> Counter[str]:
    """Keep each client's queue as full as `order` says; -> output tokens by client."""
    owner: dict[str, str] = {}
    got: Counter[str] = Counter()
    for client in order:
        owner[simulation.add(100, 50, client).request_id] = client
    while simulation.now < seconds:
        output = simulation.step()
        for request in output.requests:
            got[owner[request.request_id]] += 1
        for request in output.finished:  # each client asks again at once
            client = owner[request.request_id]
            owner[simulation.add(100, 50, client).request_id] = client
    return got


def test_two_keys_at_100_to_1_get_the_same_share() -> None:
    order = ["loud"] * 1000 + ["quiet"] * 10
    fair = flood(Simulation(order="fair"), 60, order)
    assert 0.9 < fair["quiet"] / fair["loud"] < 1.1
    unfair = flood(Simulation(order="fcfs"), 60, order)
    assert unfair["quiet"] / unfair["loud"] < 0.1  # else the test shows nothing


def test_counters_of_those_who_wait_stay_within_the_bound_of_the_paper() -> None:
    simulation = Simulation(order="fair", rows=8)
    for i in range(600):
        simulation.add(40 + 300 * (i % 5), 10 + 30 * (i % 3), "ab"[i % 7 == 0])
    queue = simulation.scheduler.admission.waiting
    bound = 2 * max(40 + 1200, 2 * 8 * 70)
    while len([heap for heap in queue._heaps if heap]) == 2:
        simulation.step()
        assert abs(queue.served[0] - queue.served[1]) <= bound


def test_idleness_earns_no_credit() -> None:
    simulation = Simulation(order="fair", rows=2)
    for _ in range(100):
        simulation.add(50, 20, "busy")
    simulation.run(lambda: simulation.now > 2)
    late = [simulation.add(50, 20, "late") for _ in range(30)]
    busy = [r for r in simulation.scheduler.requests.values() if r.client == "busy"]
    simulation.run(lambda: sum(r.finished for r in late) >= 15)
    assert 10 <= sum(r.finished for r in busy) <= 20  # half each from now on, and not thirty for the newcomer


def test_priorities_age() -> None:
    simulation = Simulation(order="fair", rows=1)
    low = simulation.add(16, 20, priority=1)
    blocker = simulation.add(16, 20)  # a higher priority, that came as early: it goes first
    simulation.run(lambda: blocker.finished)
    assert low.row < 0
    while not low.finished:
        assert simulation.now < 2 * PRIORITY_SECONDS  # a stream of higher priorities does not hold it for ever
        if simulation.scheduler.admission.num_waiting < 3:
            simulation.add(16, 20)
        simulation.step()
    assert simulation.now >= PRIORITY_SECONDS


def test_a_long_prompt_in_a_flood_of_short_ones_starts() -> None:
    simulation = Simulation(order="fair")
    for _ in range(50):
        simulation.add(20, 20)
    long = simulation.add(30_000, 1)
    while not long.first_scheduled_time:
        assert len(simulation.took) < 200
        simulation.add(20, 20)
        simulation.step()


@pytest.mark.parametrize("mode", ["mixed", "separate"])
@pytest.mark.parametrize("budget", [15.0, 40.0])
def test_a_prefill_holds_decode_no_longer_than_the_budget(mode: str, budget: float) -> None:
    simulation = Simulation(rows=40, scatter=0.03, tokens=8192, itl_budget=budget, prefill_mode=mode)
    for _ in range(32):
        simulation.add(20, 4000)
    simulation.run(lambda: len(simulation.scheduler.table) == 32 and simulation.took[-1][1] == 32)
    simulation.add(600, 1)  # from this one it learns what prefill costs
    simulation.run(lambda: len(simulation.took) > 60)
    begin = len(simulation.took)
    long = simulation.add(30_000, 1)
    simulation.run(lambda: long.finished)
    steps = simulation.took[begin:]
    assert max(seconds for seconds, _, prefill in steps if prefill) < 1.15 * budget / 1e3
    ideal = 30_000 * C / (budget / 1e3 - A - B * 32) * (budget / 1e3)
    assert simulation.now - long.arrival_time < (3 if mode == "separate" else 1.6) * ideal  # and prefill has its own
    without = Simulation(rows=40, tokens=8192)
    for _ in range(32):
        without.add(20, 4000)
    without.add(30_000, 1)
    without.run(lambda: len(without.took) > 3)
    assert max(seconds for seconds, _, _ in without.took) > 3 * budget / 1e3  # else the budget changed nothing


def test_decode_never_starves_prefill() -> None:
    """A budget that decode alone exceeds still leaves a chunk of progress in each step."""
    simulation = Simulation(rows=40, itl_budget=1.0)
    for _ in range(32):
        simulation.add(20, 1000)
    simulation.run(lambda: len(simulation.took) > 50)
    long = simulation.add(1600, 1)
    begin = len(simulation.took)
    simulation.run(lambda: long.finished)
    assert len(simulation.took) - begin <= 1600 // 16 + 2


def test_the_fit_finds_the_coefficients_and_follows_them() -> None:
    cost, random = StepCost(0.05), np.random.default_rng(1)
    for factor in (1.0, 3.0):
        for _ in range(400):
            decode, prefill = int(random.integers(0, 64)), int(random.integers(0, 2) * random.integers(1, 512))
            seconds = factor * (A + B * decode + C * prefill)
            cost.observe(decode, prefill, seconds * (1 + 0.02 * random.standard_normal()))
        a, b, c = cost.coefficients()
        assert a == pytest.approx(factor * A, rel=0.15)
        assert b == pytest.approx(factor * B, rel=0.15)
        assert c == pytest.approx(factor * C, rel=0.05)
