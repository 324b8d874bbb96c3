"""`AsyncLLM`: as `LLM`, for an event loop, with the engine in a process of its own.

Text is made here, tokens there. Prompts are tokenised on threads; one reader takes the engine's messages in and wakes
the streams. A stream holds only the newest cumulative output, so a slow reader costs no memory and sees tokens merged.
Invariant: a request ends exactly once, by its own end, an abort, or the death of the engine, which all streams report.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, Protocol, TypeVar

from flover.engine.defaults import (
    Conversation,
    chat_prompt,
    default_chat_params,
    default_sampling_params,
    engine_config,
)
from flover.engine.inputs import Prompt
from flover.engine.llm_engine import LLMEngine, Prepared
from flover.engine.remote import EngineDeadError, RemoteCore
from flover.metrics import StepStats
from flover.request import RequestOutput
from flover.sampling_params import SamplingParams

TOKENIZER_THREADS = 4
P = ParamSpec("P")
T = TypeVar("T")


class Observer(Protocol):
    """Who is told of everything, such as the metrics of a server. Called on the event loop; must not raise."""

    def added(self, prepared: Prepared) -> None:
        """A prompt has been queued; exactly one finished output of it follows, or `died`."""

    def stepped(self, outputs: Sequence[RequestOutput], stats: StepStats | None) -> None:
        """The cumulative output of each prompt that the engine brought further; and its step, if it made one."""

    def died(self, error: Exception) -> None:
        """No more steps; prompts that have not finished never will."""


class Stream:
    """The outputs of the prompts that `AsyncLLM.open` has queued: iterate, and close it in any case.

    It holds the newest cumulative output of each prompt, however late its reader.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self._engine = engine
        self._newest: dict[str, RequestOutput] = {}
        self._live: set[str] = set()
        self.on_close: list[Callable[[], object]] = []
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    def add(self, request_id: str) -> None:
        self._live.add(request_id)

    def put(self, output: RequestOutput) -> None:
        self._newest[output.request_id] = output
        self._changed.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._changed.set()

    async def __aiter__(self) -> AsyncGenerator[RequestOutput, None]:
        while self._live:
            await self._changed.wait()
            self._changed.clear()
            newest, self._newest = self._newest, {}
            for output in newest.values():
                if output.finished:
                    self._live.discard(output.request_id)
                yield output
            if self._error is not None and self._live:  # after what came before it
                raise self._error

    def close(self) -> None:
        """Abort what has not ended."""
        while self.on_close:
            self.on_close.pop()()
        for request_id in self._live:
            self._engine.abort(request_id)
        self._live.clear()


