"""Ranks for tests: threads of one process that talk through gloo, as processes do."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch.distributed import HashStore

from flover.engine.links import Link, Ranks
from flover.engine.rank import Rank
from flover.engine.runner import ModelRunner
from flover.engine.wire import Connection, FromRank, ToRank
from flover.parallel import Group, connect

T = TypeVar("T")


def on_ranks(size: int, function: Callable[[Group], T], *, ordered: bool = False) -> list[T]:
    """`function(group)` of every rank at once; what the first that fails raises, this raises."""
    store: Any = HashStore()  # type: ignore[no-untyped-call]

    def rank(number: int) -> T:
        return function(connect(store, number, size, torch.device("cpu"), "127.0.0.1", ordered))

    return together(size, rank)


def together(size: int, function: Callable[[int], T]) -> list[T]:
    """`function(number)` of every rank at once; what the first that fails raises, this raises."""
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def rank(number: int) -> None:
        try:
            results[number] = function(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=rank, args=(number,), daemon=True) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return results


class ThreadRanks:
    """Instead of `start_ranks`: ranks as threads of this process, whose runners can be looked at."""

    def __init__(self) -> None:
        self.runners: dict[int, ModelRunner] = {}
        self.threads: list[threading.Thread] = []

    def start(self, size: int) -> Ranks:
        links = []
        for number in range(1, size):
            mine, theirs = socket.socketpair()
            rank = Rank(Connection(theirs, ToRank), number, made=partial(self.runners.__setitem__, number))
            thread = threading.Thread(target=self._run, args=(rank, theirs), daemon=True)
            thread.start()
            self.threads.append(thread)
            links.append(Link(number, Connection(mine, FromRank), None))
        return Ranks(links)

    @staticmethod
    def _run(rank: Rank, end: socket.socket) -> None:
        rank.run()
        end.close()

    def join(self) -> None:
        """Wait until all ranks have ended."""
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive(), "a rank hangs"
