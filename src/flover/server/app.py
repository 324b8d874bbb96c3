"""The routes: OpenAI's and vLLM's endpoints, health, load and metrics, under the middleware."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import flover
from flover.async_llm import Stream
from flover.engine.llm_engine import Prepared
from flover.engine.remote import EngineDeadError
from flover.request import ContextLengthError, RequestOutput, SamplingParams
from flover.server.answers import ChatCompletion, Completion, Echo
from flover.server.embeddings import ONE_TOKEN, EmbeddingAnswer, EmbeddingRequest
from flover.server.errors import ApiError, aborted, engine_dead, from_value_error, internal, invalid
from flover.server.live import LiveEndpoint
from flover.server.middleware import Auth, Bodies, RequestId
from flover.server.openapi import openapi
from flover.server.page import page_routes
from flover.server.protocol import (
    Body,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
    decode,
)
from flover.server.responses import ResponseAnswer, ResponsesRequest
from flover.server.service import Asked, Service
from flover.server.sse import send_events, until_disconnect

T = TypeVar("T")
INLINE_BYTES = 32_768  # a longer body is decoded on a thread


def make_app(service: Service) -> ASGIApp:
    """The whole ASGI application."""
    config = service.config
    app: ASGIApp = Starlette(
        routes=routes(service),
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _bug},
    )
    app = Bodies(app, config.max_body_bytes, config.body_timeout)
    app = Auth(app, config.api_keys)
    return RequestId(app)


def routes(service: Service) -> list[Route]:
    """Every route that there is."""
    return [
        Route("/v1/models", _get(service, models)),
        Route("/v1/models/{model_id:path}", _get(service, model)),
        Route("/v1/completions", Generation(service, CompletionRequest, Completion), methods=["POST"]),
        Route("/v1/chat/completions", Generation(service, ChatCompletionRequest, ChatCompletion), methods=["POST"]),
        Route("/v1/responses", Generation(service, ResponsesRequest, ResponseAnswer), methods=["POST"]),
        Route("/v1/embeddings", Generation(service, EmbeddingRequest, EmbeddingAnswer), methods=["POST"]),
        Route("/tokenize", _get(service, tokenize), methods=["POST"]),
        Route("/detokenize", _get(service, detokenize), methods=["POST"]),
        Route("/livez", _get(service, livez)),
        Route("/readyz", _get(service, readyz)),
        Route("/health", _get(service, readyz)),
        Route("/ping", _get(service, readyz), methods=["GET", "POST"]),
        Route("/version", _get(service, version)),
        Route("/openapi.json", _get(service, document)),
        Route("/load", _get(service, load)),
        Route("/metrics", _get(service, metrics)),
        Route("/live", LiveEndpoint(service), methods=["GET"]),
        *page_routes(),
    ]


class Generation:
    """An endpoint that generates; plain ASGI, so that it sees the client go."""

    def __init__(self, service: Service, kind: type[GenerationRequest], answer: Any) -> None:
        self.service, self.kind, self.answer = service, kind, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.service.check_open()
        request, params = await _body(self.service, Request(scope, receive), self._decode)
        await until_disconnect(receive, self._answer(request, params, scope, receive, send))

    def _decode(self, body: bytes) -> tuple[GenerationRequest, SamplingParams]:
        request = decode(body, self.kind)
        self.service.ignored.note(request)
        if isinstance(request, EmbeddingRequest):
            return request, ONE_TOKEN
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
        answer: Completion = self.answer(request, model, len(prompts), service.tool_format)
        salt = scope.get("state", {}).get("key", "") + (request.cache_salt or "")
        prepared = [
            await self._prepare(request, prompt, params, answer.request_id(i), salt) for i, prompt in enumerate(prompts)
        ]
        if isinstance(request, CompletionRequest) and request.echo:
            answer.echoes = await service.llm.in_thread(self._echoes, prepared, params.skip_special_tokens)
        state = scope.get("state", {})
        asked = Asked(state.get("key", ""), state.get("request_id", ""), request.queue_timeout, request.timeout)
        stream = service.open(prepared, asked)
        try:
            outputs = self._outputs(stream)
            if request.stream:
                await send_events(send, answer.events(outputs), answer.error_event, answer.done)
            else:
                await _json(await answer.whole(outputs))(scope, receive, send)
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
            wanted, length = request.values().get("max_tokens"), len(prepared.prompt_token_ids)
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


async def _body(service: Service, request: Request, read: Callable[[bytes], T]) -> T:
    """The body as `read` understands it, on a thread if it is long; ApiError 415 or 400."""
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, f"the content type must be application/json, got {content_type[:100]!r}")
    body = await request.body()
    if len(body) < INLINE_BYTES:
        return read(body)
    return await service.llm.in_thread(read, body)


# ---- simple endpoints ------------------------------------------------------------------------------------------------

Handler = Callable[[Service, Request], Awaitable[Response]]


def _get(service: Service, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return await handler(service, request)

    endpoint.__name__ = handler.__name__
    return endpoint


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _model_card(service: Service, name: str) -> dict[str, Any]:
    length, root = service.max_model_len, service.model_names[0]
    card = {"id": name, "object": "model", "created": service.created, "owned_by": "flover"}
    return {**card, "root": root, "max_model_len": length}


async def models(service: Service, request: Request) -> Response:
    return _json({"object": "list", "data": [_model_card(service, name) for name in service.model_names]})


async def model(service: Service, request: Request) -> Response:
    return _json(_model_card(service, service.check_model(request.path_params["model_id"])))


async def tokenize(service: Service, request: Request) -> Response:
    body = await _body(service, request, lambda body: decode(body, TokenizeRequest))
    service.check_model(body.model)
    tokenizer = service.llm.engine.tokenizer
    if tokenizer is None:
        raise invalid("the model has no tokenizer")
    if body.messages is not None:
        prompt = await conversation(service, body)
        tokens = prompt["prompt_token_ids"]
    else:
        try:
            tokens = await service.llm.in_thread(tokenizer.encode, body.prompt or "", body.add_special_tokens)
        except ValueError as error:
            raise invalid(str(error), "prompt") from None
    answer = {"tokens": tokens, "count": len(tokens), "max_model_len": service.max_model_len}
    if body.return_token_strs:
        answer["token_strs"] = [tokenizer.decode([token], False) for token in tokens]
    return _json(answer)


async def detokenize(service: Service, request: Request) -> Response:
    body = await _body(service, request, lambda body: decode(body, DetokenizeRequest))
    service.check_model(body.model)
    tokenizer, size = service.llm.engine.tokenizer, service.llm.engine.core.resolved.model.vocab_size
    if tokenizer is None:
        raise invalid("the model has no tokenizer")
    for token in body.tokens:
        if not 0 <= token < size:
            raise invalid(f"tokens holds {token}, which is no id of the vocabulary of {size}", "tokens")
    return _json({"prompt": await service.llm.in_thread(tokenizer.decode, body.tokens, False)})


async def livez(service: Service, request: Request) -> Response:
    """This process answers."""
    return _json({"status": "alive"})


async def readyz(service: Service, request: Request) -> Response:
    """Requests are taken in."""
    if service.ready:
        return _json({"status": "ready"})
    return _json({"status": service.state}, 503)


async def version(service: Service, request: Request) -> Response:
    return _json({"version": flover.__version__})


BODIES: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
TOLD = {
    "/v1/models": ("application/json", "the models"),
    "/v1/models/{model_id}": ("application/json", "one model"),
    "/livez": ("application/json", "this process answers"),
    "/readyz": ("application/json", "requests are taken in"),
    "/health": ("application/json", "requests are taken in"),
    "/ping": ("application/json", "requests are taken in"),
    "/load": ("application/json", "how much there is to do"),
    "/version": ("application/json", "of Flover"),
    "/metrics": ("text/plain", "Prometheus' text format"),
    "/openapi.json": ("application/json", "this document"),
}


async def document(service: Service, request: Request) -> Response:
    """The OpenAPI document."""
    return _json(openapi(BODIES, TOLD))


async def load(service: Service, request: Request) -> Response:
    now = service.load
    return _json(
        {
            "server_load": len(now.live),
            "num_requests_running": now.running,
            "num_requests_waiting": now.waiting,
            "queue_tokens": now.queued_tokens,
            "kv_cache_usage": round(service.metrics.kv_usage, 4),
        }
    )


async def metrics(service: Service, request: Request) -> Response:
    text = service.metrics.text()
    return Response(text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


# ---- errors ----------------------------------------------------------------------------------------------------------


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    """404 and 405 of the router."""
    assert isinstance(error, HTTPException)
    path = f"{request.method} {request.url.path}"[:200]
    text = {404: f"there is no {path}", 405: f"method not allowed: {path}"}.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, text, headers=error.headers).response()


async def _bug(request: Request, error: Exception) -> Response:
    """Ours; the log has the traceback."""
    return internal(error).response()
