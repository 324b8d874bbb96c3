"""The other ranks of a group, as rank 0 sees them.

A rank is a process at the other end of a socket: a pair on one machine, TCP across. Invariant: nothing waits for a rank
without an end. A rank that has ended, has failed, or says nothing for `SILENCE` seconds is the end of the group: its
processes are killed, and whoever waits gets a `GroupDeadError` that names the rank.
"""

from __future__ import annotations

import secrets
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import msgspec

from flover.engine.wire import Alive, Connection, FromRank, Hello, Stop, Trouble
from flover.lifeline import ending

JOIN_SECONDS = 50.0  # for a process to start and import torch
SILENCE = 3.5  # seconds
LOADING_SILENCE = 20.0  # while compilers may keep a process from saying anything
SEND_SECONDS = 3.0
TICK = 0.2
T = TypeVar("T")


class GroupDeadError(RuntimeError):
    """A rank is lost, and with it the group; a new engine starts a new one."""


class Link:
    """A rank at the other end of a connection. process: if it was started here."""

    def __init__(self, rank: int, connection: Connection, process: subprocess.Popen[bytes] | None) -> None:
        self.rank, self.connection, self.process = rank, connection, process
        self.inbox: SimpleQueue[Any] = SimpleQueue()
        self.heard: float | None = None  # when it last said something
        connection.socket.settimeout(SEND_SECONDS)

    def __str__(self) -> str:
        return f"rank {self.rank}" + ("" if self.process is None else f" (process {self.process.pid})")

    def ending(self) -> str:
        """What became of it, once its socket has closed."""
        code = None
        if self.process is not None:
            with suppress(subprocess.TimeoutExpired):
                code = self.process.wait(timeout=1)
        if code is None:
            return f"{self} has closed its connection"
        return f"{self} {'was' if code < 0 else 'has ended with'} {ending(code)}"


class Ranks:
    """All ranks but this one; a thread listens to them. `failure`: why the group is dead."""

    def __init__(self, links: list[Link]) -> None:
        self._links = links
        self._failed = threading.Event()
        self.failure = ""
        self.serving = False  # all have loaded
        self.when_lost: Callable[[], None] = lambda: None  # called once the group is dead, on any thread
        self._closing = False
        self._watcher = threading.Thread(target=self._watch, daemon=True, name="flover-ranks")
        self._watcher.start()

    # ---- to the ranks ------------------------------------------------------------------------------------------------

    def broadcast(self, message: Any) -> None:
        """The same message to all, encoded once."""
        frame = Connection.frame(message)
        for link in self._links:
            try:
                link.connection.socket.sendall(frame)
            except TimeoutError:
                self.fail(f"{link} has read nothing for {SEND_SECONDS:.0f} s")
            except OSError:
                pass  # it is gone, which the watcher will say

    # ---- from the ranks ----------------------------------------------------------------------------------------------

    def expect(self, kind: type[T], seconds: float | None = None) -> list[tuple[int, T]]:
        """A message of that kind from every rank.

        Raises:
            GroupDeadError: a rank that ended, failed, or has not answered in time.
        """
        end = None if seconds is None else time.monotonic() + seconds
        answers = []
        for link in self._links:
            while True:
                self.check()
                try:
                    message = link.inbox.get(timeout=TICK)
                except Empty:
                    if end is not None and time.monotonic() > end:
                        self.fail(f"{link} has not joined within {seconds:.0f} s")
                    continue
                if isinstance(message, kind):
                    answers.append((link.rank, message))
                    break
        return answers

    def check(self) -> None:
        """GroupDeadError if a rank is lost."""
        if self._failed.is_set():
            raise GroupDeadError(self.failure)

    def wait_for_failure(self, seconds: float) -> None:
        """Give the watcher time to say why a collective failed here."""
        self._failed.wait(seconds)

    def fail(self, why: str) -> None:
        """The group is dead; the first reason counts."""
        if self._failed.is_set() or self._closing:
            return
        self.failure = f"{why}; the group has ended with it"
        self._failed.set()
        processes = [link.process for link in self._links if link.process is not None]
        for process in processes:
            process.kill()  # also wakes those who wait for it in a collective
        self.when_lost()
        for process in processes:
            process.wait()  # with a GPU it takes a second or two to end

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for link in self._links:
                selector.register(link.connection.socket, selectors.EVENT_READ, link)
            while not (self._closing or self._failed.is_set()):
                for key, _ in selector.select(TICK):
                    self._read(key.data)
                now = time.monotonic()
                limit = SILENCE if self.serving else LOADING_SILENCE
                for link in self._links:
                    if link.heard is not None and now - link.heard > limit:
                        self.fail(f"{link} has not been heard of for {limit} s")

    def _read(self, link: Link) -> None:
        try:
            for message in link.connection.receive():
                link.heard = time.monotonic()
                if isinstance(message, Trouble):
                    self.fail(f"{link} failed: {message.message}")
                elif not isinstance(message, Alive):
                    link.inbox.put(message)
        except EOFError:
            self.fail(link.ending())
        except (msgspec.MsgspecError, OSError) as error:
            self.fail(f"{link} says what this version does not understand: {error}")

    def close(self) -> None:
        """End all ranks, in order if they can."""
        self._closing = True
        if not self._failed.is_set():
            self.broadcast(Stop())
        self._watcher.join()
        for link in self._links:
            if link.process is not None:
                with suppress(subprocess.TimeoutExpired):
                    link.process.wait(timeout=0 if self.failure else 5)
                link.process.kill()  # does nothing to one that has ended
                link.process.wait()
            link.connection.close()


