"""The routes: OpenAI's and vLLM's endpoints, health, load and metrics, under the middleware."""

from __future__ import annotations

from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

import flover
from flover.server.answers import ChatCompletion, Completion
from flover.server.bodies import Body, decode, json_response, read_body
from flover.server.embeddings import EmbeddingAnswer, EmbeddingRequest
from flover.server.errors import ApiError, internal, invalid
from flover.server.generation import Generation, conversation
from flover.server.live import LiveEndpoint
from flover.server.middleware import Auth, Bodies, RequestId
from flover.server.openapi import openapi
from flover.server.page import page_routes
from flover.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from flover.server.responses import ResponseAnswer, ResponsesRequest
from flover.server.service import Service

EXPOSED = ("X-Request-Id", "Retry-After")  # headers that pages of other origins may read, beside the usual ones


def make_app(service: Service) -> ASGIApp:
    """The whole ASGI application."""
    config = service.config
    app: ASGIApp = Starlette(
        routes=routes(service),
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _bug},
    )
    app = Bodies(app, config.max_body_bytes, config.body_timeout)
    app = Auth(app, config.api_keys)
    if config.allowed_origins:  # outside the keys: a browser asks first without one, and reads a 401 too
        methods, headers = config.allowed_methods, config.allowed_headers
        app = CORSMiddleware(app, config.allowed_origins, methods, headers, expose_headers=EXPOSED)
    return RequestId(app)


def routes(service: Service) -> list[Route]:
    """Every route that there is."""
    return [
        Route("/v1/models", partial(models, service)),
        Route("/v1/models/{model_id:path}", partial(model, service)),
        Route("/v1/completions", Generation(service, CompletionRequest, Completion), methods=["POST"]),
        Route("/v1/chat/completions", Generation(service, ChatCompletionRequest, ChatCompletion), methods=["POST"]),
        Route("/v1/responses", Generation(service, ResponsesRequest, ResponseAnswer), methods=["POST"]),
        Route("/v1/embeddings", Generation(service, EmbeddingRequest, EmbeddingAnswer), methods=["POST"]),
        Route("/tokenize", partial(tokenize, service), methods=["POST"]),
        Route("/detokenize", partial(detokenize, service), methods=["POST"]),
        Route("/livez", partial(livez, service)),
        Route("/readyz", partial(readyz, service)),
        Route("/health", partial(readyz, service)),
        Route("/ping", partial(readyz, service), methods=["GET", "POST"]),
        Route("/version", partial(version, service)),
        Route("/openapi.json", partial(document, service)),
        Route("/load", partial(load, service)),
        Route("/metrics", partial(metrics, service)),
        Route("/live", LiveEndpoint(service), methods=["GET"]),
        *page_routes(),
    ]


# ---- simple endpoints ------------------------------------------------------------------------------------------------


def _model_card(service: Service, name: str) -> dict[str, Any]:
    card = {"id": name, "object": "model", "created": service.created, "owned_by": "flover"}
    return {**card, "root": service.model_names[0], "max_model_len": service.max_model_len}


async def models(service: Service, request: Request) -> Response:
    return json_response({"object": "list", "data": [_model_card(service, name) for name in service.model_names]})


async def model(service: Service, request: Request) -> Response:
    return json_response(_model_card(service, service.check_model(request.path_params["model_id"])))


async def tokenize(service: Service, request: Request) -> Response:
    body = await read_body(service.llm, request, lambda body: decode(body, TokenizeRequest))
    service.check_model(body.model)
    tokenizer = service.llm.engine.tokenizer
    if tokenizer is None:
        raise invalid("the model has no tokenizer")
    ids = None if body.messages is None else (await conversation(service, body))["prompt_token_ids"]

    def answer() -> Response:
        try:
            tokens = tokenizer.encode(body.prompt or "", body.add_special_tokens) if ids is None else ids
        except ValueError as error:
            raise invalid(str(error), "prompt") from None
        value = {"tokens": tokens, "count": len(tokens), "max_model_len": service.max_model_len}
        if body.return_token_strs:
            value["token_strs"] = [tokenizer.decode([token], False) for token in tokens]
        return json_response(value)

    return await service.llm.in_thread(answer)  # all of it: there may be millions of tokens


async def detokenize(service: Service, request: Request) -> Response:
    body = await read_body(service.llm, request, lambda body: decode(body, DetokenizeRequest))
    service.check_model(body.model)
    tokenizer, size = service.llm.engine.tokenizer, service.llm.engine.core.resolved.model.vocab_size
    if tokenizer is None:
        raise invalid("the model has no tokenizer")

    def answer() -> Response:
        for token in body.tokens:
            if not 0 <= token < size:
                raise invalid(f"tokens holds {token}, which is no id of the vocabulary of {size}", "tokens")
        return json_response({"prompt": tokenizer.decode(body.tokens, False)})

    return await service.llm.in_thread(answer)


async def livez(service: Service, request: Request) -> Response:
    """This process answers."""
    return json_response({"status": "alive"})


async def readyz(service: Service, request: Request) -> Response:
    """Requests are taken in."""
    state = service.state
    return json_response({"status": state}, 200 if state == "ready" else 503)


async def version(service: Service, request: Request) -> Response:
    return json_response({"version": flover.__version__})


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
    return json_response(openapi(BODIES, TOLD))


async def load(service: Service, request: Request) -> Response:
    now = service.load
    return json_response(
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
