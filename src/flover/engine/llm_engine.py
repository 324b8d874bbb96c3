"""`LLMEngine`: text around the token-only core. Prompts become requests, tokens become text and outputs.

Owns what the core does not know: the choices of a prompt (n > 1), incremental text, stop strings. A stop string is
found here, when the core may already compute the next token: the request is retired by id and later tokens dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from flover.config import EngineConfig, ResolvedConfig
from flover.engine.inputs import InputProcessor, Prompt
from flover.engine.step import StepOutput
from flover.metrics import StepStats
from flover.request import (
    CompletionOutput,
    FinishReason,
    Request,
    RequestMetrics,
    RequestOutput,
    TokenLogprobs,
)
from flover.sampling_params import SamplingParams
from flover.startup import StartupTimes
from flover.tokenizer import IncrementalDetokenizer, StopChecker, Tokenizer

logger = logging.getLogger("flover")


class Core(Protocol):
    """`EngineCore`, here or in another process."""

    folder: Path
    resolved: ResolvedConfig
    startup_times: StartupTimes

    def check(self, request: Request) -> None: ...
    def add(self, request: Request) -> None: ...
    def finish(self, request_id: str, reason: FinishReason, stop_reason: int | str | None = None) -> None: ...
    def has_unfinished(self) -> bool: ...
    def step(self) -> StepOutput: ...
    def shutdown(self) -> None: ...


CONTEXT_TOKENS = 6  # of the prompt, which decide on the first output's leading space


class Choice:
    """One choice and its text so far. `num_read` output tokens are in the text, held back or cut."""

    def __init__(self, request: Request, params: SamplingParams, tokenizer: Tokenizer | None) -> None:
        self.request, self.params = request, params
        self.text, self.num_read, self.open = "", 0, True
        self.broken = ""  # why its text cannot be made
        self.num_named = 0  # logprobs entries whose tokens have their text
        self.stops = StopChecker(params.stop or (), params.include_stop_str_in_output)
        self._detokenizer: IncrementalDetokenizer | None = None
        if tokenizer is not None:
            context = request.token_ids[-CONTEXT_TOKENS:]
            self._detokenizer = IncrementalDetokenizer(tokenizer, params.skip_special_tokens, context)

    def read(self) -> str | None:
        """Take in the tokens that came since; -> the stop string, once they complete one.

        A text that cannot be made is this choice's error alone.
        """
        try:
            return self._read()
        except Exception as error:
            logger.exception("the text of %s could not be made", self.request.request_id)
            self._detokenizer = None
            self.broken = f"the text could not be made: {type(error).__name__}"
            return None

    def _read(self) -> str | None:
        request, detokenizer = self.request, self._detokenizer
        while detokenizer and self.num_read < request.num_output_tokens and self.stops.found is None:
            token = request.token_ids[request.num_prompt_tokens + self.num_read]
            self.num_read += 1
            if not self._is_cut(token):
                check = self.num_read >= self.params.min_tokens
                self.text += self.stops.push(detokenizer.push(token), check)
        return self.stops.found

    def close(self) -> None:
        """The request has ended: what was held back is text now, and a stop string outranks any other reason."""
        self.open = False
        stop = self.read()
        if self.broken:
            self.request.finish_reason, self.request.error = FinishReason.ERROR, self.broken
        elif stop is not None:
            self.request.finish_reason, self.request.stop_reason = FinishReason.STOP, stop
        elif self._detokenizer is not None:
            self.text += self.stops.push(self._detokenizer.flush(), check=False) + self.stops.flush()

    def _is_cut(self, token: int) -> bool:
        """Whether this is the EOS or stop token that ended the request, which is no text."""
        request = self.request
        return (
            request.finish_reason is FinishReason.STOP
            and self.num_read == request.num_output_tokens
            and token in request.stop_token_ids
            and not self.params.include_stop_str_in_output
        )


@dataclass(slots=True)
class Prepared:
    """A prompt that has passed every check, with its choices; `LLMEngine.add` queues it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    choices: list[Choice]
    num_open: int = 0


