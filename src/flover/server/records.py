"""What is known of a request at its end, for whoever keeps it: a log, traces. Prompts only where that was asked for."""

from __future__ import annotations

import json
import logging
import queue
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from logging.handlers import QueueHandler, QueueListener

LOG_LINES = 10_000  # that wait to be written; more are dropped, a server does not wait for its log


@dataclass(frozen=True, slots=True)
class EndRecord:
    """A prompt's end. Seconds are from its arrival; None is what did not happen.

    Args:
        label: X-Request-Id. outcome: finished, aborted or failed; reason: of it, as in the metrics.
        arrival: on the wall clock. queue: seconds until it was scheduled.
    """

    request_id: str
    label: str
    outcome: str
    reason: str
    arrival: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    choices: int
    preemptions: int
    queue: float | None
    ttft: float | None
    e2e: float
    error: str | None = None
    prompt: str | None = None


Listener = Callable[[EndRecord], None]


class RequestLog:
    """One line of JSON per request on stderr, written by a thread."""

    def __init__(self, prompts: bool) -> None:
        self._prompts = prompts
        lines: queue.Queue[logging.LogRecord] = queue.Queue(LOG_LINES)
        handler = logging.StreamHandler(sys.stderr)
        self._listener = QueueListener(lines, handler)
        self._listener.start()
        self._logger = logging.Logger("flover.requests", logging.INFO)
        self._logger.addHandler(_DroppingHandler(lines))

    def __call__(self, record: EndRecord) -> None:
        values = {"event": "request_end", "time": round(time.time(), 3), **asdict(record)}
        if not self._prompts:
            del values["prompt"]
        told = {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items() if v is not None}
        self._logger.info("%s", json.dumps(told))

    def close(self) -> None:
        """Write what is left."""
        self._listener.stop()


class _DroppingHandler(QueueHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """The queue is full: the line is lost."""
