"""What the front and the engine's process say to each other: msgspec structs in frames on a socket. No pickle.

A frame is its length, four bytes, big-endian, and one msgpack message. The front sends requests and endings; the engine
answers with one message a step for all rows.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeAlias

import msgspec

from flover.config import EngineConfig, ResolvedConfig
from flover.metrics import StepStats
from flover.request import FinishReason, Request, RowSampling, TokenLogprobs

HEADER = struct.Struct(">I")
CHUNK = 1 << 18  # bytes of a read


class Start(msgspec.Struct, array_like=True, tag="start"):
    """The first message to an engine."""

    config: EngineConfig


class NewRequest(msgspec.Struct, array_like=True, tag="new"):
    """The part of a `Request` that the engine needs, by its names; a sibling by its id."""

    request_id: str
    token_ids: list[int]
    sampling: RowSampling
    max_output_tokens: int
    stop_token_ids: frozenset[int]
    eos_token_ids: frozenset[int]
    prompt_logprobs: int
    priority: int
    cache_salt: str
    client: str
    arrival_time: float
    grammar: str
    pooling: str
    sibling: str | None

    @classmethod
    def of(cls, request: Request) -> NewRequest:
        values = {name: getattr(request, name) for name in cls.__struct_fields__}
        sibling = None if request.sibling is None else request.sibling.request_id
        return cls(**{**values, "sibling": sibling})

    def request(self, sibling: Request | None) -> Request:
        """sibling: the request of that id, if it still lives."""
        values = msgspec.structs.asdict(self) | {"sibling": sibling}
        return Request(**values, logprobs=[] if self.sampling.logprobs >= 0 else None)


class Finish(msgspec.Struct, array_like=True, tag="finish"):
    """End a request: abort, or a stop string that the front found."""

    request_id: str
    reason: FinishReason
    stop_reason: int | str | None = None


class ResetCache(msgspec.Struct, array_like=True, tag="reset"):
    """Forget the prefixes that can be found; live requests go on."""


class Watch(msgspec.Struct, array_like=True, tag="watch"):
    """From now on the statistics of a step shall name its rows, or not."""

    on: bool


class Ready(msgspec.Struct, array_like=True, tag="ready"):
    """The engine has started."""

    folder: str
    resolved: ResolvedConfig
    seconds: dict[str, float]  # of the start, by phase
    nbytes: dict[str, int]


class EngineFailed(msgspec.Struct, array_like=True, tag="failed"):
    """It has not started, or cannot go on; why in one line."""

    message: str


class Ended(msgspec.Struct, array_like=True):
    """A request that is over, with all that the front does not know of it."""

    request_id: str
    reason: FinishReason | None
    stop_reason: int | str | None
    error: str | None
    embedding: bytes
    num_cached_tokens: int
    num_preemptions: int
    cumulative_logprob: float
    first_scheduled_time: float
    first_token_time: float
    last_token_time: float
    finish_time: float

    @classmethod
    def of(cls, request: Request) -> Ended:
        return cls(request.request_id, request.finish_reason, *(getattr(request, n) for n in cls.__struct_fields__[2:]))


class Stepped(msgspec.Struct, array_like=True, tag="stepped"):
    """What a step gave. Dicts are by place among `request_ids`.

    first: of those whose first token this is, when they were scheduled, when it came, and their cached prompt tokens.
    logprobs, prompt_logprobs: of those that want them.
    """

    request_ids: list[str]
    token_ids: list[int]
    ended: list[Ended]
    first: dict[int, tuple[float, float, int]]
    logprobs: dict[int, TokenLogprobs]
    prompt_logprobs: dict[int, list[TokenLogprobs | None]]
    stats: StepStats | None
    blocks: tuple[int, int, int]  # of the KV cache, afterwards: free, cached, used


ToEngine: TypeAlias = Start | NewRequest | Finish | ResetCache | Watch
FromEngine: TypeAlias = Ready | EngineFailed | Stepped


# ---- between rank 0 and the other ranks of a group -------------------------------------------------------------------


class Hello(msgspec.Struct, array_like=True, tag="hello"):
    """A rank's first message. secret: what rank 0 has published, of a rank that connects by itself."""

    rank: int
    version: str
    secret: str = ""


