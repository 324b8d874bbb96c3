"""`GET /live`: the running batch as it steps, as server-sent events, for the page.

Nobody watches, nothing is done: the engine names the rows of its steps only while there is a watcher. A watcher holds
the newest MAX_STEPS steps at most; one that reads too slowly is told how many it has lost. Requests are numbers and
their ids; no text passes here.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

import flover
from flover.metrics import StepStats
from flover.server.errors import ApiError
from flover.server.metrics import Latencies
from flover.server.sse import event, send_events, until_disconnect

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from flover.server.service import Service

MAX_WATCHERS = 8
MAX_STEPS = 1024
INTERVAL = 0.05  # seconds between two events, while there are steps
HEARTBEAT = 1.0  # seconds between two events while there are none
BUCKETS = 8  # per doubling of a latency: percentiles to 4.5 %


class Watcher:
    """What one reader of `/live` has not been sent yet."""

    def __init__(self) -> None:
        self.steps: deque[StepStats] = deque(maxlen=MAX_STEPS)
        self.ttft: Counter[int] = Counter()
        self.itl: Counter[int] = Counter()
        self.tokens = self.lost = 0
        self._numbers: dict[str, int] = {}
        self._next = 0
        self._rows: list[str] = []
        self._names: dict[int, str] = {}

    def add(self, stats: StepStats) -> None:
        self.lost += len(self.steps) == MAX_STEPS
        self.steps.append(stats)

    def take(self) -> dict[str, Any]:
        """All of it, as the event holds it; the step's rows only where they have changed."""
        steps = [self._step(stats) for stats in self.steps]
        taken: dict[str, Any] = {"steps": steps, "tokens": self.tokens, "lost": self.lost, "names": self._names}
        taken |= {"ttft": dict(self.ttft), "itl": dict(self.itl)}
        self.steps.clear()
        self.ttft, self.itl, self._names = Counter(), Counter(), {}
        self.tokens = self.lost = 0
        return taken

    def _step(self, stats: StepStats) -> dict[str, Any]:
        step: dict[str, Any] = {
            "n": stats.step,
            "t": stats.start,
            "d": max(stats.end - stats.start, 0.0),
            "wait": stats.num_waiting,
            "kv": stats.kv_reserved_bytes,
        }
        if stats.rows != self._rows or not self._numbers:
            step["rows"] = [self._number(request_id) for request_id in stats.rows]
        scheduled = list(zip(stats.num_scheduled, stats.prefilling, stats.dead))
        events = {
            "pre": [(row, tokens) for row, (tokens, prefill, _) in enumerate(scheduled) if prefill and tokens],
            "idle": [row for row, (tokens, _, dead) in enumerate(scheduled) if not tokens and not dead],
            "dead": [row for row, (_, _, dead) in enumerate(scheduled) if dead],
            "join": [(row, self._number(request_id), cached) for row, request_id, cached in stats.joins],
            "leave": [(row, self._number(request_id), reason) for row, request_id, reason in stats.leaves],
            "move": stats.relocations,
        }
        self._rows = stats.rows
        if len(self._numbers) > 2 * len(stats.rows) + 64:  # who has left is forgotten
            rows = set(stats.rows)
            self._numbers = {name: number for name, number in self._numbers.items() if name in rows}
        return step | {name: values for name, values in events.items() if values}

    def _number(self, request_id: str) -> int:
        number = self._numbers.get(request_id)
        if number is None:
            number = self._numbers[request_id] = self._next
            self._names[number] = request_id
            self._next += 1
        return number


class Live:
    """The watchers. `watch` turns the naming of rows on and off."""

    def __init__(self, watch: Callable[[bool], None]) -> None:
        self._watch = watch
        self.watchers: set[Watcher] = set()

    def open(self) -> Watcher:
        """ApiError 429 if there are MAX_WATCHERS."""
        if len(self.watchers) >= MAX_WATCHERS:
            raise ApiError(429, f"{MAX_WATCHERS} already watch", code="too_many_watchers", headers={"Retry-After": "5"})
        watcher = Watcher()
        self.watchers.add(watcher)
        if len(self.watchers) == 1:
            self._watch(True)
        return watcher

    def close(self, watcher: Watcher) -> None:
        self.watchers.discard(watcher)
        if not self.watchers:
            self._watch(False)

    def stepped(self, latencies: Latencies, stats: StepStats | None) -> None:
        """As an observer."""
        for watcher in self.watchers:
            watcher.tokens += latencies.tokens
            watcher.ttft.update(map(_bucket, latencies.ttft))
            watcher.itl.update(map(_bucket, latencies.itl))
            if stats is not None and (stats.rows or stats.leaves):
                watcher.add(stats)


def _bucket(seconds: float) -> int:
    """bucket / BUCKETS is the logarithm (base 2) of its milliseconds."""
    return round(BUCKETS * math.log2(max(seconds * 1e3, 1e-3)))


class LiveEndpoint:
    """Plain ASGI, so that it sees the watcher go."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "HEAD":
            await Response(media_type="text/event-stream")(scope, receive, send)
            return
        live = self._service.live
        watcher = live.open()
        try:
            await until_disconnect(receive, send_events(send, self._events(watcher), lambda error: event(error.body)))
        finally:
            live.close(watcher)

    async def _events(self, watcher: Watcher) -> AsyncIterator[bytes]:
        """Until the server has nothing left to do."""
        service, load = self._service, self._service.load
        yield event({"hello": self._hello()})
        sent = time.monotonic()
        while not (service.draining and not load.live):
            await asyncio.sleep(INTERVAL)
            if watcher.steps or watcher.tokens or time.monotonic() - sent > HEARTBEAT:
                sent = time.monotonic()
                now = {"running": load.running, "waiting": load.waiting, "kv_usage": service.metrics.kv_usage}
                yield event({**watcher.take(), **now, "state": service.state})

    def _hello(self) -> dict[str, Any]:
        service = self._service
        resolved = service.llm.engine.core.resolved
        kv = resolved.kv
        return {
            "model": service.model_names[0],
            "version": flover.__version__,
            "buckets": BUCKETS,
            "max_num_seqs": resolved.scheduler.max_num_seqs,
            "max_model_len": service.max_model_len,
            "kv_bytes": kv.num_blocks * kv.block_size * kv.bytes_per_token,
            "kv_layout": kv.layout,
        }
