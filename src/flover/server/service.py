"""`Service`: one `AsyncLLM`, its load and its life: who may add a request, and whether the server is ready."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from flover.async_llm import AsyncLLM, Stream
from flover.engine.llm_engine import Prepared
from flover.engine.remote import EngineDeadError
from flover.metrics import StepStats
from flover.request import RequestOutput
from flover.server.errors import ApiError, draining, engine_dead
from flover.server.load import Load
from flover.server.metrics import Metrics
from flover.server.tool_parsers import FORMATS, detect


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What a user may set about the server.

    Args:
        host, port: where it listens; port 0 is any free one.
        served_model_names: what clients call the model; none is the name it was loaded by. The first is the answer's.
        api_keys: any of them is let in; none lets everyone in.
        max_body_bytes: of a request. body_timeout: seconds for it to arrive.
        max_queued_requests, max_queued_tokens: that may wait for a place in the batch; more is a 429.
        drain_timeout: seconds that running requests have after SIGTERM.
        tool_call_parser: how the model writes tool calls; None: as its chat template says.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_names: Sequence[str] = ()
    api_keys: Sequence[str] = field(default=(), repr=False)
    max_body_bytes: int = 8 << 20
    body_timeout: float = 30.0
    max_queued_requests: int = 1024
    max_queued_tokens: int = 1 << 20
    drain_timeout: float = 30.0
    tool_call_parser: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must be in [0, 65535], got {self.port}")
        for name in ("max_body_bytes", "max_queued_requests", "max_queued_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("body_timeout", "drain_timeout"):
            if not 0 <= getattr(self, name) < 1e9:
                raise ValueError(f"{name} must be a number of seconds, got {getattr(self, name)}")
        if self.tool_call_parser is not None and self.tool_call_parser not in FORMATS:
            raise ValueError(f"tool_call_parser must be one of {', '.join(FORMATS)}, got {self.tool_call_parser!r}")
        if not all(key.strip() for key in self.api_keys):
            raise ValueError("an API key is empty")
        if not all(name.strip() for name in self.served_model_names):
            raise ValueError("a served model name is empty")


class Service:
    """Made before the event loop runs, used only on it. `dead` is set when the engine has died."""

    def __init__(self, llm: AsyncLLM, config: ServerConfig) -> None:
        self.llm, self.config = llm, config
        resolved = llm.engine.core.resolved
        self.model_names = list(config.served_model_names) or [resolved.engine.model]
        self.max_model_len = resolved.scheduler.max_model_len
        self.created = int(time.time())
        kv = resolved.kv
        self.load = Load(resolved.scheduler.max_num_seqs, config.max_queued_requests, config.max_queued_tokens)
        self.metrics = Metrics(self.load, kv.num_blocks * kv.block_size * kv.bytes_per_token, self.model_names[0])
        self.completion_params = llm.get_default_sampling_params()
        self.chat_params = llm.get_default_chat_params()
        tokenizer = llm.engine.tokenizer
        self.tool_format = config.tool_call_parser or detect(tokenizer.chat_template if tokenizer else None)
        self.draining = False
        self.dead = asyncio.Event()
        llm.observer = self

    def open(self, prepared: Sequence[Prepared]) -> Stream:
        """Queue prompts, all or none.

        Raises:
            ApiError: 429 for a full queue, 503 while shutting down or when the engine has died.
        """
        self.check_open()
        rows = sum(len(one.choices) for one in prepared)
        self.check_room(rows, sum(len(one.prompt_token_ids) for one in prepared))
        try:
            return self.llm.open(prepared)
        except EngineDeadError:
            raise engine_dead() from None

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
            raise engine_dead()
        if self.draining:
            self.metrics.rejected["draining"] += 1
            raise draining()

    @property
    def ready(self) -> bool:
        """Whether requests are taken in and answered."""
        return self.llm.is_running and not self.draining

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

    async def abort_all(self) -> None:
        """End every request with an error."""
        for request_id in self.llm.live_request_ids:
            await self.llm.abort(request_id)

    # ---- as the engine's observer ------------------------------------------------------------------------------------

    def added(self, prepared: Prepared) -> None:
        self.metrics.added(prepared)

    def stepped(self, outputs: Sequence[RequestOutput], stats: StepStats | None) -> None:
        self.metrics.stepped(outputs, stats)

    def died(self, error: Exception) -> None:
        self.metrics.died(error)
        self.dead.set()
