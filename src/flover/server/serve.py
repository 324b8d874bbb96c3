"""`flover serve`: the supervisor. It owns the listening socket and one front (`server.front`), which owns the engine.

The port is taken before anything is loaded, so that a port in use is told at once. The first SIGTERM or SIGINT drains,
a second aborts what is left, a third kills. A front that dies is started again on the same socket; connections that
come meanwhile wait in its backlog. The front ends with this process, and the engine with the front.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from flover.engine.wire import Connection
from flover.lifeline import ending
from flover.server.config import ServerConfig, admin_socket_path
from flover.server.control import Abort, Drain, Failed, FromFront, Leaving, Serving, Setup
from flover.server.restarts import Restarts

logger = logging.getLogger("flover")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
END_SECONDS = 5.0  # for a front that has closed its end to exit


def run(config: ServerConfig, engine: Mapping[str, Any]) -> int:
    """Serve until told to stop. -> exit code: 0 after a drain or SIGTERM, 1 if it kept dying, else 128 + signal.

    Raises:
        ValueError: anything wrong with settings or checkpoint. OSError: the address cannot be taken.
    """
    with bind(config.host, config.port) as listener, _signals() as told:
        if not config.admin_socket:
            config = replace(config, admin_socket=str(admin_socket_path(listener.getsockname()[1])))
        return Supervisor(listener, told, config, engine).run()


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


def url(listener: socket.socket) -> str:
    """Where clients of this machine find it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def reap() -> None:
    """As process 1 of a container, which inherits the engine of a front that was killed: it stays no zombie."""
    if os.getpid() == 1:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


@contextlib.contextmanager
def _signals() -> Iterator[socket.socket]:
    """A socket from which the numbers of signals can be read. After it they are ignored: this process is ending."""
    read, write = socket.socketpair()
    write.setblocking(False)
    with read, write:
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        before = signal.set_wakeup_fd(write.fileno())
        try:
            yield read
        finally:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            signal.set_wakeup_fd(before)


class Supervisor:
    """Starts fronts, one at a time. `told`: see `_signals`."""

    def __init__(
        self, listener: socket.socket, told: socket.socket, config: ServerConfig, engine: Mapping[str, Any]
    ) -> None:
        self._listener, self._told, self._config, self._engine = listener, told, config, engine
        self._restarts = Restarts(config.max_restarts)
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._num_signals = 0
        self._code: int | None = None  # to exit with, once the front has ended
        self._served = False  # ever
        self._serving_since: float | None = None  # this front
        self._cause = ""  # of the front's end, as it said itself

    def run(self) -> int:
        """-> exit code, as `flover.server.serve.run`."""
        while True:
            self._front()
            if self._code is not None:
                return self._code
            since = self._serving_since
            delay = self._restarts.failed(0.0 if since is None else time.monotonic() - since)
            if delay is None:
                print(
                    f"flover: error: given up after {self._config.max_restarts} restarts: {self._cause}",
                    file=sys.stderr,
                )
                return 1
            logger.warning("the front has ended (%s); it is started again in %g s", self._cause, delay)
            self._pause(delay)
            if self._code is not None:
                return self._code

    def _front(self) -> None:
        """One front, from its start to its end."""
        mine, theirs = socket.socketpair()
        with theirs:
            fds = (self._listener.fileno(), theirs.fileno())
            command = [sys.executable, "-m", "flover.server.front", *map(str, fds), str(os.getpid())]
            self._process = subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL, start_new_session=True)
        self._connection = Connection(mine, FromFront)
        self._serving_since, self._cause = None, ""
        with contextlib.suppress(OSError):  # it has ended, which the loop will see
            self._connection.send(Setup(self._config, dict(self._engine), sys.stderr.isatty()))
        ended = False
        while not ended:
            for ready in select.select([self._told, mine], [], [])[0]:
                if ready is mine:
                    ended = self._take_messages()
                else:
                    self._take_signals()
        mine.close()
        try:
            code = self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._cause = self._cause or ending(code)
        self._process = self._connection = None

    def _take_messages(self) -> bool:
        """-> whether the front is at its end.

        Raises:
            ValueError: the first front cannot start.
        """
        assert self._connection is not None
        assert self._process is not None
        try:
            for message in self._connection.receive():
                if isinstance(message, Serving):
                    if not self._served:
                        print(f"Flover serves {message.model} at {url(self._listener)}", flush=True)
                    self._served, self._serving_since = True, time.monotonic()
                    reap()
                elif isinstance(message, Leaving):
                    self._code, self._num_signals = 0, max(self._num_signals, 1)
                elif isinstance(message, Failed):
                    self._cause = message.message
                    if not self._served and self._code is None:
                        self._process.wait()
                        raise ValueError(message.message)
                    if message.final and self._code is None:
                        print(f"flover: error: {message.message}", file=sys.stderr)
                        self._code = 1
        except EOFError:
            return True
        return False

    def _take_signals(self) -> None:
        for number in self._told.recv(64):
            self._num_signals += 1
            if self._process is None or self._serving_since is None or self._num_signals > 2:
                self._code = 128 + number
                if self._process is not None:
                    self._process.kill()
                continue
            second = self._num_signals == 2
            # a second SIGTERM is an order too, and it was obeyed; a second Ctrl-C cuts short
            self._code = 128 + number if second and number == signal.SIGINT else 0
            assert self._connection is not None
            with contextlib.suppress(OSError):
                self._connection.send(Abort() if second else Drain())

    def _pause(self, seconds: float) -> None:
        """Until they are over, or a signal comes."""
        if select.select([self._told], [], [], seconds)[0]:
            self._take_signals()
