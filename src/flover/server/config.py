"""`ServerConfig`: what a user may set about the server. Imports nothing heavy: the supervisor reads it too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What a user may set about the server.

    Args:
        host, port: where it listens; port 0 is any free one.
        served_model_names: what clients call the model; none is the name it was loaded by. The first is the answer's.
        api_keys: any of them is let in; none lets everyone in.
        max_body_bytes: of a request. body_timeout: seconds for it to arrive.
        max_queued_requests, max_queued_tokens: that may wait for a place in the batch; more is a 429.
        drain_timeout: seconds that running requests have after SIGTERM.
        max_restarts: failures in a row, of the engine or the front, after which it is not started again.
        engine_iteration_timeout: seconds without a step, with work, after which the engine is ended and started again;
            after a quarter of them the server is not ready.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_names: Sequence[str] = ()
    api_keys: Sequence[str] = field(default=(), repr=False)
    max_body_bytes: int = 8 << 20
    body_timeout: float = 30.0
    max_queued_requests: int = 1024
    max_queued_tokens: int = 1 << 20
    drain_timeout: float = 30.0
    max_restarts: int = 5
    engine_iteration_timeout: float = 60.0

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must be in [0, 65535], got {self.port}")
        for name in ("max_body_bytes", "max_queued_requests", "max_queued_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_restarts < 0:
            raise ValueError(f"max_restarts must be at least 0, got {self.max_restarts}")
        for name in ("body_timeout", "drain_timeout", "engine_iteration_timeout"):
            if not 0 <= getattr(self, name) < 1e9:
                raise ValueError(f"{name} must be a number of seconds, got {getattr(self, name)}")
        if not all(key.strip() for key in self.api_keys):
            raise ValueError("an API key is empty")
        if not all(name.strip() for name in self.served_model_names):
            raise ValueError("a served model name is empty")
