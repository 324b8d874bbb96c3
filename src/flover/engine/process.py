"""The engine in a process of its own: `python -m flover.engine.process FD PARENT`, started by `engine.remote`.

It reads requests on a thread, so that the front is never kept waiting by a step, steps while there is work, and ends
with its parent: when the socket closes, and on Linux also when the parent dies (`lifeline`).
"""

from __future__ import annotations

import socket
import sys
import threading
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from flover.engine.engine import EngineCore
from flover.engine.step import StepOutput
from flover.engine.wire import (
    Connection,
    Ended,
    EngineFailed,
    Finish,
    NewRequest,
    Ready,
    ResetCache,
    Start,
    Stepped,
    ToEngine,
    Watch,
)
from flover.lifeline import end_soon, end_with_parent
from flover.request import FinishReason
from flover.startup import settle

LOST = object()  # in the inbox: a rank of the group is gone


class EngineProcess:
    """A core, driven by messages. `inbox`: what was received; None ends it."""

    def __init__(self, core: EngineCore, connection: Connection, inbox: SimpleQueue[Any]) -> None:
        self._core, self._connection, self._inbox = core, connection, inbox

    def run(self) -> int:
        """Until the front goes, or a rank of the group is lost; -> exit code."""
        core = self._core
        core.when_lost(lambda: self._inbox.put(LOST))
        while True:
            while not self._inbox.empty() or not core.has_unfinished():
                message = self._inbox.get()
                if message is None:
                    return 0
                if message is not LOST:
                    self._take(message)
                elif not core.has_unfinished():  # else the next step learns why
                    return 1
            output = core.step()
            if core.dead is not None:  # so is this engine, for every request
                self._connection.send(EngineFailed(str(core.dead)))
                return 1
            self._report(output)

    def _report(self, output: StepOutput) -> None:
        kv = self._core.scheduler.kv
        self._connection.send(_stepped(output, (kv.num_free_blocks, kv.num_cached_blocks, kv.num_used_blocks)))

    def _take(self, message: NewRequest | Finish | ResetCache | Watch) -> None:
        if isinstance(message, ResetCache):
            self._core.scheduler.kv.reset_cache()
            self._report(StepOutput())
        elif isinstance(message, Watch):
            self._core.scheduler.record_rows = message.on
        elif isinstance(message, Finish):
            self._core.finish(message.request_id, message.reason, message.stop_reason)
        else:
            sibling = self._core.scheduler.requests.get(message.sibling) if message.sibling else None
            request = message.request(sibling)
            try:
                self._core.add(request)
            except ValueError as error:  # the front has checked; were it wrong, one request must not end the others
                request.finish_reason, request.error = FinishReason.ERROR, str(error)
                self._report(StepOutput(finished=[request]))


def _stepped(output: StepOutput, blocks: tuple[int, int, int]) -> Stepped:
    first, logprobs, prompt_logprobs = {}, {}, {}
    for i, request in enumerate(output.requests):
        if request.logprobs:
            logprobs[i] = request.logprobs[-1]
        if request.num_output_tokens == 1:
            first[i] = request.first_scheduled_time, request.first_token_time, request.num_cached_tokens
            if request.prompt_logprob_list:
                prompt_logprobs[i] = request.prompt_logprob_list
    return Stepped(
        [request.request_id for request in output.requests],
        output.token_ids,
        [Ended.of(request) for request in output.finished],
        first,
        logprobs,
        prompt_logprobs,
        output.stats,
        blocks,
    )


def _read(connection: Connection, inbox: SimpleQueue[Any]) -> None:
    try:
        while True:
            for message in connection.receive():
                inbox.put(message)
    except EOFError:
        end_soon()
        inbox.put(None)


def main(fd: int, parent: int) -> int:
    """-> exit code."""
    end_with_parent(parent)
    connection = Connection(socket.socket(fileno=fd), ToEngine)
    inbox: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_read, args=(connection, inbox), daemon=True, name="flover-inbox").start()
    first = inbox.get()
    if not isinstance(first, Start):
        return 1
    try:
        core = EngineCore(first.config)
    except ValueError as error:
        connection.send(EngineFailed(str(error)))
        return 1
    times = core.startup_times
    settle()
    connection.send(Ready(str(core.folder), core.resolved, times.seconds, times.nbytes))
    code = 0
    with suppress(OSError):  # the front is gone
        code = EngineProcess(core, connection, inbox).run()
    core.shutdown()
    return code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
