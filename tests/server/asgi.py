"""The application in this process: requests by hand, which can go at any moment, and a service that counts steps."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

from flover import AsyncLLM
from flover.server.app import make_app
from flover.server.config import ServerConfig
from flover.server.service import Service


class Client:
    """One request to the ASGI application, by hand: it can go at any moment."""

    def __init__(self, app: Any, path: str, body: dict[str, Any], headers: Any = (), method: str = "POST") -> None:
        self.gone, self.sent = asyncio.Event(), b""
        self.status, self.headers = 0, {}
        self._body = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
        headers = [(b"content-type", b"application/json"), *headers]
        self.task = asyncio.ensure_future(app({**scope, "headers": headers, "root_path": ""}, self.receive, self.send))

    async def receive(self) -> Any:
        if self._body:
            return self._body.pop()
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], dict(message["headers"])
        self.sent += message.get("body", b"")


class Steps(Service):
    """Counts the engine's steps."""

    def __init__(self, llm: AsyncLLM, config: ServerConfig) -> None:
        super().__init__(llm, config)
        self.num_steps = 0

    def stepped(self, outputs: Any, stats: Any) -> None:
        self.num_steps += 1
        super().stepped(outputs, stats)


async def until(condition: Callable[[], Any]) -> None:
    async def poll() -> None:
        while not condition():
            await asyncio.sleep(0.001)

    await asyncio.wait_for(poll(), 20)


def run(llm: AsyncLLM, test: Callable[[Steps, Any], Coroutine[Any, Any, None]], **config: Any) -> None:
    async def main() -> None:
        service = Steps(llm, ServerConfig(**config))
        await test(service, make_app(service))
        await until(lambda: not service.load.live)
        assert service.load.rows == service.load.waiting == service.load.queued_tokens == 0
        metrics = service.metrics
        ended = (metrics.finished, metrics.aborted_for, metrics.failed_for)
        assert metrics.accepted == sum(each.total() for each in ended)
        assert not llm.engine.core.has_unfinished()
        assert not llm.live_request_ids
        assert service.metrics.blocks[2] == 0

    asyncio.run(main())
