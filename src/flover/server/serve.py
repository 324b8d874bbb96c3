"""`flover serve`: bind, load, listen, drain, exit.

The port is taken before the model is loaded, so that a port in use is told at once. The first SIGTERM or SIGINT ends
the taking in (503, /readyz too) and lets what runs finish, for `drain_timeout` seconds; a second aborts it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Generator, Mapping
from typing import Any

import uvicorn

from flover.async_llm import AsyncLLM
from flover.server.app import make_app
from flover.server.http import HttpProtocol
from flover.server.service import ServerConfig, Service

LINGER = 2.0  # seconds for last answers to reach their clients
logger = logging.getLogger("flover")


def run(config: ServerConfig, engine: Mapping[str, Any]) -> int:
    """Serve until told to stop. -> exit code: 0 after a drain, 1 if the engine died, 128 + signal if it was cut short.

    Raises:
        ValueError: anything wrong with settings or checkpoint. OSError: the address cannot be taken.
    """
    listener = bind(config.host, config.port)
    with listener:
        llm = AsyncLLM(**engine)
        try:
            logger.info("memory: %s", llm.engine.core.resolved.memory)
            return asyncio.run(_serve(Service(llm, config), listener))
        finally:
            llm.shutdown()


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound but does not listen yet; OSError names the address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
    return listener


class _Server(uvicorn.Server):
    """uvicorn, but the signals are ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


async def _serve(service: Service, listener: socket.socket) -> int:
    service.llm.attach()
    settings = uvicorn.Config(
        make_app(service),
        http=HttpProtocol,
        log_config=None,
        log_level="error",
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=int(LINGER),
    )
    server = _Server(settings)
    signals: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, signals.put_nowait, number)
    serving = asyncio.create_task(server.serve([listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        print(f"Flover serves {service.model_names[0]} at {url(listener)}", flush=True)
    code = await _until_told(service, signals, serving)
    server.should_exit = True
    await serving
    return code


async def _until_told(service: Service, signals: asyncio.Queue[int], serving: asyncio.Task[None]) -> int:
    """-> exit code, when nothing is left to wait for."""
    told = asyncio.create_task(signals.get())
    dead = asyncio.create_task(service.dead.wait())
    await asyncio.wait({told, dead, serving}, return_when=asyncio.FIRST_COMPLETED)
    code = 0
    if told.done():
        service.draining = True
        logger.info("draining: %d requests run; again to abort them", len(service.load.live))
        again = asyncio.create_task(signals.get())
        drained = asyncio.create_task(service.drained())
        timeout = service.config.drain_timeout
        await asyncio.wait({again, drained, dead}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if again.done():
            code = 128 + again.result()
        if service.load.live:
            logger.warning("%d requests are aborted", len(service.load.live))
            await service.abort_all()
            await asyncio.wait({drained, dead}, timeout=LINGER, return_when=asyncio.FIRST_COMPLETED)
        again.cancel()
        drained.cancel()
    if dead.done():
        logger.error("the engine has died")
        code = 1
    told.cancel()
    dead.cancel()
    return code


def url(listener: socket.socket) -> str:
    """Where clients of this machine find it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
