"""What a benchmark is made of: jobs that arrive, a system that serves them, a record of each.

Times are seconds from the start of the run. Prompts are token ids, so that no tokenizer is timed; every job asks for
exactly `num_output` tokens, greedy, whatever their ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from flover.metrics import StepStats


class Job(NamedTuple):
    """A request of a workload. `text`: what a server gets instead of token ids."""

    arrival: float
    prompt: tuple[int, ...]
    num_output: int
    text: str = ""


@dataclass(slots=True)
class Record:
    """What became of a job. `times`: when each output token was there; with an `error` it may have few or none.

    num_preemptions: of our engine, how often it lost its memory and was computed again.
    sent, ended, status: of a request over HTTP, when it was sent and when its answer ended, and the code of that.
    num_cached: prompt tokens that the server says it had in a cache.
    """

    arrival: float
    num_prompt: int
    times: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    error: str | None = None
    num_preemptions: int = 0
    sent: float | None = None
    ended: float | None = None
    status: int = 0
    num_cached: int = 0

    @property
    def ttft(self) -> float:
        """Arrival to first token."""
        return self.times[0] - self.arrival

    @property
    def tpot(self) -> float:
        """Mean gap after the first token; of two tokens or more."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)

    @property
    def e2e(self) -> float:
        """Arrival to last token."""
        return self.times[-1] - self.arrival


@dataclass(slots=True)
class Run:
    """A workload on a system.

    Args:
        steps: of the engine, where the system has one; their times on the same clock.
        reorder_host, reorder_device: seconds of reordering on the host and on a GPU (`reorder_clock`).
    """

    system: str
    records: list[Record]
    steps: list[StepStats] = field(default_factory=list)
    reorder_host: float = 0.0
    reorder_device: float = 0.0

    @property
    def duration(self) -> float:
        """First arrival to last token (the paper's "overall time")."""
        ends = [record.times[-1] for record in self.records if record.times]
        return max(ends, default=0.0) - min((record.arrival for record in self.records), default=0.0)


# is given the records before any is served; they fill as the run goes on
Watch = Callable[[Sequence[Record]], object] | None


class System(Protocol):
    """Serves jobs. Made once, with a model loaded; `run` may be called many times."""

    name: str

    def run(self, jobs: Sequence[Job], watch: Watch = None) -> Run:
        """Serve jobs, ascending in arrival, each from when it arrives on."""
        ...

    def close(self) -> None:
        """Give everything back: another system may be made."""
        ...
