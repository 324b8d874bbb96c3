"""`AsyncLLM`: as `LLM`, for an event loop, with the engine in a process of its own.

Text is made here, tokens there. Prompts are tokenised on threads; one reader takes the engine's messages in and wakes
the streams. A stream holds only the newest cumulative output, so a slow reader costs no memory and sees tokens merged.
Invariant: a request ends exactly once, by its own end, an abort, or the death of the engine, which all streams report.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from typing import Any

from flover.config import EngineConfig
from flover.engine.inputs import Prompt
from flover.engine.llm_engine import LLMEngine
from flover.engine.remote import EngineDeadError, RemoteCore
from flover.request import RequestOutput, SamplingParams, nearest

TOKENIZER_THREADS = 4


class _Stream:
    """Where a request's newest output waits for its reader."""

    def __init__(self) -> None:
        self._newest: RequestOutput | None = None
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    def put(self, output: RequestOutput) -> None:
        self._newest = output
        self._changed.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._changed.set()

    async def get(self) -> RequestOutput:
        await self._changed.wait()
        self._changed.clear()
        newest, self._newest = self._newest, None
        if newest is None:
            assert self._error is not None
            raise self._error
        if self._error is not None:  # after what came before it
            self._changed.set()
        return newest


class AsyncLLM:
    """A model ready to serve many callers of one event loop. Not thread-safe.

    Args:
        model: built-in name, checkpoint folder or Hugging Face hub id; None is the built-in kjv-llama.
        options: the fields of `EngineConfig` by name.

    Raises:
        ValueError: an unknown option, or anything wrong with settings or checkpoint, in one line.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        known = {f.name for f in fields(EngineConfig)}
        for name in options:
            if name not in known:
                raise ValueError(f"unknown option {name!r}{nearest(name, known)}")
        if model is not None:
            options["model"] = str(model)
        config = EngineConfig(**options)
        self._core = RemoteCore(config)
        self.engine = LLMEngine(config, self._core)
        self._threads = ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="flover-tokenizer")
        self._streams: dict[str, _Stream] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._dead: Exception | None = None
        self._next_id = 0

    @property
    def is_running(self) -> bool:
        """Whether requests can be served; not after `shutdown`, nor once the engine has died."""
        return self._dead is None

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str = "",
        *,
        priority: int | None = None,
        cache_salt: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Cumulative outputs as they grow, the last with `finished`. Leaving the generator aborts the request.

        Args:
            prompt: text, token ids, {"prompt": text} or {"prompt_token_ids": ids}.
            request_id: unique among live requests; "" chooses one.

        Raises:
            ValueError: a bad prompt or parameter, naming it, or a live request_id.
            EngineDeadError: the engine's process has ended.
        """
        self._attach()
        if not request_id:
            self._next_id += 1
            request_id = f"request-{self._next_id}"
        prepare = partial(
            self.engine.prepare, request_id, prompt, sampling_params, priority=priority, cache_salt=cache_salt
        )
        prepared = await asyncio.get_running_loop().run_in_executor(self._threads, prepare)
        if self._dead is not None:
            raise self._dead
        self.engine.add(prepared)
        stream = self._streams[request_id] = _Stream()
        try:
            while True:
                output = await stream.get()
                yield output
                if output.finished:
                    return
        finally:
            self._streams.pop(request_id, None)
            self.engine.abort(request_id)  # nothing, if it has ended

    async def abort(self, request_id: str) -> None:
        """End a request; its stream gets a last output with finish_reason "abort". Unknown ids are ignored."""
        self.engine.abort(request_id)

    def shutdown(self) -> None:
        """End the engine; streams that are open get `EngineDeadError`."""
        self._fail(EngineDeadError("the engine was shut down"))
        self._core.shutdown()
        self._threads.shutdown(wait=False, cancel_futures=True)

    # ---- the reader --------------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        """Read from the engine on the running loop, whichever it is."""
        if self._dead is not None:
            raise self._dead
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._detach()
            loop.add_reader(self._core.fileno(), self._read)
            self._loop = loop

    def _detach(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._core.fileno())
        self._loop = None

    def _read(self) -> None:
        try:
            self._core.receive()
            while self._core.pending:
                for output in self.engine.step():
                    stream = self._streams.get(output.request_id)
                    if stream is not None:
                        stream.put(output)
        except Exception as error:  # the engine is gone, or what it says cannot be understood
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._detach()
        self._dead = self._dead or error
        for stream in self._streams.values():
            stream.fail(error)
