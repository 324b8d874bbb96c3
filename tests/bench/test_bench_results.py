"""Numbers of a run against hand-made records; confidence intervals against tables; what is printed and kept."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import pytest
from scipy import stats

from flover.bench import keep
from flover.bench.keep import check_output, write_json
from flover.bench.records import Record, Run
from flover.bench.results import (
    Estimate,
    block,
    estimates_json,
    measure,
    over_repeats,
    parse_goals,
    run_json,
    t_quantile,
)

RUN = Run(
    "hand-made",
    [
        Record(1.0, 10, [2.0, 2.5, 3.5], [5, 6, 7]),  # TTFT 1, TPOT 0.75, E2E 2.5
        Record(2.0, 20, [5.0], [8]),  # TTFT 3, no gap, E2E 3
        Record(3.0, 30, [], error="boom"),
        Record(3.0, 40, [3.5, 4.5], [9], error="cut"),
    ],
)


def test_numbers() -> None:
    numbers = measure(RUN)
    assert {name: numbers[name] for name in list(numbers)[:5]} == {
        "completed": 2,
        "failed": 2,
        "duration": 4.0,  # from the first arrival to the last token, of whichever request
        "total_input_tokens": 30,
        "total_output_tokens": 4,
    }
    assert numbers["request_throughput"] == 0.5
    assert numbers["output_throughput"] == 1.0
    assert numbers["total_token_throughput"] == 8.5
    assert "request_goodput" not in numbers
    assert [numbers[f"{word}_ttft_ms"] for word in ("mean", "median", "p99")] == [2000, 2000, 3000]
    assert [numbers[f"{word}_tpot_ms"] for word in ("mean", "median", "p99")] == [750, 750, 750]
    assert [numbers[f"{word}_itl_ms"] for word in ("mean", "median", "p99")] == [750, 750, 1000]
    assert [numbers[f"{word}_e2el_ms"] for word in ("mean", "median", "p99")] == [2750, 2750, 3000]


@pytest.mark.parametrize(
    ("goals", "met"),
    [("ttft:1000", 1), ("ttft:3000", 2), ("tpot:100", 1), ("ttft:3000 tpot:750", 2), ("e2el:2500,ttft:999", 0)],
)
def test_goodput(goals: str, met: int) -> None:
    assert measure(RUN, parse_goals([goals]))["request_goodput"] == met / 4


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:x", "ttft:0", "ttft:nan", "ttft:inf", "itl:5"])
def test_bad_goals(text: str) -> None:
    with pytest.raises(ValueError, match=f"NAME:MILLISECONDS .* ttft, tpot, e2el, got '{text}'"):
        parse_goals(["tpot:5", text])
    assert parse_goals(["ttft:500 tpot:50", "e2el:1e4"]) == {"ttft": 0.5, "tpot": 0.05, "e2el": 10.0}
    assert parse_goals([]) == {}


def test_nothing_succeeded() -> None:
    numbers = measure(Run("x", [Record(0.0, 3, error="no")]), {"ttft": 1.0})
    assert numbers["completed"] == numbers["request_goodput"] == numbers["mean_ttft_ms"] == 0
    assert all(math.isfinite(value) for value in numbers.values())
    assert measure(Run("x", []))["failed"] == 0


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 9, 10, 29, 30, 200])
@pytest.mark.parametrize("p", [0.75, 0.9, 0.975, 0.995])
def test_t_quantile(df: int, p: float) -> None:
    assert t_quantile(p, df) == pytest.approx(float(stats.t.ppf(p, df)), rel=1e-9)


def test_interval() -> None:
    found = Estimate.of([10.0, 12.0, 14.0])
    assert found.mean == 12
    assert found.half == pytest.approx(4.302653 * 2 / math.sqrt(3), rel=1e-6)  # t of 2 degrees, printed in any table
    low, high = stats.t.interval(0.95, 2, 12, stats.sem([10.0, 12.0, 14.0]))
    assert estimates_json({"x": found})["x"]["ci95"] == pytest.approx([low, high])
    assert Estimate.of([3.0]) == Estimate(3.0, None)
    assert estimates_json({"x": Estimate(3.0)}) == {"x": {"mean": 3.0, "ci95": None}}


def test_block_has_the_labels_people_grep_for() -> None:
    text = block(over_repeats([measure(RUN, {"ttft": 1.0})]))
    lines = text.splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============"
    assert lines[1:10] == [
        "Successful requests:                    2",
        "Failed requests:                        2",
        "Benchmark duration (s):                 4.00",
        "Total input tokens:                     30",
        "Total generated tokens:                 4",
        "Request throughput (req/s):             0.50",
        "Request goodput (req/s):                0.25",
        "Output token throughput (tok/s):        1.00",
        "Total Token throughput (tok/s):         8.50",
    ]
    assert "---------------Time to First Token----------------\nMean TTFT (ms):                         2000.00" in text
    assert "-----Time per Output Token (excl. 1st token)------\nMean TPOT (ms): " in text
    for label in ("Median TTFT (ms):", "P99 TTFT (ms):", "P99 TPOT (ms):", "Mean ITL (ms):", "P99 E2EL (ms):"):
        assert sum(line.startswith(label) for line in lines) == 1
    assert lines[-1] == "=" * 50
    assert {len(line) for line in lines if line[0] in "-="} == {50}


def test_block_of_repeats() -> None:
    other = Run("x", [Record(0.0, 10, [1.0, 2.0], [1, 2])])
    text = block(over_repeats([measure(RUN), measure(other)]))
    assert "Benchmark duration (s):                 3.00       ± 13" in text  # 12.706 * sqrt(2) / sqrt(2)
    assert "Successful requests:                    1.50       ± 6.4" in text


def test_the_commit_is_the_package_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "flover"
    (package / "bench").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(keep, "__file__", str(package / "bench" / "keep.py"))

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=x", "-c", "user.email=x@x"]
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    git("init")
    git("commit", "--allow-empty", "-m", "a project that flover is installed in")
    assert keep._commit() is None
    git("add", ".")
    git("commit", "-m", "flover's own")
    assert keep._commit() == git("rev-parse", "--short", "HEAD").strip()
    (package / "__init__.py").write_text("x = 1")
    assert keep._commit() == git("rev-parse", "--short", "HEAD").strip() + "-dirty"
    (tmp_path / ".git").rename(tmp_path / "git")
    assert keep._commit() is None


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_json(path, run_json(RUN, measure(RUN), 7))
    kept = json.loads(path.read_text())
    assert (kept["system"], kept["seed"], kept["completed"]) == ("hand-made", 7, 2)
    assert kept["requests"][0] == {"arrival": 1.0, "num_prompt": 10, "times": [2.0, 2.5, 3.5], "error": None}
    assert kept["requests"][2] == {"arrival": 3.0, "num_prompt": 30, "times": [], "error": "boom"}
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert json.loads(path.read_text()) == kept, "whole or not at all"
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_an_output_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    check_output(None, "--output")
    check_output(tmp_path / "new.json", "--output")
    assert not list(tmp_path.iterdir())
    (tmp_path / "old.json").write_text("1")
    check_output(tmp_path / "old.json", "--output")
    assert (tmp_path / "old.json").read_text() == "1"
    for path, said in (
        (tmp_path, f"--output: {tmp_path} is a folder"),
        (Path("/dev/null"), "--output: /dev/null is no regular file"),
        (tmp_path / "a" / "r.json", f"--output: folder {tmp_path}/a does not exist"),
        (Path("/proc/r.json"), "--output: /proc/r.json cannot be written: No such file or directory"),
    ):
        with pytest.raises(ValueError, match=f"^{said}$"):
            check_output(path, "--output")
