"""The front: HTTP over an `AsyncLLM`, in a process of its own: `python -m flover.server.front LISTENER CHANNEL PARENT`.

It listens once the model is loaded, keeps its engine alive (one that dies or hangs is started again, with growing
delays), drains when the supervisor says so, and ends with the supervisor.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flover.async_llm import AsyncLLM
from flover.engine.remote import EngineDeadError
from flover.engine.wire import Connection
from flover.lifeline import end_soon, end_with_parent
from flover.server.admin import bind_admin, make_admin
from flover.server.app import make_app
from flover.server.config import ServerConfig
from flover.server.control import Abort, Drain, Failed, Leaving, Serving, Setup, ToFront
from flover.server.http import LINGER, HttpServer
from flover.server.records import RequestLog
from flover.server.restarts import Restarts
from flover.server.service import Service
from flover.server.tracing import Tracing
from flover.server.watchdog import Watchdog
from flover.startup import settle

TICK = 0.25  # seconds between looks at the engine
SILENCE = 3.0  # seconds that a rank may be stopped
logger = logging.getLogger("flover")


class Supervised:
    """The channel to the supervisor. `heard` is called with its messages, on a thread."""

    def __init__(self, fd: int) -> None:
        self._connection = Connection(socket.socket(fileno=fd), ToFront)
        self.heard: Callable[[Any], object] = lambda message: None
        self.setup: Setup = next(iter(self._connection.receive()))
        threading.Thread(target=self._read, daemon=True, name="flover-supervisor").start()

    def say(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # it is gone, and so are we soon
            self._connection.send(message)

    def _read(self) -> None:
        with contextlib.suppress(EOFError):
            while True:
                for message in self._connection.receive():
                    self.heard(message)
        end_soon()
        self.heard(Abort())


def main(listener_fd: int, channel_fd: int, parent: int) -> int:
    """-> exit code: 0 when it was told to end."""
    end_with_parent(parent)
    supervisor = Supervised(channel_fd)
    setup = supervisor.setup
    if setup.verbose:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("\x1b[2m%(message)s\x1b[0m"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    with socket.socket(fileno=listener_fd) as listener:
        try:
            llm = AsyncLLM(**setup.engine)
        except (ValueError, EngineDeadError) as error:
            supervisor.say(Failed(str(error), final=False))
            return 2
        logger.info("memory: %s", llm.engine.core.resolved.memory)
        try:
            return asyncio.run(_serve(Service(llm, setup.config), listener, supervisor))
        finally:
            llm.shutdown()


async def _serve(service: Service, listener: socket.socket, supervisor: Supervised) -> int:
    service.llm.attach()
    told: asyncio.Queue[Any] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    supervisor.heard = lambda message: loop.call_soon_threadsafe(told.put_nowait, message)
    server = HttpServer(make_app(service))
    serving = asyncio.create_task(server.serve([listener]))
    listeners = _listeners(service.config)
    service.metrics.listeners += listeners
    admin = await _serve_admin(service, told, supervisor)
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    settle()
    supervisor.say(Serving(service.model_names[0]))
    keeper = asyncio.create_task(_keep_engine(service))
    watch = asyncio.create_task(_watch(service))
    end = asyncio.create_task(_until_told(service, told))
    await asyncio.wait({end, keeper, serving}, return_when=asyncio.FIRST_COMPLETED)
    code = 0
    if keeper.done() and not end.done():
        cause = keeper.result()
        logger.error("%s", cause)
        supervisor.say(Failed(cause, final=True))
        code = 1
    for task in (end, keeper, watch):
        task.cancel()
    await asyncio.gather(end, keeper, watch, return_exceptions=True)
    server.should_exit = True
    await serving
    if admin is not None:
        admin_server, admin_serving = admin
        admin_server.should_exit = True
        await admin_serving
    for one in listeners:
        await asyncio.to_thread(one.close)
    return code


def _listeners(config: ServerConfig) -> list[RequestLog | Tracing]:
    """Who is told of the end of each request."""
    listeners: list[RequestLog | Tracing] = []
    if config.log_requests:
        listeners.append(RequestLog(config.log_prompts))
    if config.otlp_traces_endpoint:
        listeners.append(Tracing(config.otlp_traces_endpoint))
    return listeners


async def _serve_admin(
    service: Service, told: asyncio.Queue[Any], supervisor: Supervised
) -> tuple[HttpServer, asyncio.Task[None]] | None:
    """The admin socket; a server does without where it cannot be made."""
    path = service.config.admin_socket
    if path in ("", "none"):
        return None
    try:
        listener = bind_admin(Path(path))
    except OSError as error:
        logger.warning("no admin socket at %s: %s", path, error.strerror or error)
        return None

    def drain() -> None:
        supervisor.say(Leaving())
        told.put_nowait(Drain())

    server = HttpServer(make_admin(service, drain))

    async def serve() -> None:
        with listener:
            await server.serve([listener])
            Path(path).unlink(missing_ok=True)

    return server, asyncio.create_task(serve())


async def _until_told(service: Service, told: asyncio.Queue[Any]) -> None:
    """Wait for the order to end, and obey it."""
    first = await told.get()
    service.draining = True
    logger.info("draining: %d requests run; again to abort them", len(service.load.live))
    drained = asyncio.create_task(service.drained())
    if isinstance(first, Drain):
        again = asyncio.create_task(told.get())
        timeout = service.config.drain_timeout
        await asyncio.wait({again, drained}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        again.cancel()
    if service.load.live:
        logger.warning("requests aborted: %d", len(service.load.live))
        await service.abort(service.llm.live_request_ids, "shutdown")
        await asyncio.wait({drained}, timeout=LINGER)
        if service.load.live:  # the engine hangs: only its end tells the streams
            await service.llm.end_engine()
            await asyncio.wait({drained}, timeout=LINGER)
    drained.cancel()


async def _keep_engine(service: Service) -> str:
    """Start the engine again when it has died; -> why it is given up."""
    restarts, since = Restarts(service.config.max_restarts), time.monotonic()
    while True:
        await service.dead.wait()
        cause = service.death
        delay = restarts.failed(time.monotonic() - since)
        while delay is not None:
            logger.warning("the engine has died (%s); it is started again in %g s", cause, delay)
            await asyncio.sleep(delay)
            try:
                await service.llm.restart()
                break
            except (ValueError, EngineDeadError) as error:
                cause, delay = str(error), restarts.failed(0.0)
        if delay is None:
            return f"the engine died {restarts.num_failures} times in a row and is given up: {cause}"
        service.revived()
        since = time.monotonic()


async def _watch(service: Service) -> None:
    """Look whether the engine makes progress; end one that does not."""
    watchdog, limit = Watchdog(), service.config.engine_iteration_timeout
    still = 0.0  # seconds that rank 0 of a group has been stopped
    while True:
        still = still + TICK if not service.dead.is_set() and service.llm.group_stopped else 0.0
        if still > SILENCE:
            logger.error("rank 0 was stopped by a signal %g s ago: the group is ended", still)
            await service.llm.end_engine()
        has_work = bool(service.load.live) and not service.dead.is_set()
        watchdog.tick(time.monotonic(), has_work, service.num_events)
        service.stalled = watchdog.stalled >= limit / 4 > 0
        if watchdog.stalled >= limit > 0:
            logger.error("the engine made no step for %g s: it is ended", limit)
            await service.llm.end_engine()
        await asyncio.sleep(TICK)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
