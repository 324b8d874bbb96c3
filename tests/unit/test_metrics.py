"""The latency summary, and the timeline as JSON and as a picture."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest

from flover.metrics import Distribution, StepStats, Timeline, check_timeline_path, summary
from flover.request import CompletionOutput, RequestMetrics, RequestOutput


def trace(num_rows: int, num_steps: int) -> list[StepStats]:
    """Every kind of event: joins, leaves of each reason, moves, dead rows, rows that wait, a step with none."""
    reasons = ["length", "stop", "abort", "error", "preempted"]
    steps = []
    for i in range(num_steps):
        count = 0 if i == num_steps // 2 else num_rows - i % 3
        steps.append(
            StepStats(
                step=i,
                start=100.0 + i,
                end=100.5 + i,
                num_running=count,
                num_waiting=i % 4,
                num_prefill_tokens=5 * (i % 7 == 0),
                num_decode_tokens=count,
                num_dead_rows=i % 2,
                rows=[f"request-{(row + i // 9) % (2 * num_rows)}" for row in range(count)],
                num_scheduled=[int((row + i) % 11 > 0) for row in range(count)],
                prefilling=[(row + i) % 13 == 1 for row in range(count)],
                dead=[(row * i) % 17 == 16 for row in range(count)],
                joins=[(0, "request-0", 0)] if i % 9 == 0 and count else [],
                leaves=[(1, "request-1", reasons[i % 5])] if i % 5 == 1 else [],
                relocations=[(2, 1)] if i % 6 == 5 else [],
                kv_used_bytes=1000 * count,
                kv_reserved_bytes=1500 * count,
            )
        )
    return steps


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", header[16:24])
    return width, height


@pytest.mark.parametrize(("rows", "steps"), [(3, 1), (64, 400)])
def test_picture(tmp_path: Path, rows: int, steps: int) -> None:
    stats = trace(rows, steps + 1)
    Timeline(stats).save(tmp_path / "t.png")
    assert png_size(tmp_path / "t.png") == (1600, 900)
    assert [p.name for p in tmp_path.iterdir()] == ["t.png"]


def test_json(tmp_path: Path) -> None:
    Timeline(trace(4, 10)).save(tmp_path / "t.json")
    steps = json.loads((tmp_path / "t.json").read_text())["steps"]
    assert len(steps) == 10
    assert (steps[0]["start"], steps[3]["start"], steps[3]["end"]) == (0.0, 3.0, 3.5)
    assert steps[0]["rows"][:2] == ["request-0", "request-1"]
    assert steps[0]["joins"] == [[0, "request-0", 0]]
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]


def test_nothing_recorded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="timeline is empty"):
        Timeline([StepStats(0, 0.0)]).to_png(tmp_path / "t.png")
    assert not list(tmp_path.iterdir())


def test_bad_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"must end in \.png or \.json, got 't\.gif'"):
        check_timeline_path("t.gif")
    with pytest.raises(ValueError, match="does not exist"):
        check_timeline_path(tmp_path / "no" / "t.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install -e \"\.\[plot\]\""):
        check_timeline_path(tmp_path / "t.png")
    check_timeline_path(tmp_path / "t.json")


def output(arrival: float, first: float, last: float, tokens: int) -> RequestOutput:
    metrics = RequestMetrics(arrival, arrival, first, last, last, tokens, 0)
    return RequestOutput("x", None, [1, 2], [CompletionOutput(0, "", [7] * tokens)], True, metrics=metrics)


def test_summary() -> None:
    s = summary([output(0, 1, 4, 4), output(1, 3, 3, 1), output(2, 2, 2, 0)])
    assert (s.num_requests, s.num_prompt_tokens, s.num_output_tokens) == (3, 6, 5)
    assert s.duration == 4
    assert s.tokens_per_second == 1.25
    assert (s.ttft.mean, s.tpot.mean, s.e2e.mean) == (1.5, 1.0, 3.0), "requests without a token do not count"
    assert summary([]).tokens_per_second == 0


def test_percentiles() -> None:
    d = Distribution.of([float(i) for i in range(1, 201)])
    assert (d.mean, d.median, d.p99) == (100.5, 100.5, 198.0)
    assert Distribution.of([3.0]).p99 == 3.0
