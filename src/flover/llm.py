"""`LLM`: prompts in, texts out, offline. The loop around `LLMEngine` and nothing else.

Invariant: all inputs of a call are checked before any is queued, and when a call ends early, by an exception, Ctrl-C or
an abandoned iterator, what it had in flight is aborted; other calls are unharmed.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from flover.config import Setting
from flover.engine.defaults import (
    Conversation,
    chat_prompt,
    default_chat_params,
    default_sampling_params,
    engine_config,
)
from flover.engine.inputs import Prompt
from flover.engine.llm_engine import LLMEngine, Prepared
from flover.metrics import Timeline
from flover.request import RequestOutput
from flover.sampling_params import SamplingParams, as_list
from flover.show import show
from flover.startup import StartupTimes

Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A model ready to generate. Threads may share it: what they ask for at the same time is fused.

    Args:
        model: built-in name, checkpoint folder or Hugging Face hub id; None is the built-in kjv-llama.
        options: the fields of `EngineConfig` by name (dtype, max_model_len, kv_layout, seed, ...).

    Raises:
        ValueError: an unknown option (naming the nearest known one), or anything wrong with settings or checkpoint.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        self.engine = LLMEngine(engine_config(model, options))
        self._next_id = 0
        self._lock = threading.RLock()  # whoever holds it adds, steps and empties its inbox
        self._inboxes: dict[str, dict[str, RequestOutput]] = {}  # request id -> where its stream reads

    # ---- generation --------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Finished outputs, in the order of the prompts.

        Args:
            prompts: one or a list of: text, token ids (an array is one prompt, a matrix one a row), {"prompt": text},
                {"prompt_token_ids": ids}.
            sampling_params: one for all, one for each, or None for `get_default_sampling_params()`.
            use_tqdm: show progress on stderr, if that is a terminal.

        Raises:
            ValueError: a bad prompt or parameter, naming it; nothing has run then.
        """
        return self._finish(self._prepare(prompts, sampling_params), use_tqdm)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """As `generate`, for conversations, which the model's chat template renders.

        Without sampling_params the answer may run up to the context limit.

        Args:
            messages: one list of {"role", "content"}, or a list of such lists.
            tools: told to the model by the template, as OpenAI has them; its calls are text.
            chat_template_kwargs: more variables for the template, such as enable_thinking.
        """
        many = _is_list(messages) and bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Any = messages if many else [messages]
        if sampling_params is None:
            sampling_params = self.get_default_chat_params()
        prompts = [self.chat_prompt(one, add_generation_prompt, tools, chat_template_kwargs) for one in conversations]
        return self._finish(self._prepare(prompts, sampling_params), use_tqdm)

    def embed(
        self, prompts: Prompt | Sequence[Prompt], use_tqdm: bool = True, pooling: str = "last"
    ) -> list[RequestOutput]:
        """The prompts' embeddings, in `RequestOutput.embedding`: last hidden states pooled, of length 1.

        pooling: "last" takes the last token's, "mean" that of all.
        """
        params = SamplingParams(max_tokens=1, temperature=0.0)
        return self._finish(self._prepare(prompts, params, pooling), use_tqdm)

    def stream(self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None) -> Iterator[RequestOutput]:
        """Cumulative outputs as they grow; those of several prompts come interleaved.

        Raises:
            ValueError: at once, for a bad prompt or parameter.
        """
        return self.run(self._prepare(prompts, sampling_params))

    def run(
        self, prepared: Sequence[Prepared], arrival_steps: Sequence[int] | None = None, final_only: bool = False
    ) -> Iterator[RequestOutput]:
        """The loop itself, for prompts from `engine.prepare`: add, step, hand out; abort what is left on the way out.

        Streams may be interleaved: whoever steps the engine leaves the outputs of others in their inboxes.

        Args:
            arrival_steps: add a prompt only after that many steps (or earlier, if nothing else is running).
            final_only: finished outputs only.
        """
        waiting = sorted(zip(arrival_steps or [0] * len(prepared), range(len(prepared)), prepared), reverse=True)
        inbox: dict[str, RequestOutput] = {}
        live: set[str] = set()
        step = 0
        try:
            while waiting or live:
                with self._lock:
                    self._need_open()
                    step = step if live else waiting[-1][0]
                    while waiting and waiting[-1][0] <= step:
                        one = waiting.pop()[2]
                        self.engine.add(one)
                        live.add(one.request_id)
                        self._inboxes[one.request_id] = inbox
                    if not inbox:
                        step += 1
                        self._step(final_only)
                    outputs = list(inbox.values())
                    inbox.clear()
                    for output in outputs:
                        if output.finished:
                            live.discard(output.request_id)
                            del self._inboxes[output.request_id]
                yield from (output for output in outputs if output.finished or not final_only)
        finally:
            with self._lock:
                for request_id in live:
                    self.engine.abort(request_id)
                    del self._inboxes[request_id]
                while not (self.engine.closed or self._inboxes) and self.engine.has_unfinished_requests():
                    self._step(final_only=True)

    def _step(self, final_only: bool) -> None:
        alone = len({id(inbox) for inbox in self._inboxes.values()}) <= 1
        with _interrupts_deferred():
            outputs = self.engine.step(final_only and alone)
        for output in outputs:
            if output.request_id in self._inboxes:
                self._inboxes[output.request_id][output.request_id] = output

    def chat_prompt(
        self,
        messages: Conversation,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """A conversation as the prompt that the model's template makes of it."""
        return chat_prompt(self.engine, messages, add_generation_prompt, tools, chat_template_kwargs)

    # ---- settings ----------------------------------------------------------------------------------------

    def get_default_sampling_params(self) -> SamplingParams:
        """What generation_config.json asks for, on top of the usual defaults; greedy if it says do_sample: false."""
        return default_sampling_params(self.engine)

    def get_default_chat_params(self) -> SamplingParams:
        """The same, with the output limited by the context only, unless generation_config.json limits it."""
        return default_chat_params(self.engine)

    def explain(self) -> list[Setting]:
        """Every effective setting: name, value, origin, reason."""
        return list(self.engine.core.resolved.settings)

    @property
    def startup_times(self) -> StartupTimes:
        """Seconds that each phase of the start took."""
        return self.engine.core.startup_times

    @property
    def timeline(self) -> Timeline:
        """What ran so far, recorded under `record_timeline=True`."""
        return Timeline(self.engine.stats)

    def close(self) -> None:
        """Stop the engine; using it afterwards is an error."""
        with self._lock:
            self.engine.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _need_open(self) -> None:
        if self.engine.closed:
            raise ValueError("this LLM is closed")

    # ---- helpers -----------------------------------------------------------------------------------------

    def _prepare(self, prompts: Any, params: Params, pooling: str = "") -> list[Prepared]:
        """Check everything; queue nothing."""
        self._need_open()
        prompts = as_list(prompts)
        if _is_list(prompts):
            prompts = [as_list(prompt) for prompt in prompts]
        if isinstance(prompts, (str, Mapping)) or (_is_list(prompts) and prompts and not _is_prompt(prompts[0])):
            prompts = [prompts]
        if not _is_list(prompts):
            raise ValueError(f"prompts must be a prompt or a list of prompts, got {show(prompts)}")
        if params is None:
            params = self.get_default_sampling_params()
        if not isinstance(params, SamplingParams) and not _is_list(params):
            raise ValueError(f"sampling_params must be a SamplingParams or a list of them, got {show(params)}")
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(each)} sampling_params were given for {len(prompts)} prompts")
        prepared = []
        with self._lock:
            if (others := self.engine.num_requests - len(self._inboxes)) > 0:
                raise ValueError(
                    f"{others} requests of `engine.add_request` have not ended: call `engine.step` until then"
                )
            for i, (prompt, one) in enumerate(zip(prompts, each)):
                try:
                    prepared.append(self.engine.prepare(str(self._next_id + i), prompt, one, pooling=pooling))
                except ValueError as error:
                    raise ValueError(f"prompt {i}: {error}" if len(prompts) > 1 else str(error)) from None
            self._next_id += len(prompts)
        return prepared

    def _finish(self, prepared: list[Prepared], use_tqdm: bool) -> list[RequestOutput]:
        done: dict[str, RequestOutput] = {}
        with progress(len(prepared), use_tqdm) as advance:
            for output in self.run(prepared, final_only=True):
                done[output.request_id] = output
                advance(sum(len(choice.token_ids) for choice in output.outputs))
        return [done[one.request_id] for one in prepared]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _is_prompt(value: Any) -> bool:
    return isinstance(value, (str, Mapping)) or _is_list(value)


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Ctrl-C takes effect after the step, which is not safe to leave in the middle; a second one does at once."""
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield
        return
    caught: list[Any] = []

    def defer(number: int, frame: Any) -> None:
        if caught:
            usual(number, frame)
        caught.append(frame)

    signal.signal(signal.SIGINT, defer)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if caught:
        usual(signal.SIGINT, caught[0])


@contextmanager
def progress(total: int, wanted: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, if that is a terminal; -> a function to call with the tokens of each finished prompt."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not wanted or not console.is_terminal:
        yield lambda tokens: None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[tokens]} tokens"), TimeRemainingColumn())
    with Progress(TextColumn("generate"), *columns, console=console, transient=True) as bar:
        task, count = bar.add_task("", total=total, tokens=0), 0

        def advance(tokens: int) -> None:
            nonlocal count
            count += tokens
            bar.update(task, advance=1, tokens=count)

        yield advance
