"""Start-up times: phases add up, nest and are never counted twice."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from flover.startup import StartupTimes, process_age


def test_phases_nest_and_add_up() -> None:
    times = StartupTimes(imports=2.0)
    begin = time.perf_counter()
    with times.phase("outer"):
        time.sleep(0.01)
        with times.phase("inner"):
            time.sleep(0.03)
        with times.phase("imports"):
            time.sleep(0.01)
    elapsed = time.perf_counter() - begin
    assert list(times.seconds) == ["imports", "outer", "inner"]
    assert times.seconds["inner"] >= 0.03
    assert times.seconds["imports"] >= 2.01
    assert abs(times.total - 2.0 - elapsed) < 0.005


def test_a_phase_that_fails_is_counted() -> None:
    times = StartupTimes()
    with pytest.raises(ValueError, match="no"), times.phase("a"), times.phase("b"):
        raise ValueError("no")
    with times.phase("a"):
        pass
    assert list(times.seconds) == ["a", "b"]


def test_one_line() -> None:
    times = StartupTimes()
    times.seconds = {"imports": 1.5, "weights": 2.0}
    times.nbytes = {"weights": 16_000_000_000}
    assert str(times) == "start-up 3.50 s: imports 1.50, weights 2.00 (16.00 GB, 8.0 GB/s)"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_process_age() -> None:
    one = process_age()
    time.sleep(0.1)
    assert 0.05 < process_age() - one < 5
    assert one > 0


def test_what_the_start_has_made_is_not_collected_again() -> None:
    code = (
        "import gc, flover.startup, torch; flover.startup.settle(); print(gc.get_freeze_count(), len(gc.get_objects()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    frozen, others = map(int, done.stdout.split())
    assert frozen > 50 * others


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "20000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, "")]
)
def test_threads_do_not_spin_for_long_unless_the_user_says_how(given: dict[str, str], spins: str) -> None:
    usual = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = "import os, flover; print(os.environ.get('GOMP_SPINCOUNT', ''))"
    done = subprocess.run([sys.executable, "-c", code], env=usual | given, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == spins
