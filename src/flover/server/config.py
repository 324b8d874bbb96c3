"""`ServerConfig`: what a user may set about the server. Imports nothing heavy: the supervisor reads it too."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flover.server.tool_parsers import FORMATS
from flover.show import show

ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/?#\s]+")


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What a user may set about the server.

    Args:
        host, port: where it listens; port 0 is any free one.
        served_model_names: what clients call the model; none is the name it was loaded by. The first is the answer's.
        api_keys: any of them is let in; none lets everyone in.
        allowed_origins: whose pages may call the server from a browser (CORS); "*" is everyone's, none is its own
            page's only. allowed_methods, allowed_headers: that they may use.
        max_body_bytes: of a request. body_timeout: seconds for it to arrive.
        max_queued_requests, max_queued_tokens: that may wait for a place in the batch; more is a 429.
        queue_timeout: seconds that a request may wait for its first token, request_timeout: for its last; None is for
            ever. A request's own `queue_timeout` and `timeout` can only shorten them.
        drain_timeout: seconds that running requests have after SIGTERM.
        metrics_compat: "vllm" gives the metrics vLLM's prefix.
        log_requests: a line of JSON on stderr at the end of each; log_prompts: with its prompt.
        otlp_traces_endpoint: where a span of each request goes (OTLP over HTTP); none sends nothing anywhere.
        admin_socket: path of the Unix socket of `flover admin`; "" is one by the port in the folder of this user's
            sockets, "none" is none.
        tool_call_parser: how the model writes tool calls; None: as its chat template says.
        max_restarts: failures in a row, of the engine or the front, after which it is not started again.
        engine_iteration_timeout: seconds without a step, with work, after which the engine is ended and started again;
            after a quarter of them the server is not ready.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_names: Sequence[str] = ()
    api_keys: Sequence[str] = field(default=(), repr=False)
    allowed_origins: Sequence[str] = ()
    allowed_methods: Sequence[str] = ("*",)
    allowed_headers: Sequence[str] = ("*",)
    max_body_bytes: int = 8 << 20
    body_timeout: float = 30.0
    max_queued_requests: int = 1024
    max_queued_tokens: int = 1 << 20
    queue_timeout: float | None = None
    request_timeout: float | None = None
    drain_timeout: float = 30.0
    metrics_compat: str = "flover"
    log_requests: bool = False
    log_prompts: bool = False
    otlp_traces_endpoint: str | None = None
    admin_socket: str = ""
    tool_call_parser: str | None = None
    max_restarts: int = 5
    engine_iteration_timeout: float = 60.0

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must be in [0, 65535], got {self.port}")
        for name in ("max_body_bytes", "max_queued_requests", "max_queued_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.tool_call_parser is not None and self.tool_call_parser not in FORMATS:
            raise ValueError(f"tool_call_parser must be one of {', '.join(FORMATS)}, got {self.tool_call_parser!r}")
        if self.metrics_compat not in ("flover", "vllm"):
            raise ValueError(f"metrics_compat must be flover or vllm, got {self.metrics_compat!r}")
        if self.max_restarts < 0:
            raise ValueError(f"max_restarts must be at least 0, got {self.max_restarts}")
        for name in ("drain_timeout", "engine_iteration_timeout"):
            if not 0 <= getattr(self, name) < 1e9:
                raise ValueError(f"{name} must be a number of seconds, got {getattr(self, name)}")
        for name in ("body_timeout", "queue_timeout", "request_timeout"):
            seconds = getattr(self, name)
            if seconds is not None and not 0 < seconds < 1e9:
                raise ValueError(f"{name} must be a number of seconds above 0, got {seconds}")
        endpoint = self.otlp_traces_endpoint
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise ValueError(f"otlp_traces_endpoint must be such as http://host:4318/v1/traces, got {show(endpoint)}")
        for origin in self.allowed_origins:
            if not ORIGIN.fullmatch(origin):
                raise ValueError(f"allowed_origins must be such as https://app.example or *, got {show(origin)}")
        if not all(key.strip() for key in self.api_keys):
            raise ValueError("an API key is empty")
        if not all(name.strip() for name in self.served_model_names):
            raise ValueError("a served model name is empty")


def admin_socket_path(port: int) -> Path:
    """Where a server at a port has its admin socket, unless told otherwise."""
    folder = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    return Path(folder) / f"flover-{os.getuid()}" / f"{port}.sock"
