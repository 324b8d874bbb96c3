"""What an administrator may do: an HTTP application on a Unix socket that only the server's user can open.

Kept off the listening port, so that no API key, however it leaked, stops a server.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from flover.server.bodies import json_response
from flover.server.service import Service


def make_admin(service: Service, drain: Callable[[], None]) -> Starlette:
    """drain: as SIGTERM."""

    async def status(request: Request) -> Response:
        live = {name: {"label": one.label, "tokens": one.num_tokens} for name, one in service.load.live.items()}
        free, cached, used = service.metrics.blocks
        blocks = {"free": free, "cached": cached, "used": used}
        return json_response({"state": service.state, "live": live, "kv_blocks": blocks})

    async def drain_all(request: Request) -> Response:
        drain()
        return json_response({"draining": len(service.load.live)})

    async def abort(request: Request) -> Response:
        given, live = request.path_params["request_id"], service.load.live  # names: id of an answer, number of a prompt
        names = [name for name, one in live.items() if given in (name, name.rpartition("-")[0], one.label)]
        await service.abort(names, "admin")
        return json_response({"aborted": names}, 200 if names else 404)

    async def reset_cache(request: Request) -> Response:
        service.llm.reset_prefix_cache()
        return json_response({"reset": True})

    return Starlette(
        routes=[
            Route("/status", status),
            Route("/drain", drain_all, methods=["POST"]),
            Route("/abort/{request_id}", abort, methods=["POST"]),
            Route("/reset-cache", reset_cache, methods=["POST"]),
        ]
    )


def bind_admin(path: Path) -> socket.socket:
    """A socket at a path, for this user alone; one left behind is replaced. OSError if it cannot be."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = path.parent.stat()
    if owner.st_uid != os.getuid() or owner.st_mode & 0o022:
        raise PermissionError(f"{path.parent} belongs to, or can be written by, others")
    if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(before)
    return listener