class LLMEngine:
    """Add requests, step, abort. Not thread-safe: one caller drives it.

    Args:
        config: the settings; resolved against checkpoint and machine by the core.
        core: by default an `EngineCore` in this process.

    Raises:
        ValueError: anything wrong with the checkpoint or the settings, in one line.
    """

    def __init__(self, config: EngineConfig, core: Core | None = None) -> None:
        if core is None:
            from flover.engine.engine import EngineCore  # imports torch, which a front does not need

            core = EngineCore(config)
        self.core = core
        self.folder = self.core.folder
        with self.core.startup_times.phase("tokenizer"):
            self.tokenizer = Tokenizer.from_folder(self.folder)
        logger.info("%s", self.core.startup_times)
        self.stats: list[StepStats] = []  # kept only under record_timeline
        self.last_stats: StepStats | None = None
        self.num_steps = 0
        self.num_row_steps = 0  # running rows, summed over the steps
        self._record, self.closed = config.record_timeline, False
        self._inputs = InputProcessor(self.core.resolved, self.tokenizer, self.folder)
        self._prompts: dict[str, Prepared] = {}
        self._choices: dict[str, tuple[Prepared, Choice]] = {}  # by the core's request id

    def check_grammar(self, params: SamplingParams) -> None:
        """Compile what `params` want of the text, which `prepare` then knows; ValueError if that cannot be."""
        self._inputs.grammar(params)

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int | None = None,
        cache_salt: str = "",
    ) -> None:
        """Queue a prompt: text, token ids, {"prompt": text} or {"prompt_token_ids": ids}.

        Args:
            priority: overrides that of `params`. cache_salt: only prompts of the same salt share cached prefixes.

        Raises:
            ValueError: a prompt or parameter that this model or cache cannot serve, or a live request_id.
        """
        self.add(self.prepare(request_id, prompt, params, priority=priority, cache_salt=cache_salt))

    def prepare(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int | None = None,
        cache_salt: str = "",
        pooling: str = "",
    ) -> Prepared:
        """Every check of `add_request`, without adding. pooling: "last" or "mean", for the prompt's embedding."""
        params = SamplingParams() if params is None else params
        text, requests = self._inputs.requests(request_id, prompt, params, priority, cache_salt, pooling)
        self.core.check(requests[0])
        choices = [Choice(request, params, self.tokenizer) for request in requests]
        return Prepared(request_id, text, list(requests[0].token_ids), choices)

    def add(self, prepared: Prepared) -> None:
        """Queue what `prepare` made; ValueError if its id is live, or after `shutdown`."""
        self._need_open()
        for choice in prepared.choices:
            request_id = choice.request.request_id
            if request_id in self._prompts or request_id in self._choices:
                raise ValueError(f"request_id {request_id!r} is already running")
        for choice in prepared.choices:
            self.core.add(choice.request)
            self._choices[choice.request.request_id] = (prepared, choice)
            prepared.num_open += 1
        self._prompts[prepared.request_id] = prepared

    def abort(self, request_id: str) -> None:
        """Withdraw a prompt with all its choices; its last output comes with the next step. Unknown ids are ignored."""
        prepared = self._prompts.get(request_id)
        for choice in prepared.choices if prepared else ():
            if choice.open:
                self.core.finish(choice.request.request_id, FinishReason.ABORT)

    def step(self, final_only: bool = False) -> list[RequestOutput]:
        """One step: the cumulative output of every prompt that got a token or ended.

        Args:
            final_only: only of prompts whose every choice has ended; text is then made as late as stop strings allow.
        """
        self._need_open()
        output = self.core.step()
        self.last_stats = output.stats
        if output.stats is not None:
            self._count(output.stats)
        touched: dict[str, Prepared] = {}
        for request in output.requests:
            prepared, choice = self._choices[request.request_id]
            if not final_only:
                touched[prepared.request_id] = prepared
            if choice.params.stop and (stop := choice.read()) is not None:
                self.core.finish(request.request_id, FinishReason.STOP, stop)
                self._close(prepared, choice, touched)
        for request in output.finished:
            entry = self._choices.get(request.request_id)
            if entry and entry[1].request is request:  # else its stop string was found a step ago
                self._close(*entry, touched)
        return [self._output(prepared) for prepared in touched.values()]

    def has_unfinished_requests(self) -> bool:
        """Whether a step has anything left to do."""
        return bool(self._prompts) or self.core.has_unfinished()

    @property
    def num_requests(self) -> int:
        """Prompts that have not finished."""
        return len(self._prompts)

    def shutdown(self) -> None:
        """Stop the core; what is in flight is dropped."""
        self.closed = True
        self._inputs.close()
        self.core.shutdown()

    def _need_open(self) -> None:
        if self.closed:
            raise ValueError("this engine is shut down")

    def _count(self, stats: StepStats) -> None:
        if stats.num_prefill_tokens or stats.num_decode_tokens:
            self.num_steps += 1
            self.num_row_steps += stats.num_running
        if self._record:
            self.stats.append(stats)

    def _close(self, prepared: Prepared, choice: Choice, touched: dict[str, Prepared]) -> None:
        """A choice has ended, and its prompt with the last of them."""
        choice.close()
        del self._choices[choice.request.request_id]
        prepared.num_open -= 1
        if prepared.num_open == 0:
            del self._prompts[prepared.request_id]
            touched[prepared.request_id] = prepared

    def _output(self, prepared: Prepared) -> RequestOutput:
        first = prepared.choices[0].request
        finished = prepared.num_open == 0
        if first.prompt_logprob_list and (finished or first.num_output_tokens == 1):
            self._name_tokens([entry for entry in first.prompt_logprob_list if entry])
        return RequestOutput(
            request_id=prepared.request_id,
            prompt=prepared.prompt,
            prompt_token_ids=prepared.prompt_token_ids,
            outputs=[self._completion(i, choice) for i, choice in enumerate(prepared.choices)],
            finished=finished,
            prompt_logprobs=first.prompt_logprob_list,
            num_cached_tokens=first.num_cached_tokens,
            embedding=_normalised(first.embedding) if finished and first.embedding else None,
            metrics=_metrics([choice.request for choice in prepared.choices]) if finished else None,
        )

    def _completion(self, number: int, choice: Choice) -> CompletionOutput:
        request, logprobs = choice.request, choice.request.logprobs
        if choice.open:
            choice.read()
            if choice.broken:
                self.core.finish(request.request_id, FinishReason.ERROR)
        if logprobs is not None:
            self._name_tokens(logprobs[choice.num_named :])
            choice.num_named = len(logprobs)
        done = not choice.open and request.finish_reason is not None
        return CompletionOutput(
            index=number,
            text=choice.text,
            token_ids=request.output_token_ids,
            cumulative_logprob=None if logprobs is None else request.cumulative_logprob,
            logprobs=None if logprobs is None else list(logprobs),
            finish_reason=request.finish_reason.value if done and request.finish_reason else None,
            stop_reason=request.stop_reason if done else None,
            error=request.error,
        )

    def _name_tokens(self, entries: Sequence[TokenLogprobs]) -> None:
        if self.tokenizer is not None:
            for entry in entries:
                for token_id, logprob in entry.items():
                    logprob.decoded_token = self.tokenizer.decode((token_id,), skip_special_tokens=False)


def _normalised(embedding: bytes) -> list[float]:
    vector = np.frombuffer(embedding, dtype=np.float32).astype(np.float64)
    result: list[float] = (vector / max(float(np.linalg.norm(vector)), 1e-12)).tolist()
    return result


def _metrics(requests: Sequence[Request]) -> RequestMetrics:
    """Of a prompt; the longest of its choices stands for TPOT. What never happened is 0."""

    def first(times: list[float]) -> float:
        return min((time for time in times if time), default=0.0)

    return RequestMetrics(
        arrival_time=first([request.arrival_time for request in requests]),
        first_scheduled_time=first([request.first_scheduled_time for request in requests]),
        first_token_time=first([request.first_token_time for request in requests]),
        last_token_time=max(request.last_token_time for request in requests),
        finished_time=max(request.finish_time for request in requests),
        num_output_tokens=max(request.num_output_tokens for request in requests),
        num_preemptions=sum(request.num_preemptions for request in requests),
    )
