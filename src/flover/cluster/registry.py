"""Which replicas there are: a small detached Ray actor that replicas tell and ingresses ask, off every request's path.

It holds nothing that the next beats would not bring back, so Ray may start it anew at any time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

STALE = 4.0  # seconds without a beat after which a replica is taken for lost
NAMESPACE = "flover"


class Entry(NamedTuple):
    """A replica: where it listens, the last it said of its load."""

    url: str
    load: Mapping[str, float]
    seen: float  # on the registry's clock


class Registry:
    """See the module."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._left: set[str] = set()

    def beat(self, replica_id: str, url: str, load: Mapping[str, float]) -> None:
        if replica_id not in self._left:
            self._entries[replica_id] = Entry(url, load, time.monotonic())

    def leave(self, replica_id: str) -> None:
        """It takes no more requests. A late beat does not bring it back."""
        self._left.add(replica_id)
        self._entries.pop(replica_id, None)

    def replicas(self) -> dict[str, tuple[str, Mapping[str, float]]]:
        """Those that were heard of lately: id -> url, load."""
        now = time.monotonic()
        self._entries = {k: entry for k, entry in self._entries.items() if now - entry.seen < STALE}
        return {k: (entry.url, entry.load) for k, entry in self._entries.items()}


def registry(app: str) -> Any:
    """The handle of an application's registry; ValueError if there is none."""
    import ray

    try:
        return ray.get_actor(f"registry-{app}", NAMESPACE)
    except ValueError:
        raise ValueError(f"there is no application {app!r} on this cluster: `flover cluster up` starts one") from None


def make_registry(app: str) -> None:
    """Make it if there is none. Not for a replica: what that makes would go with its placement group."""
    import ray

    ray.remote(Registry).options(
        name=f"registry-{app}",
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=-1,
    ).remote()
