"""The routes: OpenAI's and vLLM's endpoints, health, load and metrics, under the middleware."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

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
from flover.request import ContextLengthError
from flover.server.answers import ChatCompletion, Completion
from flover.server.errors import ApiError, engine_dead, from_value_error, internal, invalid
from flover.server.middleware import Auth, Bodies, RequestId
from flover.server.protocol import (
    B,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    decode,
)
from flover.server.service import Service
from flover.server.sse import send_events, until_disconnect

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
        Route("/tokenize", _get(service, tokenize), methods=["POST"]),
        Route("/detokenize", _get(service, detokenize), methods=["POST"]),
        Route("/livez", _get(service, livez)),
        Route("/readyz", _get(service, readyz)),
        Route("/health", _get(service, readyz)),
        Route("/ping", _get(service, readyz), methods=["GET", "POST"]),
        Route("/version", _get(service, version)),
        Route("/load", _get(service, load)),
        Route("/metrics", _get(service, metrics)),
    ]


class Generation:
    """An endpoint that generates; plain ASGI, so that it sees the client go."""

    def __init__(self, service: Service, kind: type[CompletionRequest | ChatCompletionRequest], answer: Any) -> None:
        self.service, self.kind, self.answer = service, kind, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.service.check_open()
        request = await _body(self.service, Request(scope, receive), self.kind)
        await until_disconnect(receive, self._answer(request, scope, receive, send))

    async def _answer(
        self, request: CompletionRequest | ChatCompletionRequest, scope: Scope, receive: Receive, send: Send
    ) -> None:
        model = self.service.check_model(request.model)
        prompts = await self._prompts(request)
        answer: Completion = self.answer(request, model, len(prompts))
        salt = scope.get("state", {}).get("key", "") + (request.cache_salt or "")
        prepared = [
            await self._prepare(request, prompt, answer.request_id(i), salt) for i, prompt in enumerate(prompts)
        ]
        stream = self.service.open(prepared)
        try:
            outputs = _outputs(stream)
            if request.stream:
                await send_events(send, answer.events(outputs))
            else:
                await _json(await answer.whole(outputs))(scope, receive, send)
        finally:
            stream.close()

    async def _prompts(self, request: CompletionRequest | ChatCompletionRequest) -> list[Any]:
        if isinstance(request, CompletionRequest):
            return request.prompts()
        return [await _conversation(self.service, request.messages, request.add_generation_prompt)]

    async def _prepare(
        self, request: CompletionRequest | ChatCompletionRequest, prompt: Any, request_id: str, salt: str
    ) -> Prepared:
        chat = isinstance(request, ChatCompletionRequest)
        params = request.sampling_params(self.service.chat_params if chat else self.service.completion_params)
        try:
            prepared = await self.service.llm.prepare(prompt, params, request_id, cache_salt=salt)
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


async def _outputs(stream: Stream) -> Any:
    try:
        async for output in stream:
            yield output
    except EngineDeadError:
        raise engine_dead() from None


async def _conversation(service: Service, messages: Any, add_generation_prompt: bool | None) -> Any:
    try:
        return await service.llm.chat_prompt(messages, add_generation_prompt is not False)
    except ValueError as error:
        raise from_value_error(error, (), "messages") from None


async def _body(service: Service, request: Request, kind: type[B]) -> B:
    """The body, checked; ApiError 415 or 400."""
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, f"the content type must be application/json, got {content_type[:100]!r}")
    body = await request.body()
    if len(body) < INLINE_BYTES:
        return decode(body, kind)
    return await service.llm.in_thread(decode, body, kind)


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
    body = await _body(service, request, TokenizeRequest)
    service.check_model(body.model)
    tokenizer = service.llm.engine.tokenizer
    if tokenizer is None:
        raise invalid("the model has no tokenizer")
    if body.messages is not None:
        prompt = await _conversation(service, body.messages, body.add_generation_prompt)
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
    body = await _body(service, request, DetokenizeRequest)
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
    return _json({"status": "draining" if service.draining else "engine dead"}, 503)


async def version(service: Service, request: Request) -> Response:
    return _json({"version": flover.__version__})


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
