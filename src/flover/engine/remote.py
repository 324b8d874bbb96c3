"""`RemoteCore`: an `EngineCore` in another process, as `LLMEngine` sees one. Imports no torch.

The front keeps a `Request` of its own for each that the engine has, and brings it up to date by what the engine
reports. One that the front has ended (a stop string, an abort) takes no more tokens, though some may be on their way.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from flover.config import EngineConfig, ResolvedConfig
from flover.engine.admission import check_size
from flover.engine.step import StepOutput
from flover.engine.wire import (
    Connection,
    Ended,
    EngineFailed,
    Finish,
    FromEngine,
    NewRequest,
    Outbox,
    Ready,
    ResetCache,
    Start,
    Stepped,
    Watch,
)
from flover.lifeline import ending
from flover.request import FinishReason, Request, RequestStatus
from flover.startup import StartupTimes


class EngineDeadError(RuntimeError):
    """The engine's process has ended; nothing more will come."""


# Environment that bounds what a CPU engine keeps for step shapes that may never come again. torch (LRU_CACHE_CAPACITY)
# and oneDNN keep 1,024 compiled products each, with buffers of their own: hundreds of MB, after some time of ever new
# shapes. oneDNN keeps those of a step or two, a few MB: without them a batch of steady shape takes twice the CPU time.
# And glibc, once a large block has been freed, takes others of its size from a heap that they fragment.
MEMORY_SETTINGS = {
    "LRU_CACHE_CAPACITY": "8",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
    "MALLOC_MMAP_THRESHOLD_": "131072",
}


class RemoteCore:
    """Starts the process; `wait_until_ready` before anything else.

    Make it on the main thread: on Linux the process dies with the thread that started it.
    """

    folder: Path
    resolved: ResolvedConfig
    startup_times: StartupTimes

    def __init__(self, config: EngineConfig) -> None:
        mine, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "flover.engine.process", str(theirs.fileno()), str(os.getpid())]
            self._process = subprocess.Popen(
                command,
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env={**MEMORY_SETTINGS, **os.environ},
                start_new_session=True,  # a terminal's Ctrl-C is the front's business, also while the engine starts
            )
        self._connection = Connection(mine, FromEngine)
        self._outbox = Outbox(self._connection)
        self._messages: deque[Any] = deque()
        self._requests: dict[str, Request] = {}  # until the engine has reported their end
        self.blocks = (0, 0, 0)  # of the KV cache: free, cached, used
        self.clock = time.monotonic
        self._send(Start(config))

    def wait_until_ready(self) -> None:
        """Raises:
        ValueError: what `EngineCore` raises. EngineDeadError: the process ended instead.
        """
        ready = self._next()
        if isinstance(ready, EngineFailed):
            self.shutdown()
            raise ValueError(ready.message)
        assert isinstance(ready, Ready)
        self.folder, self.resolved = Path(ready.folder), ready.resolved
        self.blocks = (self.resolved.kv.num_blocks, 0, 0)
        self.startup_times = StartupTimes()
        self.startup_times.seconds, self.startup_times.nbytes = ready.seconds, ready.nbytes

    # ---- as EngineCore -----------------------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """ValueError if a request could never be served: too long for the context or for the cache."""
        check_size(request, self.resolved.scheduler, self.resolved.kv)

    def add(self, request: Request) -> None:
        """Queue a request; ValueError if its id is live or it could never be served."""
        if request.request_id in self._requests:
            raise ValueError(f"request_id {request.request_id!r} is already running")
        self.check(request)
        request.arrival_time = request.arrival_time or self.clock()
        self._requests[request.request_id] = request
        self._send(NewRequest.of(request))

    def finish(self, request_id: str, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End a live request (abort, stop string); unknown or finished ids are ignored."""
        request = self._requests.get(request_id)
        if request is None or request.finished:
            return
        request.status, request.finish_reason, request.stop_reason = RequestStatus.FINISHED, reason, stop_reason
        request.finish_time = request.last_token_time = self.clock()
        self._send(Finish(request_id, reason, stop_reason))

    def reset_cache(self) -> None:
        """Forget the prefixes that can be found; live requests go on."""
        self._send(ResetCache())

    def has_unfinished(self) -> bool:
        return bool(self._requests)

    def step(self) -> StepOutput:
        """What the engine's next step gave; waits for it.

        Raises:
            EngineDeadError: the process has ended, or says why it does.
        """
        message = self._next()
        if isinstance(message, EngineFailed):
            raise EngineDeadError(message.message)
        return self._take_in(message)

    def watch(self, on: bool) -> None:
        """Whether the statistics of steps shall name their rows, as under record_timeline."""
        self._send(Watch(on))

    def shutdown(self) -> None:
        """End the process; what is in flight is dropped."""
        self._outbox.close()
        with suppress(OSError):
            self._connection.socket.shutdown(socket.SHUT_RDWR)  # a thread may be sending
        self._connection.close()
        self._end(timeout=5)

    def dump_stacks(self) -> None:
        """The process writes to stderr what each of its threads does, also if it was stopped."""
        self._process.send_signal(signal.SIGUSR1)
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """At once; `receive` will say that it is dead."""
        self._process.kill()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stopped(self) -> bool:
        """Whether a signal has stopped the process (SIGSTOP); known on Linux only."""
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return False
        return state == "T"

    def _end(self, timeout: float) -> int:
        """-> exit code, by force once the time is over."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    # ---- the connection ----------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """Readable when `receive` would not wait."""
        return self._connection.socket.fileno()

    def receive(self) -> None:
        """Wait for bytes once and read what has come.

        Raises:
            EngineDeadError: the process has ended.
        """
        try:
            self._messages += self._connection.receive()
        except EOFError:
            raise EngineDeadError(f"the engine's process has ended, {ending(self._end(timeout=0.5))}") from None

    @property
    def pending(self) -> bool:
        """Whether `step` would return at once."""
        return bool(self._messages)

    def _next(self) -> Any:
        while not self._messages:
            self.receive()
        return self._messages.popleft()

    def _send(self, message: Any) -> None:
        with suppress(OSError):  # it is gone, which `receive` will say
            self._outbox.send(message)

    def _take_in(self, message: Stepped) -> StepOutput:
        output, self.blocks = StepOutput(stats=message.stats), message.blocks
        for i, (request_id, token) in enumerate(zip(message.request_ids, message.token_ids)):
            request = self._requests[request_id]
            if request.finished:
                continue
            request.token_ids.append(token)
            if i in message.first:
                request.first_scheduled_time, request.first_token_time, request.num_cached_tokens = message.first[i]
            if i in message.logprobs and request.logprobs is not None:
                entry = message.logprobs[i]
                request.logprobs.append(entry)
                request.cumulative_logprob += entry[token].logprob
            if i in message.prompt_logprobs:
                request.prompt_logprob_list = message.prompt_logprobs[i]
            output.requests.append(request)
            output.token_ids.append(token)
        output.finished = [self._take_end(ended) for ended in message.ended]
        return output

    def _take_end(self, ended: Ended) -> Request:
        request = self._requests.pop(ended.request_id)
        if not request.finished:  # else the front has said why
            request.status = RequestStatus.FINISHED
            request.finish_reason, request.stop_reason = ended.reason, ended.stop_reason
        for name in Ended.__struct_fields__[3:]:
            setattr(request, name, getattr(ended, name))
        return request
