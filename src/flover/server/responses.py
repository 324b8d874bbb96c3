"""/v1/responses: OpenAI's newer form of a chat, text in and out. Nothing is stored, so none can be continued."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, ClassVar

from flover.request import CompletionOutput, RequestOutput
from flover.server.answers import Answer, Completion
from flover.server.bodies import NOT_YET
from flover.server.errors import ApiError, invalid
from flover.server.logprobs import chat_logprobs
from flover.server.protocol import GenerationRequest, check_logprobs, format_schema
from flover.server.sse import event
from flover.show import show
from flover.structured import StructuredOutputsParams

NOT_HERE = NOT_YET | {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "previous_response_id": (None,),
    "conversation": (None,),
    "background": (None, False),
    "prompt": (None,),
    "store": (None, False, True),  # asked for by default; this server has no store
}
LOGPROBS = "message.output_text.logprobs"  # in `include`; what else can be is of tools, images and reasoning
ECHOED = ("instructions", "max_output_tokens", "user")


class ResponsesRequest(GenerationRequest):
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    top_logprobs: int | None = None
    text: dict[str, Any] | None = None
    include: list[str] | None = None
    metadata: dict[str, Any] | None = None

    subject, limit, refused = "input", "max_output_tokens", NOT_HERE
    add_generation_prompt: ClassVar[bool | None] = None
    chat_template_kwargs: ClassVar[None] = None
    given_tools: ClassVar[None] = None

    def check(self) -> None:
        super().check()
        if (self.n or 1) != 1:
            raise invalid(f"n must be 1, got {self.n}", "n")
        check_logprobs("top_logprobs", self.top_logprobs)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation; ApiError for items that are no messages."""
        first = [{"role": "system", "content": self.instructions}] if self.instructions else []
        if isinstance(self.input, str):
            return [*first, {"role": "user", "content": self.input}]
        return [*first, *(_message(item) for item in self.input)]

    def structured(self) -> StructuredOutputsParams | None:
        form = (self.text or {}).get("format")
        if isinstance(form, dict) and form.get("type") == "json_schema":
            form = {"type": "json_schema", "json_schema": form}
        try:
            schema = format_schema(form, "text")
            return super().structured() if schema is None else StructuredOutputsParams.of(schema)
        except ValueError as error:
            raise invalid(f"text: {error}", "text") from None

    def values(self) -> dict[str, Any]:
        values = super().values()
        if self.top_logprobs is not None or LOGPROBS in (self.include or ()):
            values["logprobs"] = self.top_logprobs or 0
        return values


def _message(item: dict[str, Any]) -> dict[str, Any]:
    if item.get("type", "message") != "message":
        raise invalid(f"input must hold messages, got {show(item)}", "input")
    content = item.get("content")
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {} for part in content]
        wanted = ("input_text", "output_text", "text")
        if not all(part.get("type") in wanted and isinstance(part.get("text"), str) for part in parts):
            raise invalid(f"input: content must be text, got {show(content)}", "input")
        content = "\n".join(part["text"] for part in parts)
    return {"role": item.get("role"), "content": content}


class ResponseAnswer(Completion):
    """One answer. Its events are numbered, and named by their type; there is no [DONE]."""

    prefix = "resp"
    done = b""
    request: ResponsesRequest

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.id = f"resp_{uuid.uuid4().hex}"
        self._item_id = f"msg_{uuid.uuid4().hex}"
        self._number = 0

    def so_far(self) -> Answer:
        return self._response(self._choice_of(self._newest[0])) if self._newest else {}

    async def events(self, outputs: AsyncIterator[RequestOutput]) -> AsyncIterator[bytes]:
        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        yield self._event("response.created", response=self._response(None))
        yield self._event("response.in_progress", response=self._response(None))
        empty = {**self._item("in_progress"), "content": []}
        yield self._event("response.output_item.added", output_index=0, item=empty)
        yield self._event("response.content_part.added", **place, part=self._part(None))
        characters = scored = 0
        choice: CompletionOutput | None = None
        async for output in outputs:
            self._take(output)
            choice = self._choice_of(output)
            if len(choice.text) > characters:
                logprobs = self._logprobs(choice, scored)
                delta, characters, scored = choice.text[characters:], len(choice.text), len(choice.logprobs or ())
                yield self._event("response.output_text.delta", **place, delta=delta, logprobs=logprobs)
        assert choice is not None
        part = self._part(choice)
        yield self._event("response.output_text.done", **place, text=choice.text, logprobs=part["logprobs"])
        yield self._event("response.content_part.done", **place, part=part)
        item = self._item(_status(choice), choice)
        yield self._event("response.output_item.done", output_index=0, item=item)
        kind = "response.completed" if _status(choice) == "completed" else "response.incomplete"
        yield self._event(kind, response=self._response(choice))

    def error_event(self, error: ApiError) -> bytes:
        inner = error.body["error"]
        return self._event("error", code=inner["code"], message=inner["message"], param=inner["param"])

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        body = {"type": kind, "sequence_number": self._number - 1, **fields}
        return f"event: {kind}\n".encode() + event(body)

    def _choice_of(self, output: RequestOutput) -> CompletionOutput:
        return output.outputs[0]

    def _part(self, choice: CompletionOutput | None) -> Answer:
        text, logprobs = ("", []) if choice is None else (choice.text, self._logprobs(choice, 0))
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _logprobs(self, choice: CompletionOutput, scored: int) -> Sequence[Answer]:
        if choice.logprobs is None:
            return []
        return chat_logprobs(choice.token_ids[scored:], choice.logprobs[scored:], self.request.top_logprobs or 0)

    def _item(self, status: str, choice: CompletionOutput | None = None) -> Answer:
        item = {"type": "message", "id": self._item_id, "status": status, "role": "assistant"}
        return {**item, "content": [self._part(choice)]}

    def _response(self, choice: CompletionOutput | None) -> Answer:
        status = "in_progress" if choice is None else _status(choice)
        limited = choice is not None and choice.finish_reason == "length"
        request = self.request
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._head["created"],
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if limited else None,
            "model": self._head["model"],
            "output": [] if choice is None else [self._item(status, choice)],
            **{name: getattr(request, name) for name in ECHOED},
            "temperature": self.params.temperature,
            "top_p": self.params.top_p,
            "metadata": request.metadata or {},
            "text": request.text or {"format": {"type": "text"}},
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            "usage": None if choice is None else self._response_usage(),
        }

    def _response_usage(self) -> Answer:
        usage = self._usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }


def _status(choice: CompletionOutput) -> str:
    return "completed" if choice.finish_reason not in (None, "length") else "incomplete"
