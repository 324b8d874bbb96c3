"""What clients get: the objects of the OpenAI API, made of `RequestOutput`s, whole or in chunks.

Invariant: the deltas of a choice, joined, are the text of the whole answer.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import flover
from flover.request import CompletionOutput, RequestOutput, TokenLogprobs, is_own_fault
from flover.sampling_params import SamplingParams
from flover.server.errors import SERVER, ApiError, aborted
from flover.server.logprobs import chat_logprobs, completion_logprobs
from flover.server.protocol import ChatCompletionRequest, GenerationRequest
from flover.server.sse import DONE, event
from flover.server.tools import CallWriter, call_writer

Answer = dict[str, Any]


class Echo(NamedTuple):
    """What a completion repeats of a prompt: its text, and that of its first token, which has no probability."""

    text: str
    first: str


class Completion:
    """The answer to a completion. `num_prompts` prompts, numbered as in the request."""

    object, chunk_object, prefix = "text_completion", "text_completion", "cmpl-"
    done = DONE  # after the last event

    def __init__(
        self,
        request: GenerationRequest,
        params: SamplingParams,
        model: str,
        num_prompts: int,
        tool_format: str | None = None,
    ) -> None:
        self.request, self.params, self.num_prompts, self.tool_format = request, params, num_prompts, tool_format
        self.n, self.include_usage = params.n, request.include_usage
        self.id = f"{self.prefix}{uuid.uuid4().hex}"
        self._head = {"created": int(time.time()), "model": model, "system_fingerprint": f"flover-{flover.__version__}"}
        self._newest: dict[int, RequestOutput] = {}  # by prompt
        self.echoes: Sequence[Echo] = ()  # by prompt, where they are to be repeated
        self.prompt_ids: Sequence[Sequence[int]] = ()  # by prompt, where token ids are wanted
        self._offsets: dict[int, int] = {}  # choice -> where the text of its next logprob begins

    def request_id(self, prompt: int) -> str:
        """Of a prompt, to the engine."""
        return f"{self.id}-{prompt}"

    async def whole(self, outputs: AsyncIterator[RequestOutput]) -> Answer:
        """The answer, once all has ended; ApiError if part of it failed."""
        async for output in outputs:
            self._take(output)
        return self.so_far()

    def so_far(self) -> Answer:
        """The answer, or what there is of it: choices that have not ended have no finish_reason."""
        choices = [
            self._choice(output, choice, self._index(prompt, choice))
            for prompt, output in sorted(self._newest.items())
            for choice in output.outputs
        ]
        head = {"id": self.id, "object": self.object, **self._head, **self._head_ids()}
        return {**head, "choices": choices, "usage": self._usage()}

    async def events(self, outputs: AsyncIterator[RequestOutput]) -> AsyncIterator[bytes]:
        """The answer as it grows; ApiError ends it early."""
        head = {"id": self.id, "object": self.chunk_object, **self._head}
        usage = {"usage": None} if self.include_usage else {}
        sent: dict[int, tuple[int, int]] = {}  # choice -> characters and tokens given out
        over: set[int] = set()
        for i in range(self.n * self.num_prompts):
            sent[i] = (0, 0)
            for first in self._first(i):
                yield event({**head, **self._head_ids(), "choices": [first], **usage})
        async for output in outputs:
            output = self._take(output)
            prompt = _prompt(output)
            for choice in output.outputs:
                i = self._index(prompt, choice)
                before = sent[i]
                now = len(choice.text), len(choice.token_ids)
                new = now != before if self.prompt_ids else now[0] > before[0]  # tokens may have no text of their own
                if i in over or not (new or choice.finish_reason):
                    continue
                if choice.finish_reason:
                    over.add(i)
                text = choice.text[before[0] :] if before[1] else self._echo(i) + choice.text
                delta = self._delta(output, choice, i, text, before[1])
                sent[i] = now
                if delta is not None:
                    yield event({**head, "choices": [delta], **usage})
        if self.include_usage:
            yield event({**head, "choices": [], "usage": self._usage()})

    def error_event(self, error: ApiError) -> bytes:
        """What ends a stream that cannot go on."""
        return event(error.body)

    # ---- what differs in a chat --------------------------------------------------------------------------------------

    def _first(self, index: int) -> Iterable[Answer]:
        """Chunks before any text."""
        return ()

    def _choice(self, output: RequestOutput, choice: CompletionOutput, index: int) -> Answer | None:
        return self._delta(output, choice, index, self._echo(index) + choice.text, 0)

    def _delta(
        self, output: RequestOutput, choice: CompletionOutput, index: int, text: str, scored: int
    ) -> Answer | None:
        """`text` is new, and so are the logprobs from `scored` on; None if there is nothing to tell yet."""
        logprobs = None
        if choice.logprobs is not None:
            tokens = choice.token_ids[scored:]
            entries: list[TokenLogprobs | None] = list(choice.logprobs[scored:])
            offset, first = self._offsets.get(index, 0) if scored else 0, ""
            if not scored and self.echoes:
                prompt = output.prompt_logprobs or [None] * len(output.prompt_token_ids)
                tokens, entries = [*output.prompt_token_ids, *tokens], [*prompt, *entries]
                first = self.echoes[index // self.n].first
                offset = 0 if text.startswith(first) else -len(first)  # a begin token is no part of the text
            best = getattr(self.request, "logprobs", None) or 0
            logprobs, self._offsets[index] = completion_logprobs(tokens, entries, offset, best, first)
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            **self._ids(choice, index, scored),
            **_ending(choice),
        }

    def _head_ids(self) -> Answer:
        """Token ids beside the choices, in the whole and in chunks before any text."""
        return {}

    def _ids(self, choice: CompletionOutput, index: int, given: int) -> Answer:
        """Token ids of a choice, from `given` on; as vLLM, those of the prompt beside the first."""
        if not self.prompt_ids:
            return {}
        prompt = {} if given else {"prompt_token_ids": list(self.prompt_ids[index // self.n])}
        return {**prompt, "token_ids": choice.token_ids[given:]}

    # ---- helpers -----------------------------------------------------------------------------------------------------

    def _take(self, output: RequestOutput) -> RequestOutput:
        """Note it; -> what of it is the client's. ApiError if a choice ended otherwise than by itself."""
        if getattr(self.request, "scores_prompt", False):
            output = replace(output, outputs=[_emptied(choice) for choice in output.outputs])
        self._newest[_prompt(output)] = output
        for choice in output.outputs:
            if choice.finish_reason == "error":
                raise _failed(choice.error or "the request failed")
            if choice.finish_reason == "abort":
                raise aborted()
        return output

    def _echo(self, index: int) -> str:
        return self.echoes[index // self.n].text if self.echoes else ""

    def _index(self, prompt: int, choice: CompletionOutput) -> int:
        return prompt * self.n + choice.index

    def _usage(self) -> Answer:
        outputs = self._newest.values()
        prompt = sum(len(output.prompt_token_ids) for output in outputs)
        completion = sum(len(choice.token_ids) for output in outputs for choice in output.outputs)
        cached = sum(output.num_cached_tokens for output in outputs)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


class ChatCompletion(Completion):
    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"
    request: ChatCompletionRequest

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._calls: dict[int, CallWriter] = {}  # by choice, while it streams

    def _writer(self) -> CallWriter | None:
        """What finds the calls in a choice; None where there can be none."""
        return call_writer(self.request.given_tools, self.request.tool_choice, self.tool_format)

    def _first(self, index: int) -> Iterable[Answer]:
        delta = {"role": "assistant", "content": "" if self._writer() is None else None}  # a call has no content
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def _head_ids(self) -> Answer:
        return {"prompt_token_ids": list(self.prompt_ids[0])} if self.prompt_ids else {}

    def _ids(self, choice: CompletionOutput, index: int, given: int) -> Answer:
        return {"token_ids": choice.token_ids[given:]} if self.prompt_ids else {}

    def _choice(self, output: RequestOutput, choice: CompletionOutput, index: int) -> Answer:
        message: Answer = {"role": "assistant", "content": choice.text, "refusal": None}
        ending, writer = _ending(choice), self._writer()
        if writer is not None:
            message |= writer.whole(choice.text)
            ending["finish_reason"] = writer.finish_reason(ending["finish_reason"])
        ids, logprobs = self._ids(choice, index, 0), self._logprobs(choice, 0)
        return {"index": index, "message": message, "logprobs": logprobs, **ids, **ending}

    def _delta(
        self, output: RequestOutput, choice: CompletionOutput, index: int, text: str, scored: int
    ) -> Answer | None:
        delta, ending = {"content": text} if text else {}, _ending(choice)
        writer = self._calls.get(index) or self._writer()
        if writer is not None:
            self._calls[index] = writer
            delta = writer.delta(text, ending=choice.finish_reason is not None)
            ending["finish_reason"] = writer.finish_reason(ending["finish_reason"])
            if not delta and not ending["finish_reason"] and choice.logprobs is None and not self.prompt_ids:
                return None
        ids, logprobs = self._ids(choice, index, scored), self._logprobs(choice, scored)
        return {"index": index, "delta": delta, "logprobs": logprobs, **ids, **ending}

    def _logprobs(self, choice: CompletionOutput, scored: int) -> Answer | None:
        if choice.logprobs is None:
            return None
        best = getattr(self.request, "top_logprobs", None) or 0
        return {"content": chat_logprobs(choice.token_ids[scored:], choice.logprobs[scored:], best), "refusal": None}


def _failed(error: str) -> ApiError:
    """A choice that ended with an error: the request's own fault, or ours."""
    if not is_own_fault(error):
        return ApiError(500, error, kind=SERVER, code="generation_failed")
    return ApiError(400, error, param="structured_outputs" if "structured" in error else None, code="generation_failed")


def _prompt(output: RequestOutput) -> int:
    """The number of its prompt."""
    return int(output.request_id.rpartition("-")[2])


def _emptied(choice: CompletionOutput) -> CompletionOutput:
    """Without its tokens, which nobody asked for."""
    reason = choice.finish_reason and ("length" if choice.finish_reason == "stop" else choice.finish_reason)
    logprobs: list[TokenLogprobs] | None = None if choice.logprobs is None else []
    return replace(choice, text="", token_ids=[], logprobs=logprobs, finish_reason=reason, stop_reason=None)


def _ending(choice: CompletionOutput) -> Answer:
    reason: Answer = {"finish_reason": choice.finish_reason}
    return reason if choice.stop_reason is None else {**reason, "stop_reason": choice.stop_reason}