def start_ranks(size: int) -> Ranks:
    """Processes of this machine, one for each rank but 0; they end with this process."""
    main = threading.current_thread() is threading.main_thread()
    links = []
    for rank in range(1, size):
        mine, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "flover.engine.rank", str(theirs.fileno()), str(rank), str(main)],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is the front's business
            )
        links.append(Link(rank, Connection(mine, FromRank), process))
    return Ranks(links)


def await_ranks(size: int, address: str, publish: Callable[[str], None]) -> Ranks:
    """Ranks that were started elsewhere and connect to this one.

    Args:
        address: of this machine, on which to listen. publish: makes known where and with which secret to connect.

    Raises:
        GroupDeadError: some did not come in time; names them.
    """
    secret, end = secrets.token_hex(16), time.monotonic() + JOIN_SECONDS
    links: dict[int, Link] = {}
    with socket.create_server((address, 0)) as server:
        publish(f"{address} {server.getsockname()[1]} {secret}")
        while len(links) < size - 1:
            server.settimeout(max(end - time.monotonic(), 0.01))
            try:
                connection = Connection(server.accept()[0], FromRank)
                connection.socket.settimeout(SEND_SECONDS)
                hello = next(connection.receive())
            except TimeoutError:
                missing = ", ".join(str(rank) for rank in range(1, size) if rank not in links)
                for link in links.values():
                    link.connection.close()
                message = f"rank {missing} has not joined within {JOIN_SECONDS:.0f} s (MASTER_ADDR, MASTER_PORT, RANK?)"
                raise GroupDeadError(message) from None
            except (EOFError, OSError, StopIteration, msgspec.MsgspecError):
                continue  # a stranger
            if not isinstance(hello, Hello) or hello.secret != secret or hello.rank in links:
                connection.close()
                continue
            keep_alive(connection.socket)
            links[hello.rank] = Link(hello.rank, connection, None)
            links[hello.rank].inbox.put(hello)
    return Ranks([links[rank] for rank in sorted(links)])


def keep_alive(end: socket.socket) -> None:
    """Let the system close a connection whose other machine has been silent for a few seconds."""
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 1), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 4000)):
        if hasattr(socket, name):  # Linux
            end.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
