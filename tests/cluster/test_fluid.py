"""The fluid model of benchmarks/scaling.py against the real scheduler on a virtual clock."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def curves() -> Iterator[ModuleType]:
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    import _scaling_curves

    yield _scaling_curves
    sys.path.remove(folder)


@pytest.mark.parametrize("rate", [25, 90])  # requests/s of a replica: hardly any waits, and more than it can serve
def test_it_is_within_a_tenth_of_the_scheduler(curves: ModuleType, rate: int) -> None:
    steps, load = curves.table(), curves.make_load(600, rate * 2, seed=5)
    fluid = curves.Fluid(steps, 64, 512, 2).run(load, curves.round_robin())
    real = curves.serve(steps, load, fluid.replica, 64, 512, 600_000)
    ours, truth = curves.summary(load, fluid), curves.summary(load, real)
    assert ours == pytest.approx(truth, rel=0.1)


def test_it_knows_prefixes_and_scales(curves: ModuleType) -> None:
    load = curves.make_load(400, 40, seed=6, shared=1000)
    alone = curves.Fluid(curves.table(), 64, 2048, 2).run(load, curves.round_robin())
    cached = curves.Fluid(curves.table(), 64, 2048, 2, cached_groups=60).run(load, curves.round_robin())
    assert alone.hits == 0 < cached.hits < 1
    assert curves.summary(load, cached)["mean_ttft_ms"] < curves.summary(load, alone)["mean_ttft_ms"]
    scaling = curves.Scaling(lambda now, working, tokens, rows: 2 if now < 5 else 1, 2, working=1, start_up=2.0)
    curves.Fluid(curves.table(), 64, 2048, 2).run(load, curves.least_loaded(), scaling=scaling)
    working = {round(now): count for now, count, _, _ in scaling.trace}
    assert working[1] == 1
    assert working[4] == 2
