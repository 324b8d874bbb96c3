"""The ingress as a process: it listens, follows the registry, and drains when told to."""

from __future__ import annotations

import asyncio
import signal
import socket

from flover.cluster.ingress import Ingress, watch
from flover.cluster.ray import ask
from flover.server.http import HttpServer
from flover.server.serve import url


async def serve_ingress(listener: socket.socket, ingress: Ingress, app: str, drain: float) -> int:
    """Serve until SIGTERM or SIGINT, then let what runs finish, `drain` seconds at most. -> exit code."""
    server = HttpServer(ingress.app)
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, told.set)
    ingress.update(await ask(app))
    watching = asyncio.create_task(watch(ingress, lambda: ask(app)))
    serving = asyncio.create_task(server.serve([listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        print(f"Flover serves {len(ingress.targets)} replicas at {url(listener)}", flush=True)
    waiting = asyncio.create_task(told.wait())
    await asyncio.wait({waiting, serving}, return_when=asyncio.FIRST_COMPLETED)
    ingress.draining = True
    deadline = loop.time() + drain
    while ingress.live and loop.time() < deadline:
        await asyncio.sleep(0.05)
    server.should_exit = True
    watching.cancel()
    waiting.cancel()
    await serving
    return 0
