"""What a run did: `StepStats`, the `Timeline` of rows x steps, and the latency summary of its requests.

Times are seconds on the engine's clock; TTFT, TPOT and E2E as `RequestMetrics` has them. No torch;
matplotlib is imported only to draw.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flover.request import RequestOutput

# a request's colour, on the terminal and in the picture: of medium lightness, so that prefill can be darker and a
# waiting row paler
PALETTE = (
    "#5b8fd9", "#e08a3c", "#4fae8a", "#c96fa8", "#b5a339", "#7f78d2",
    "#d9695f", "#4ba7c4", "#8aa84a", "#a87b5b", "#d487c9", "#6f9a9c",
)  # fmt: skip


@dataclass(slots=True)
class StepStats:
    """One step. The lists are per row or per event and stay empty unless a timeline is recorded."""

    step: int
    start: float
    end: float = 0.0
    num_running: int = 0
    num_waiting: int = 0
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_dead_rows: int = 0
    rows: list[str] = field(default_factory=list)  # request id per row, after this step's leaves, moves and joins
    num_scheduled: list[int] = field(default_factory=list)  # per row
    prefilling: list[bool] = field(default_factory=list)  # per row: these are prefill tokens
    dead: list[bool] = field(default_factory=list)  # per row: over, but still computed
    joins: list[tuple[int, str, int]] = field(default_factory=list)  # row, request id, cached tokens
    leaves: list[tuple[int, str, str]] = field(default_factory=list)  # row before compaction, request id, reason
    relocations: list[tuple[int, int]] = field(default_factory=list)  # rows: src, dst
    moves: list[tuple[int, int, int]] = field(default_factory=list)  # KV copies: src slot, dst slot, tokens
    kv_used_bytes: int = 0
    kv_reserved_bytes: int = 0
    kv_moved_bytes: int = 0
    preempted: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Distribution:
    """Mean, median and 99th percentile (nearest rank) of some seconds."""

    mean: float
    median: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Distribution:
        if not values:
            return cls(0.0, 0.0, 0.0)
        rank = -(-99 * len(values) // 100)
        return cls(statistics.fmean(values), statistics.median(values), sorted(values)[rank - 1])


@dataclass(frozen=True, slots=True)
class Summary:
    """Latencies over the requests that produced a token, throughput over all tokens."""

    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    duration: float  # seconds, first arrival to last token
    ttft: Distribution
    tpot: Distribution
    e2e: Distribution

    @property
    def tokens_per_second(self) -> float:
        return self.num_output_tokens / self.duration if self.duration > 0 else 0.0


def summary(outputs: Sequence[RequestOutput]) -> Summary:
    """Of finished requests. TPOT leaves out requests of one token, which have no gap."""
    timed = [o.metrics for o in outputs if o.metrics is not None and o.metrics.num_output_tokens]
    span = 0.0
    if timed:
        span = max(m.last_token_time for m in timed) - min(m.arrival_time for m in timed)
    return Summary(
        num_requests=len(outputs),
        num_prompt_tokens=sum(len(o.prompt_token_ids) for o in outputs),
        num_output_tokens=sum(len(c.token_ids) for o in outputs for c in o.outputs),
        duration=span,
        ttft=Distribution.of([m.ttft for m in timed]),
        tpot=Distribution.of([m.tpot for m in timed if m.num_output_tokens > 1]),
        e2e=Distribution.of([m.e2e for m in timed]),
    )


class Timeline:
    """Rows x steps of a recorded run (`EngineConfig.record_timeline`)."""

    def __init__(self, stats: Sequence[StepStats]) -> None:
        self.stats = list(stats)

    def save(self, path: str | Path) -> None:
        """To .json or .png, by the ending of the name (checked by `check_timeline_path` before a run)."""
        check_timeline_path(path)
        if Path(path).suffix == ".json":
            self.to_json(path)
        else:
            self.to_png(path)

    def to_json(self, path: str | Path) -> None:
        """{"steps": [...]}: the fields of StepStats, times from the first step on. Whole or not at all."""
        origin = self.stats[0].start if self.stats else 0.0
        steps: list[dict[str, Any]] = []
        for stats in self.stats:
            entry = asdict(stats)
            entry["start"], entry["end"] = stats.start - origin, stats.end - origin
            steps.append(entry)
        partial = Path(f"{path}.partial")
        partial.write_text(json.dumps({"steps": steps}), encoding="utf-8")
        os.replace(partial, path)

    def to_png(self, path: str | Path) -> None:
        """The picture of the batch, 1600 x 900.

        Raises:
            ValueError: nothing was recorded, or matplotlib is not installed.
        """
        _need_matplotlib()
        if not any(stats.rows for stats in self.stats):
            raise ValueError("the timeline is empty: nothing ran, or record_timeline is off")
        from flover.timeline import draw

        partial = Path(f"{path}.partial")
        draw(self.stats, partial)
        os.replace(partial, path)


def _need_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise ValueError('a timeline picture needs matplotlib: pip install -e ".[plot]" (a .json needs nothing)')


def check_timeline_path(path: str | Path) -> None:
    """What `Timeline.save` would refuse, before a run instead of after it; ValueError."""
    path = Path(path)
    if path.suffix not in (".json", ".png"):
        raise ValueError(f"timeline must end in .png or .json, got {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"timeline folder {path.parent} does not exist")
    if path.suffix == ".png":
        _need_matplotlib()