class Assignment(msgspec.Struct, array_like=True, tag="setup"):
    """What a rank is to be. store: host and port where ranks meet, none: where it joined; prefix: of its keys."""

    resolved: ResolvedConfig
    prefix: str
    store: tuple[str, int] | None


class Described(msgspec.Struct, array_like=True, tag="described"):
    """What must be the same on all ranks, by name."""

    facts: dict[str, str]


class Go(msgspec.Struct, array_like=True, tag="go"):
    """All ranks are alike: load."""


class Loaded(msgspec.Struct, array_like=True, tag="loaded"):
    """A rank's runner is ready."""


class Plan(msgspec.Struct, array_like=True, tag="plan"):
    """A step: its number, the digest of the rows after it, and a `BatchPlan` as `encode_plan` makes it."""

    sequence: int
    digest: int
    data: bytes


class Masks(msgspec.Struct, array_like=True, tag="masks"):
    """What the rows of the last plan may draw: `RowMasks` as `encode_masks` makes them."""

    data: bytes


class WarmUp(msgspec.Struct, array_like=True, tag="warm"):
    seconds: float


class Stop(msgspec.Struct, array_like=True, tag="stop"):
    """End."""


class Alive(msgspec.Struct, array_like=True, tag="alive"):
    """Said by a rank every half second."""


class Trouble(msgspec.Struct, array_like=True, tag="trouble"):
    """A rank cannot go on."""

    message: str


ToRank: TypeAlias = Assignment | Go | Plan | Masks | WarmUp | Stop
FromRank: TypeAlias = Hello | Described | Loaded | Alive | Trouble

_encoder = msgspec.msgpack.Encoder()


class Connection:
    """One end of a socket. `kinds`: a union of what the other side sends."""

    def __init__(self, end: socket.socket, kinds: Any) -> None:
        self.socket = end
        self._decoder = msgspec.msgpack.Decoder(kinds)
        self._buffer = bytearray()

    @staticmethod
    def frame(message: Any) -> bytes:
        """A message as it travels."""
        data = _encoder.encode(message)
        return HEADER.pack(len(data)) + data

    def send(self, message: Any) -> None:
        """OSError if the other side is gone."""
        self.socket.sendall(self.frame(message))

    def receive(self) -> Iterator[Any]:
        """Wait for bytes once; the messages that they complete.

        Raises:
            EOFError: the other side has closed, or is gone.
        """
        try:
            data = self.socket.recv(CHUNK)
        except ConnectionError:
            data = b""
        if not data:
            raise EOFError
        self._buffer += data
        while len(self._buffer) >= HEADER.size:
            end = HEADER.size + HEADER.unpack_from(self._buffer)[0]
            if len(self._buffer) < end:
                return
            message = self._decoder.decode(memoryview(self._buffer)[HEADER.size : end])
            del self._buffer[:end]
            yield message

    def close(self) -> None:
        self.socket.close()


class Outbox:
    """Sends on a connection without ever waiting: what the socket does not take at once goes by a thread.

    The other side may have stopped reading for good, and who sends is an event loop. The bytes that wait are bounded by
    what a server admits.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._rest: SimpleQueue[bytes | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._num_waiting = 0
        self._thread: threading.Thread | None = None

    def send(self, message: Any) -> None:
        """In order. OSError if the other side is known to be gone."""
        data = Connection.frame(message)
        with self._lock:
            if not self._num_waiting:
                with suppress(BlockingIOError):
                    data = data[self._connection.socket.send(data, socket.MSG_DONTWAIT) :]
                if not data:
                    return
            self._num_waiting += 1
        self._rest.put(data)
        if self._thread is None:
            self._thread = threading.Thread(target=self._drain, daemon=True, name="flover-outbox")
            self._thread.start()

    def close(self) -> None:
        self._rest.put(None)

    def _drain(self) -> None:
        with suppress(OSError):  # it is gone, which the reader will say
            while (data := self._rest.get()) is not None:
                self._send_all(data)
                with self._lock:
                    self._num_waiting -= 1

    def _send_all(self, data: bytes) -> None:
        """As `sendall`, also where a loop has made the socket non-blocking behind Python's back, as uvloop does."""
        end, rest = self._connection.socket, memoryview(data)
        room = select.poll()
        room.register(end, select.POLLOUT)
        while rest:
            room.poll()
            with suppress(BlockingIOError):
                rest = rest[end.send(rest) :]
