"""The OpenAPI document, made of the very models that check what clients send."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import flover

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
STATUSES = {
    "400": "a parameter is wrong; `param` names it",
    "401": "no valid API key",
    "404": "no such model",
    "413": "the body is too long",
    "415": "the body is not application/json",
    "429": "the queue is full; see Retry-After",
    "503": "shutting down, or the engine is gone",
}


def openapi(bodies: Mapping[str, type[BaseModel]], others: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """The document.

    Args:
        bodies: path -> what is posted to it. others: path -> (its content type, what it tells), of GET.
    """
    schemas = list(dict.fromkeys(bodies.values()))
    references, definitions = models_json_schema(
        [(one, "validation") for one in schemas], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, Any] = {}
    for path, kind in bodies.items():
        body = {"required": True, "content": {"application/json": {"schema": references[kind, "validation"]}}}
        paths[path] = {"post": {"requestBody": body, "responses": _responses(kind.__doc__ or "", list(STATUSES))}}
    for path, (content_type, told) in others.items():
        names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
        given = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
        responses = _responses(told, ["401", "404", "503"], content_type)
        paths[path] = {"get": {"parameters": given, "responses": responses}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Flover",
            "version": flover.__version__,
            "description": "The OpenAI API, with vLLM's fields.",
        },
        "paths": paths,
        "components": {
            "schemas": {**definitions.get("$defs", {}), "Error": ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _responses(told: str, statuses: list[str], content_type: str = "application/json") -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        "200": {"description": told.partition("\n")[0], "content": {content_type: {}}},
        **{status: {"description": STATUSES[status], "content": error} for status in statuses},
    }
