"""A rank other than 0: `python -m flover.engine.rank FD RANK WITH_PARENT`, or a process of torchrun (`join`).

It applies the plans that rank 0 sends with a runner like rank 0's, and decides nothing. It ends when its connection
does, whatever it is doing, and reports what it cannot go on after. Before each step it compares what it believes of its
rows with what rank 0 does.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

import flover
from flover.engine.batch import StepResult, decode_masks, decode_plan
from flover.engine.digest import RowDigest
from flover.engine.engine import make_runner
from flover.engine.join import describe, meet, open_store, use_threads, where_key
from flover.engine.launch import Launch
from flover.engine.links import keep_alive
from flover.engine.runner import ModelRunner
from flover.engine.wire import (
    Alive,
    Assignment,
    Connection,
    Described,
    Go,
    Hello,
    Loaded,
    Masks,
    Stop,
    ToRank,
    Trouble,
    WarmUp,
)
from flover.lifeline import die_with_parent
from flover.models.loader import resolve_model
from flover.startup import StartupTimes, settle

BEAT_SECONDS = 0.5
FIND_SECONDS = 300.0  # for rank 0 to measure its memory and listen
RUN_AHEAD = 2  # steps whose results a device may owe


class DisagreementError(RuntimeError):
    """This rank believes something else than rank 0."""


class Rank:
    """A rank at the end of a connection to rank 0.

    Args:
        number: of the rank. secret: what rank 0 gave out, if it does not know who connects.
        launch: of torchrun; None: started by rank 0, on its machine.
        made: called with the runner, once it stands.
    """

    def __init__(
        self,
        connection: Connection,
        number: int,
        secret: str = "",
        launch: Launch | None = None,
        made: Callable[[ModelRunner], None] = lambda runner: settle(),
    ) -> None:
        self._connection, self._number, self._launch, self._made = connection, number, launch, made
        self._secret = secret
        self._lock = threading.Lock()
        self._messages = self._receive()

    def run(self) -> int:
        """Until rank 0 says stop or is gone; -> exit code."""
        self._send(Hello(self._number, flover.__version__, self._secret))
        threading.Thread(target=self._beat, daemon=True, name="flover-alive").start()
        try:
            self._serve()
        except EOFError:
            return 1
        except Exception as error:
            self._send(Trouble(f"{type(error).__name__}: {' '.join(str(error).split())}"[:2000]))
            return 1
        return 0

    def _serve(self) -> None:
        setup = self._next(Assignment)
        if setup is None:
            return
        config = setup.resolved
        folder = resolve_model(config.engine.model)
        self._send(describe(config, folder))
        if self._next(Go) is None:
            return
        if config.engine.device == "cuda":
            torch.cuda.set_device(self._number if self._launch is None else self._launch.local_rank)
        use_threads(config.engine, config.engine.device)
        if self._launch is None:
            assert setup.store is not None
            address, port = setup.store
            store: Any = TCPStore(address, port, None, False, wait_for_workers=False)
        else:
            store, address = open_store(self._launch), self._launch.address()
        group = meet(store, setup.prefix, self._number, config, address)
        runner = make_runner(config, folder, StartupTimes(), group=group)
        self._made(runner)
        self._send(Loaded())
        try:
            self._work(runner, config.scheduler.max_num_seqs)
        finally:
            runner.close()
            group.close()

    def _work(self, runner: ModelRunner, max_rows: int) -> None:
        digest, number = RowDigest(max_rows), 0
        owed: deque[Any] = deque()
        for message in self._messages:
            if isinstance(message, Stop):
                return
            if isinstance(message, WarmUp):
                runner.warm_up(message.seconds)
                continue
            if isinstance(message, Masks):
                self._owe(runner.sample(decode_masks(message.data)), owed)
                continue
            plan = decode_plan(message.data)
            check_lengths(runner, digest, self._number)
            if (number, digest.advance(plan)) != (message.sequence, message.digest):
                raise DisagreementError(
                    f"it is at step {number} with digest {digest.value:016x}, rank 0 is at step {message.sequence} "
                    f"with {message.digest:016x}"
                )
            number += 1
            if plan.masked:
                runner.launch(plan)
            else:
                self._owe(runner.execute(plan), owed)

    @staticmethod
    def _owe(result: Any, owed: deque[Any]) -> None:
        """What a device still works on; not too many steps of it."""
        if not isinstance(result, StepResult):
            owed.append(result)
        if len(owed) > RUN_AHEAD:
            owed.popleft().result()

    # ---- the connection ----------------------------------------------------------------------------------------------

    def _receive(self) -> Iterator[Any]:
        while True:
            yield from self._connection.receive()

    def _next(self, kind: type[Any]) -> Any:
        """A message of that kind; None: rank 0 stops here."""
        message = next(self._messages)
        return message if isinstance(message, kind) else None

    def _send(self, message: Hello | Described | Loaded | Alive | Trouble) -> None:
        with self._lock, suppress(OSError):  # it is gone, which the next read will say
            self._connection.send(message)

    def _beat(self) -> None:
        """From a thread: this process runs."""
        while self._connection.socket.fileno() >= 0:
            self._send(Alive())
            time.sleep(BEAT_SECONDS)


def check_lengths(runner: ModelRunner, digest: RowDigest, rank: int) -> None:
    """DisagreementError if the runner's rows are not as long as the plans so far have made them."""
    theirs = digest.computed
    mine = runner.seq_lens[: len(theirs)]
    if not np.array_equal(mine, theirs):
        row = int(np.nonzero(mine != theirs)[0][0])
        raise DisagreementError(f"row {row} has {mine[row]} tokens on rank {rank}, {theirs[row]} on rank 0")


def end_with(connection: Connection) -> None:
    """End this process when the connection does, also while a collective waits for a rank that is gone."""
    poll = select.poll()
    poll.register(connection.socket, select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0))

    def watch() -> None:
        poll.poll()
        time.sleep(1.0)  # to end by itself
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="flover-end").start()


def join(launch: Launch) -> int:
    """As a rank that torchrun has started: find rank 0 and serve it; -> exit code.

    Raises:
        ValueError: rank 0 is not there.
    """
    store = open_store(launch)
    store.set_timeout(timedelta(seconds=FIND_SECONDS))
    try:
        host, port, secret = store.get(where_key()).decode().split()
        end = socket.create_connection((host, int(port)), timeout=10)
    except (OSError, RuntimeError, dist.DistError) as error:
        raise ValueError(f"rank {launch.rank} cannot reach rank 0: {' '.join(str(error).split())[:200]}") from None
    end.settimeout(None)
    keep_alive(end)
    connection = Connection(end, ToRank)
    end_with(connection)
    return Rank(connection, launch.rank, secret, launch).run()


def main(fd: int, number: int, with_parent: bool) -> int:
    """-> exit code. with_parent: end with the thread that started this, which is its process's first."""
    if with_parent:
        die_with_parent()
    connection = Connection(socket.socket(fileno=fd), ToRank)
    end_with(connection)
    return Rank(connection, number).run()


if __name__ == "__main__":
    code = main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True")
    sys.stdout.flush()
    os._exit(code)  # threads of a broken collective are not waited for