class AsyncLLM:
    """A model ready to serve many callers of one event loop. Not thread-safe.

    Args:
        model: built-in name, checkpoint folder or Hugging Face hub id; None is the built-in kjv-llama.
        options: the fields of `EngineConfig` by name.

    Raises:
        ValueError: an unknown option, or anything wrong with settings or checkpoint, in one line.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        self._config = engine_config(model, options)
        self._core = RemoteCore(self._config)
        self._core.wait_until_ready()
        self.engine = LLMEngine(self._config, self._core)
        self._threads = ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="flover-tokenizer")
        self._grammar_thread = ThreadPoolExecutor(1, thread_name_prefix="flover-grammar")
        self._streams: dict[str, Stream] = {}  # by request id, until its last output
        self.observer: Observer | None = None
        self._watched = False
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
        prepared = await self.prepare(prompt, sampling_params, request_id, priority=priority, cache_salt=cache_salt)
        stream = self.open([prepared])
        try:
            async for output in stream:
                yield output
        finally:
            stream.close()

    async def prepare(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str = "",
        *,
        priority: int | None = None,
        cache_salt: str = "",
        pooling: str = "",
    ) -> Prepared:
        """Every check of `generate`, and the tokenising, on a thread; nothing is queued."""
        self.attach()
        if not request_id:
            self._next_id += 1
            request_id = f"request-{self._next_id}"
        if sampling_params is not None and sampling_params.structured_outputs is not None:
            loop = asyncio.get_running_loop()  # a thread of its own: it must not keep others from tokenising
            await loop.run_in_executor(self._grammar_thread, self.engine.check_grammar, sampling_params)
        return await self.in_thread(
            self.engine.prepare,
            request_id,
            prompt,
            sampling_params,
            priority=priority,
            cache_salt=cache_salt,
            pooling=pooling,
        )

    def open(self, prepared: Sequence[Prepared]) -> Stream:
        """Queue prompts, at once and all or none; -> where their outputs come. Who opens a stream closes it.

        Raises:
            ValueError: a live request_id. EngineDeadError: the engine's process has ended.
        """
        self.attach()
        stream = Stream(self.engine)
        try:
            for one in prepared:
                self.engine.add(one)
                self._streams[one.request_id] = stream
                stream.add(one.request_id)
                if self.observer is not None:
                    self.observer.added(one)
        except BaseException:
            stream.close()
            raise
        return stream

    async def chat_prompt(
        self,
        messages: Conversation,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """A conversation as the prompt that the model's template makes of it, on a thread."""
        return await self.in_thread(
            chat_prompt, self.engine, messages, add_generation_prompt, tools, chat_template_kwargs
        )

    async def in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what would hold the loop up, such as tokenising, on one of the tokenizer's threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *args, **kwargs))

    def get_default_sampling_params(self) -> SamplingParams:
        """What generation_config.json asks for, on top of the usual defaults; greedy if it says do_sample: false."""
        return default_sampling_params(self.engine)

    def get_default_chat_params(self) -> SamplingParams:
        """The same, with the output limited by the context only, unless generation_config.json limits it."""
        return default_chat_params(self.engine)

    @property
    def live_request_ids(self) -> list[str]:
        """Of prompts that have not finished."""
        return list(self._streams)

    @property
    def kv_blocks(self) -> tuple[int, int, int]:
        """Of the KV cache, after the last step: free, cached (free, but their prefixes can be found), used."""
        return self._core.blocks

    def reset_prefix_cache(self) -> None:
        """Forget the prefixes that can be found; live requests go on."""
        self._core.reset_cache()

    async def abort(self, request_id: str) -> None:
        """End a request; its stream gets a last output with finish_reason "abort". Unknown ids are ignored."""
        self.engine.abort(request_id)

    async def restart(self) -> None:
        """Start an engine with the same settings, once the last one has died. Cancelling it ends the new one.

        Raises:
            ValueError: what the constructor raises. EngineDeadError: it died again, at the start.
        """
        self._core.kill()
        self._core.shutdown()
        core = RemoteCore(self._config)
        try:
            await self.in_thread(core.wait_until_ready)
            engine = await self.in_thread(LLMEngine, self._config, core)
        except BaseException:
            core.kill()
            core.shutdown()
            raise
        self._core, self.engine, self._dead = core, engine, None
        core.watch(self._watched)
        self.attach()

    @property
    def group_stopped(self) -> bool:
        """Whether rank 0 of a group, which the other ranks wait for, was stopped by a signal."""
        return self._core.resolved.engine.num_ranks > 1 and self._core.stopped

    async def end_engine(self, after: float = 0.5) -> None:
        """Kill an engine that hangs; first it has `after` seconds to write its threads' stacks to stderr."""
        core = self._core
        core.dump_stacks()
        await asyncio.sleep(after)
        core.kill()

    def watch(self, on: bool) -> None:
        """Whether the `StepStats` of an observer name the rows of each step, who joins, leaves and moves."""
        self._watched = on
        self._core.watch(on)

    def shutdown(self) -> None:
        """End the engine; streams that are open get `EngineDeadError`."""
        self._fail(EngineDeadError("the engine was shut down"))
        self.engine.shutdown()
        self._grammar_thread.shutdown(wait=False, cancel_futures=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    # ---- the reader --------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Read from the engine on the running loop, whichever it is; requests do it, a server does it before them.

        Raises:
            EngineDeadError: the engine's process has ended.
        """
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
                outputs = self.engine.step()
                for output in outputs:
                    take = self._streams.pop if output.finished else self._streams.get
                    if (stream := take(output.request_id, None)) is not None:
                        stream.put(output)
                if self.observer is not None:
                    self.observer.stepped(outputs, self.engine.last_stats)
        except Exception as error:  # the engine is gone, or what it says cannot be understood
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._detach()
        self._dead = self._dead or error
        for stream in set(self._streams.values()):
            stream.fail(error)
        self._streams.clear()
        if self.observer is not None:
            self.observer.died(error)
