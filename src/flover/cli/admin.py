"""`flover admin`: verbs for a server on this machine, over its Unix socket."""

from __future__ import annotations

import http.client
import socket
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

app = typer.Typer(help="Tell a server on this machine to drain, abort a request or forget its prefix cache.")
Port = Annotated[int, typer.Option(help="of the server, which names its socket")]
Socket = Annotated[Path | None, typer.Option(help="as given to `flover serve --admin-socket`")]


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        try:
            self.sock.connect(str(self._path))
        except OSError as error:
            raise ValueError(f"no server listens at {self._path}: {error.strerror}") from None


def _ask(method: str, path: str, port: int, admin_socket: Path | None) -> int:
    """Print the answer; -> exit code."""
    from flover.server.config import admin_socket_path

    connection: Any = _UnixConnection(admin_socket or admin_socket_path(port))
    connection.request(method, path)
    response = connection.getresponse()
    print(response.read().decode())
    return 0 if response.status == 200 else 1


@app.command()
def status(port: Port = 8000, socket: Socket = None) -> int:
    """Its state, the requests that live, and the blocks of the KV cache."""
    return _ask("GET", "/status", port, socket)


@app.command()
def drain(port: Port = 8000, socket: Socket = None) -> int:
    """Take nothing in any more, let what runs finish, end; as SIGTERM."""
    return _ask("POST", "/drain", port, socket)


@app.command()
def abort(
    request_id: Annotated[str, typer.Argument(help="the answer's id, or its X-Request-Id")],
    port: Port = 8000,
    socket: Socket = None,
) -> int:
    """End a request; its client gets an `aborted` error."""
    return _ask("POST", f"/abort/{quote(request_id, safe='')}", port, socket)


@app.command(name="reset-cache")
def reset_cache(port: Port = 8000, socket: Socket = None) -> int:
    """Forget the prefixes that can be reused; requests go on."""
    return _ask("POST", "/reset-cache", port, socket)
