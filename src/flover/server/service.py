"""`Service`: one `AsyncLLM`, its load and its life: who may add a request, and whether the server is ready."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flover.async_llm import AsyncLLM, Stream
from flover.engine.llm_engine import Prepared
from flover.engine.remote import EngineDeadError
from flover.metrics import StepStats
from flover.request import RequestOutput
from flover.server.bodies import Ignored
from flover.server.config import ServerConfig
from flover.server.errors import ApiError, deadline, draining, engine_dead
from flover.server.live import Live
from flover.server.load import Load
from flover.server.metrics import Metrics
from flover.server.tool_parsers import FORMATS, detect


@dataclass(frozen=True, slots=True)
class Asked:
    """Who asks, and how long they will wait: seconds to the first and to the last token. label: X-Request-Id."""

    key: str = ""
    label: str = ""
    queue_timeout: float | None = None
    timeout: float | None = None


class Service:
    """Made before the event loop runs, used only on it. `dead` is set while there is no engine; `death` says why.

    num_events: additions and steps so far. stalled: the engine has work and makes no step.
    """

    def __init__(self, llm: AsyncLLM, config: ServerConfig) -> None:
        self.llm, self.config = llm, config
        resolved = llm.engine.core.resolved
        self.model_names = list(dict.fromkeys(config.served_model_names)) or [resolved.engine.model]
        self.max_model_len = resolved.scheduler.max_model_len
        self.created = int(time.time())
        self.load = Load(resolved.scheduler.max_num_seqs, config.max_queued_requests, config.max_queued_tokens)
        self.metrics = Metrics(self.load, self.model_names[0], config.metrics_compat)
        self.metrics.blocks = llm.kv_blocks
        self.completion_params = llm.get_default_sampling_params()
        self.chat_params = llm.get_default_chat_params()
        tokenizer = llm.engine.tokenizer
        self.tool_format = config.tool_call_parser or detect(tokenizer.chat_template if tokenizer else None)
        begin = FORMATS[self.tool_format].begin if self.tool_format else ""
        self.calls_are_special = tokenizer is not None and tokenizer.is_special(begin)
        self.ignored = Ignored()
        self.draining = self.stalled = False
        self.live = Live(llm.watch)
        self.dead = asyncio.Event()
        self.death = ""
        self.num_events = 0
        llm.observer = self

    def open(self, prepared: Sequence[Prepared], asked: Asked) -> Stream:
        """Queue prompts, all or none.

        Raises:
            ApiError: 429 for a full queue, 503 while shutting down or when the engine has died.
        """
        self.check_open()
        rows = sum(len(one.choices) for one in prepared)
        self.check_room(rows, sum(len(one.prompt_token_ids) for one in prepared))
        for one in prepared:
            for choice in one.choices:
                choice.request.client = asked.key
        try:
            stream = self.llm.open(prepared)
        except EngineDeadError:
            raise engine_dead() from None
        names = [one.request_id for one in prepared]
        for name in names:
            self.load.live[name].label = asked.label
        for queued, limits in (
            (True, (asked.queue_timeout, self.config.queue_timeout)),
            (False, (asked.timeout, self.config.request_timeout)),
        ):
            seconds = min((limit for limit in limits if limit is not None), default=None)
            if seconds is not None:
                timer = asyncio.get_running_loop().call_later(seconds, self._late, stream, names, queued, seconds)
                stream.on_close.append(timer.cancel)
        return stream

    def _late(self, stream: Stream, names: Sequence[str], queued: bool, seconds: float) -> None:
        """A deadline of a stream has come."""
        live = [self.load.live[name] for name in names if name in self.load.live]
        if queued:
            live = [one for one in live if not one.num_tokens]
        if live:
            self.withdraw(names, "deadline")
            stream.fail(deadline(queued, seconds, self.load.retry_after(self.load.waiting)))

    def withdraw(self, names: Iterable[str], why: str) -> None:
        """Note why requests will be aborted: deadline, admin, shutdown; otherwise their client has gone."""
        for name in names:
            if name in self.load.live:
                self.load.live[name].why = why

    def check_room(self, rows: int, tokens: int = 0) -> None:
        """ApiError 429 if so much more does not fit the queue."""
        try:
            self.load.check(rows, tokens)
        except ApiError:
            self.metrics.rejected["queue_full"] += 1
            raise

    def check_open(self) -> None:
        """ApiError if nothing is taken in any more."""
        if self.dead.is_set():
            self.metrics.rejected["engine_dead"] += 1
            raise engine_dead()
        if self.draining:
            self.metrics.rejected["draining"] += 1
            raise draining()

    @property
    def state(self) -> str:
        """ready: requests are taken in and answered; or why not: draining, engine dead, engine stalled."""
        if self.draining:
            return "draining"
        if not self.llm.is_running:
            return "engine dead"
        return "engine stalled" if self.stalled else "ready"

    def check_model(self, name: str | None) -> str:
        """-> the name to answer with; ApiError 404 for a model that is not here. None is the one that is."""
        if name is None:
            return self.model_names[0]
        if name not in self.model_names:
            message = f"the model {name[:100]!r} does not exist; here is {', '.join(self.model_names)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return name

    async def drained(self) -> None:
        """Wait until no request lives."""
        while self.load.live:
            await asyncio.sleep(0.02)

    async def abort(self, names: Sequence[str], why: str) -> None:
        """End requests with an error; why: as in `withdraw`."""
        self.withdraw(names, why)
        for name in names:
            await self.llm.abort(name)

    # ---- as the engine's observer ------------------------------------------------------------------------------------

    def added(self, prepared: Prepared) -> None:
        self.num_events += not self.load.live  # work begins now; what comes later is no progress
        self.metrics.added(prepared)

    def stepped(self, outputs: Sequence[RequestOutput], stats: StepStats | None) -> None:
        self.num_events += 1
        self.metrics.blocks = self.llm.kv_blocks
        self.live.stepped(self.metrics.stepped(outputs, stats), stats)

    def died(self, error: Exception) -> None:
        self.metrics.died(error)
        self.death = str(error)
        self.dead.set()

    def revived(self) -> None:
        """A new engine runs."""
        self.metrics.restarts += 1
        self.metrics.blocks = self.llm.kv_blocks
        self.dead.clear()
