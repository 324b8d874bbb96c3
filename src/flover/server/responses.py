"""/v1/responses: OpenAI's newer form of a chat: text, and calls of functions. Nothing is stored: none is continued."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from itertools import chain
from typing import Any, ClassVar

from flover.request import CompletionOutput, RequestOutput
from flover.server.answers import Answer, Completion
from flover.server.bodies import NOT_YET
from flover.server.errors import ApiError, invalid
from flover.server.logprobs import chat_logprobs
from flover.server.protocol import GenerationRequest, check_logprobs, format_schema
from flover.server.response_input import as_chat_choice, as_chat_tools, as_messages
from flover.server.response_items import Item, Items
from flover.server.sse import event
from flover.server.tools import call_format, call_writer, check_tools
from flover.structured import StructuredOutputsParams

NOT_HERE = NOT_YET | {
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
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    subject, limit, refused = "input", "max_output_tokens", NOT_HERE
    add_generation_prompt: ClassVar[bool | None] = None
    chat_template_kwargs: ClassVar[None] = None

    def check(self) -> None:
        super().check()
        if (self.n or 1) != 1:
            raise invalid(f"n must be 1, got {self.n}", "n")
        check_logprobs("top_logprobs", self.top_logprobs)
        check_tools(self.chat_tools, self.chat_choice)

    @property
    def chat_tools(self) -> list[dict[str, Any]]:
        return as_chat_tools(self.tools or ())

    @property
    def chat_choice(self) -> str | dict[str, Any] | None:
        return as_chat_choice(self.tool_choice)

    @property
    def given_tools(self) -> list[dict[str, Any]] | None:
        """Those that the model is told of."""
        return None if self.tool_choice == "none" else self.chat_tools or None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation; ApiError for items that are no messages."""
        first = [{"role": "system", "content": self.instructions}] if self.instructions else []
        if isinstance(self.input, str):
            return [*first, {"role": "user", "content": self.input}]
        return [*first, *as_messages(self.input)]

    def structured(self) -> StructuredOutputsParams | None:
        form = (self.text or {}).get("format")
        if isinstance(form, dict) and form.get("type") == "json_schema":
            form = {"type": "json_schema", "json_schema": form}
        try:
            schema = format_schema(form, "text")
            wanted = super().structured() if schema is None else StructuredOutputsParams.of(schema)
        except ValueError as error:
            raise invalid(f"text: {error}", "text") from None
        return call_format(self.chat_tools, self.chat_choice, self.parallel_tool_calls, wanted)

    def values(self) -> dict[str, Any]:
        values = super().values()
        if self.top_logprobs is not None or LOGPROBS in (self.include or ()):
            values["logprobs"] = self.top_logprobs or 0
        return values


class ResponseAnswer(Completion):
    """One answer. Its events are numbered, and named by their type; there is no [DONE]."""

    prefix, done = "resp_", b""
    request: ResponsesRequest

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._number = 0

    def _items(self) -> Items:
        request = self.request
        return Items(call_writer(request.given_tools, request.chat_choice, self.tool_format))

    def so_far(self) -> Answer:
        if not self._newest:
            return {}
        choice, items = self._newest[0].outputs[0], self._items()
        for _ in chain(items.push(choice.text, self._logprobs(choice, 0), ending=True), items.close(_status(choice))):
            pass  # nobody hears of the changes
        return self._response(choice, items.done)

    async def events(self, outputs: AsyncIterator[RequestOutput]) -> AsyncIterator[bytes]:
        yield self._event("response.created", response=self._response(None))
        yield self._event("response.in_progress", response=self._response(None))
        items = self._items()
        characters = scored = 0
        choice: CompletionOutput | None = None
        async for output in outputs:
            choice = self._take(output).outputs[0]
            text, logprobs = choice.text[characters:], self._logprobs(choice, scored)
            characters, scored = len(choice.text), len(choice.token_ids)
            for kind, fields in items.push(text, logprobs, ending=output.finished):
                yield self._event(kind, **fields)
        assert choice is not None
        for kind, fields in items.close(_status(choice)):
            yield self._event(kind, **fields)
        kind = "response.completed" if _status(choice) == "completed" else "response.incomplete"
        yield self._event(kind, response=self._response(choice, items.done))

    def error_event(self, error: ApiError) -> bytes:
        inner = error.body["error"]
        return self._event("error", code=inner["code"], message=inner["message"], param=inner["param"])

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        body = {"type": kind, "sequence_number": self._number - 1, **fields}
        return f"event: {kind}\n".encode() + event(body)

    def _logprobs(self, choice: CompletionOutput, scored: int) -> Sequence[Answer]:
        if choice.logprobs is None:
            return []
        return chat_logprobs(choice.token_ids[scored:], choice.logprobs[scored:], self.request.top_logprobs or 0)

    def _response(self, choice: CompletionOutput | None, items: Sequence[Item] = ()) -> Answer:
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
            "output": list(items),
            **{name: getattr(request, name) for name in ECHOED},
            "temperature": self.params.temperature,
            "top_p": self.params.top_p,
            "metadata": request.metadata or {},
            "text": request.text or {"format": {"type": "text"}},
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "tool_choice": request.tool_choice or "auto",
            "tools": [
                {"description": None, "parameters": None, "strict": None, **tool} for tool in request.tools or ()
            ],
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
