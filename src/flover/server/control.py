"""What the supervisor and the front say to each other, in frames of `engine.wire`. API keys go this way, not argv."""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

from flover.server.config import ServerConfig


class Setup(msgspec.Struct, array_like=True, tag="setup"):
    """The first message to a front. verbose: there is a terminal to tell of the start."""

    config: ServerConfig
    engine: dict[str, Any]
    verbose: bool


class Drain(msgspec.Struct, array_like=True, tag="drain"):
    """Take nothing in any more, let what lives finish, end."""


class Abort(msgspec.Struct, array_like=True, tag="abort"):
    """End what lives, then yourself."""


class Serving(msgspec.Struct, array_like=True, tag="serving"):
    """The front takes requests in."""

    model: str


class Failed(msgspec.Struct, array_like=True, tag="failed"):
    """It could not start, or gave up starting the engine again: why, in one line. `final`: do not try again."""

    message: str
    final: bool


class Leaving(msgspec.Struct, array_like=True, tag="leaving"):
    """It drains, told by an administrator: its end is wanted."""


ToFront: TypeAlias = Setup | Drain | Abort
FromFront: TypeAlias = Serving | Failed | Leaving
