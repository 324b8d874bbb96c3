"""Systems for the figures: one at a time, kept until another is asked for, compiled and captured before it is timed."""

from __future__ import annotations

from collections.abc import Sequence

from flover.bench.engines import DynamicSystem, EngineSystem, Parting
from flover.bench.figures.digests import Tokens, partings
from flover.bench.instances import InstancesSystem
from flover.bench.records import Job, Run, System
from flover.bench.systems import make_system, parse_dynamic
from flover.config import EngineConfig

GAP_SAMPLES = 4  # requests of a run whose logits are looked at where their tokens part


class MissingError(ValueError):
    """Something that cannot run here, in one line."""


class Servers:
    """`get` closes what it gave before, if it is not the same; two would not fit beside each other."""

    def __init__(self) -> None:
        self._key: tuple[str, EngineConfig] | None = None
        self._server: System | None = None

    def has(self, name: str, config: EngineConfig) -> bool:
        return self._key == _key(name, config)

    def get(self, name: str, config: EngineConfig, jobs: Sequence[Job]) -> System:
        """A system that is ready to be timed on jobs like these.

        Raises:
            MissingError: it cannot run here.
        """
        if not self.has(name, config):
            self.close()
            try:
                self._server = make_system(name, config)
                prepare(self._server, jobs)
            except (ImportError, RuntimeError, ValueError) as error:  # out of memory is a RuntimeError
                self.close()
                raise MissingError(" ".join(str(error).split())) from None
            self._key = _key(name, config)
        assert self._server is not None
        if isinstance(self._server, DynamicSystem):
            self._server.name = name
            self._server.delay, self._server.preferred = parse_dynamic(name.partition(":")[2])
        return self._server

    def close(self) -> None:
        server, self._server, self._key = self._server, None, None
        if server is not None:
            server.close()


def _key(name: str, config: EngineConfig) -> tuple[str, EngineConfig]:
    return ("dynamic" if name.startswith("dynamic") else name), config


def prepare(server: System, jobs: Sequence[Job]) -> None:
    """Compile and capture what the jobs need."""
    if isinstance(server, InstancesSystem):
        return server.warm_up(jobs[0])
    if isinstance(server, EngineSystem):
        server.core.warm_up()
        server.run(warm_up(jobs))
    else:
        server.run(warm_up(jobs[:4]))


def warm_up(jobs: Sequence[Job]) -> list[Job]:
    """One by one they join, and one by one they end, in the middle too: a GPU meets every number of rows, and moves."""
    count = len(jobs)
    order = [(7 * i + 3) % count for i in range(count)]
    return [Job(0.005 * i, job.prompt, min(job.num_output, 2 * count + order[i])) for i, job in enumerate(jobs)]


def logit_gap(server: System, jobs: Sequence[Job], run: Run, reference: Tokens) -> float | None:
    """Largest gap of logits where a run's tokens part from serial's, over its first few requests that do.

    The system is given the prompt and serial's tokens up to there (teacher-forced); the gap is what serial's next token
    has more than the run's own. Tokens that part at a gap of rounding's size were all but tied. None: none parts, or
    the system has no logits to show, or the run's token is not among its 20 best.
    """
    if not isinstance(server, (EngineSystem, InstancesSystem)):
        return None
    found = partings([record.token_ids for record in run.records], reference)
    parted = [(i, at) for i, at in enumerate(found) if at is not None][:GAP_SAMPLES]
    asked = [
        Parting([*jobs[i].prompt, *reference[i][:at]], reference[i][at], run.records[i].token_ids[at])
        for i, at in parted
    ]
    gaps = [gap for gap in server.logit_gaps(asked) if gap is not None] if asked else []
    return max(gaps, default=None)
