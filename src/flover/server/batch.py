"""`flover run-batch`: a file of requests in OpenAI's batch format, served by the application without a network.

Every line gets one line, of its answer or its error. Lines are written as they come to a file beside the output, which
takes its name once all are there.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message

from flover.async_llm import AsyncLLM
from flover.server.app import make_app
from flover.server.config import ServerConfig
from flover.server.service import Service
from flover.show import show

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
CONCURRENCY = 512  # requests at a time; more would only wait for a row


def run_batch(input: Path, output: Path, engine: Mapping[str, Any]) -> tuple[int, int]:
    """-> requests served, requests that failed. ValueError: wrong settings, and what `partial_path` says."""
    partial, counts = partial_path(input, output), [0, 0]
    llm = AsyncLLM(**engine)
    try:
        with open(input, "rb") as lines, open(partial, "wb") as file:

            def done(result: bytes, failed: bool) -> None:
                file.write(result + b"\n")
                counts[failed] += 1

            asyncio.run(serve_lines(llm, lines, done))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, output)
        return counts[0], counts[1]
    finally:
        llm.shutdown()


def partial_path(input: Path, output: Path) -> Path:
    """Where the results are written until all are there.

    Raises:
        ValueError: an input that is not there, an output that has no place, is no file, or is the input.
    """
    if not input.is_file():
        raise ValueError(f"there is no file {input}")
    if not output.parent.is_dir():
        raise ValueError(f"there is no folder {output.parent}")
    partial = output.with_name(f"{output.name}.partial")
    for path in (output, partial):  # one takes the other's place: neither may be a folder, a device, or the requests
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is not a regular file")
        if path.exists() and path.samefile(input):
            raise ValueError(f"{path} is the input, which the results would replace: give another --output-file")
    return partial


async def serve_lines(llm: AsyncLLM, lines: Iterable[bytes], done: Callable[[bytes, bool], object]) -> None:
    """done: called with the result of each line as it comes, and whether it failed."""
    app = make_app(Service(llm, ServerConfig(max_queued_requests=1 << 30, max_queued_tokens=1 << 40)))
    room, tasks = asyncio.Semaphore(CONCURRENCY), set()
    seen: set[str] = set()

    async def one(line: bytes) -> None:
        try:
            result = await _line(app, line, seen)
            failed = result["error"] is not None or result["response"]["status_code"] != 200
            done(msgspec.json.encode(result), failed)
        finally:
            room.release()

    for line in lines:
        if line.strip():
            await room.acquire()
            task = asyncio.create_task(one(line))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)


async def _line(app: ASGIApp, line: bytes, seen: set[str]) -> dict[str, Any]:
    """The result of one line of input."""
    result: dict[str, Any] = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": None, "response": None, "error": None}
    try:
        request = msgspec.json.decode(line)
    except (ValueError, RecursionError) as error:
        return {**result, "error": {"code": "invalid_json_line", "message": f"not valid JSON: {error}"}}
    if not isinstance(request, dict):
        return {**result, "error": {"code": "invalid_request", "message": f"no object: {show(request)}"}}
    custom_id = request.get("custom_id")
    result["custom_id"] = custom_id if isinstance(custom_id, str) else None
    wrong = _fault(request, seen)
    if wrong:
        return {**result, "error": {"code": "invalid_request", "message": wrong}}
    seen.add(request["custom_id"])
    status, request_id, body = await _call(app, request["url"], msgspec.json.encode(request["body"]))
    return {**result, "response": {"status_code": status, "request_id": request_id, "body": body}}


def _fault(request: dict[str, Any], seen: set[str]) -> str:
    """What is wrong with a line; "": nothing."""
    custom_id, body = request.get("custom_id"), request.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        return f"custom_id must be a text, got {show(custom_id)}"
    if custom_id in seen:
        return f"custom_id {show(custom_id)} comes twice"
    if request.get("method", "POST") != "POST":
        return f"method must be POST, got {show(request['method'])}"
    if request.get("url") not in URLS:
        return f"url must be one of {', '.join(URLS)}, got {show(request.get('url'))}"
    if not isinstance(body, dict):
        return f"body must be an object, got {show(body)}"
    return "stream must not be true in a batch" if body.get("stream") else ""


async def _call(app: ASGIApp, path: str, body: bytes) -> tuple[int, str, Any]:
    """-> status, request id, body of the answer."""
    sent: list[Message] = []
    incoming: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if incoming:
            return incoming.pop()
        await asyncio.Event().wait()  # the client never goes
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    await app(scope, receive, send)
    headers = dict(sent[0]["headers"])
    answer = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], headers[b"x-request-id"].decode(), msgspec.json.decode(answer)
