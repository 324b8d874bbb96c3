"""`Generation`: the endpoints that generate, from the body to the last event."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from flover.async_llm import Stream
from flover.engine.llm_engine import Prepared
from flover.engine.remote import EngineDeadError
from flover.request import ContextLengthError, RequestOutput
from flover.sampling_params import SamplingParams
from flover.server.answers import Completion, Echo
from flover.server.bodies import decode, json_response, read_body
from flover.server.embeddings import EmbeddingRequest
from flover.server.errors import ApiError, aborted, engine_dead, from_value_error
from flover.server.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest, TokenizeRequest
from flover.server.responses import ResponsesRequest
from flover.server.service import Asked, Service
from flover.server.sse import send_events, until_disconnect


class Generation:
    """An endpoint that generates; plain ASGI, so that it sees the client go."""

    def __init__(self, service: Service, kind: type[GenerationRequest], answer: Any) -> None:
        self.service, self.kind, self.answer = service, kind, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.service.check_open()
        request, params = await read_body(self.service.llm, Request(scope, receive), self._decode)
        await until_disconnect(receive, self._answer(request, params, scope, receive, send))

    def _decode(self, body: bytes) -> tuple[GenerationRequest, SamplingParams]:
        request = decode(body, self.kind)
        self.service.ignored.note(request)
        chat = not isinstance(request, CompletionRequest)
        params = request.sampling_params(self.service.chat_params if chat else self.service.completion_params)
        if chat and self.service.calls_are_special and getattr(request, "given_tools", None):
            params = replace(params, skip_special_tokens=False)  # else the text would not show where calls begin
        return request, params

    async def _answer(
        self, request: GenerationRequest, params: SamplingParams, scope: Scope, receive: Receive, send: Send
    ) -> None:
        service, model = self.service, self.service.check_model(request.model)
        if isinstance(request, CompletionRequest | EmbeddingRequest):
            prompts = request.prompts()
        else:
            assert isinstance(request, ChatCompletionRequest | ResponsesRequest)
            prompts = [await conversation(service, request)]
        request.check_rows(len(prompts))
        service.check_room(params.n * len(prompts))  # before the work; what came meanwhile is seen below
        answer: Completion = self.answer(request, params, model, len(prompts), service.tool_format)
        state = scope.get("state", {})
        asked = Asked(state.get("key", ""), state.get("request_id", ""), request.queue_timeout, request.timeout)
        salt = asked.key + (request.cache_salt or "")
        prepared = [
            await self._prepare(request, prompt, params, answer.request_id(i), salt) for i, prompt in enumerate(prompts)
        ]
        if isinstance(request, CompletionRequest) and request.echo:
            answer.echoes = await service.llm.in_thread(self._echoes, prepared, params.skip_special_tokens)
        if isinstance(request, CompletionRequest | ChatCompletionRequest) and request.return_token_ids:
            answer.prompt_ids = [one.prompt_token_ids for one in prepared]
        stream = service.open(prepared, asked)
        try:
            outputs = self._outputs(stream)
            if request.stream:
                await send_events(send, answer.events(outputs), answer.error_event, answer.done)
            else:
                await json_response(await answer.whole(outputs))(scope, receive, send)
        except ApiError as error:
            if error.status == 504:
                error.partial = answer.so_far()
            raise
        finally:
            stream.close()

    async def _prepare(
        self, request: GenerationRequest, prompt: Any, params: SamplingParams, request_id: str, salt: str
    ) -> Prepared:
        try:
            pooling = (request.pooling or "last") if isinstance(request, EmbeddingRequest) else ""
            prepared = await self.service.llm.prepare(prompt, params, request_id, cache_salt=salt, pooling=pooling)
            wanted, length = None if pooling else request.wanted, len(prepared.prompt_token_ids)
            if wanted is not None and length + wanted > self.service.max_model_len:
                raise ContextLengthError(
                    f"max_tokens={wanted} and a prompt of {length} tokens are longer than the context of "
                    f"{self.service.max_model_len}"
                )
            return prepared
        except EngineDeadError:
            raise engine_dead() from None
        except ValueError as error:
            raise request.error(error) from None

    async def _outputs(self, stream: Stream) -> AsyncIterator[RequestOutput]:
        try:
            async for output in stream:
                yield output
        except EngineDeadError:
            raise (aborted() if self.service.draining else engine_dead()) from None

    def _echoes(self, prepared: Sequence[Prepared], skip_special_tokens: bool) -> list[Echo]:
        """What to repeat of each prompt; token ids as the text that they are."""
        tokenizer = self.service.llm.engine.tokenizer

        def decode(ids: Sequence[int], skip: bool) -> str:
            return "" if tokenizer is None else tokenizer.decode(ids, skip)

        return [
            Echo(
                decode(one.prompt_token_ids, skip_special_tokens) if one.prompt is None else one.prompt,
                decode(one.prompt_token_ids[:1], False),
            )
            for one in prepared
        ]


async def conversation(service: Service, request: ChatCompletionRequest | ResponsesRequest | TokenizeRequest) -> Any:
    """The prompt of a chat, as the model's template makes it."""
    more = request.chat_template_kwargs
    try:
        return await service.llm.chat_prompt(
            request.messages or [], request.add_generation_prompt is not False, request.given_tools, more
        )
    except ValueError as error:
        subject = "input" if isinstance(request, ResponsesRequest) else "messages"
        raise from_value_error(error, ("chat_template_kwargs",), subject) from None
