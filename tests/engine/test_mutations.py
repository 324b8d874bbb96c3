"""The traces must be able to fail: each of these faults, put into the engine, is caught by EchoModel's tokens.

They are the traps of the paper's own release (K and V in one buffer, a window that disagrees with the rows, copying a
fraction of a row) and the classic ones of paged caches.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import echo_core, prefix_equal, random_jobs, run

import flover.layers.attention
from flover.engine.engine import EngineCore
from flover.engine.runner import ModelRunner
from flover.kernels.reference.attention import gather_history
from flover.kv.paged import PagedLayout
from flover.kv.slab import SlabLayout
from flover.kv.storage import KVStorage

Patch = Callable[[pytest.MonkeyPatch], None]
SLAB = {"kv_layout": "slab", "reorder": "move"}
PAGED = {"kv_layout": "paged", "block_size": 4, "num_kv_blocks": 80}


def alias_k_and_v(monkeypatch: pytest.MonkeyPatch) -> None:
    original = KVStorage.__init__

    def aliased(self: KVStorage, *args: Any) -> None:
        original(self, *args)
        self.v = self.k

    monkeypatch.setattr(KVStorage, "__init__", aliased)


def wrong_row_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(cache: Any, meta: Any, row: int, start: int = 0) -> Any:
        return gather_history(
            cache, meta, row - 1 if row and meta.seq_lens[row - 1] == meta.seq_lens[row] else row, start
        )

    monkeypatch.setattr(flover.layers.attention, "gather_history", shifted)


def stale_row_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that moves keeps the table of the row whose place it takes."""
    original = ModelRunner._apply

    def stale(self: ModelRunner, plan: Any) -> None:
        before = self.tables.copy()
        original(self, plan)
        for _, dst in plan.relocations:
            self.tables[dst] = before[dst]

    monkeypatch.setattr(ModelRunner, "_apply", stale)


def skipped_move(monkeypatch: pytest.MonkeyPatch) -> None:
    original = KVStorage.apply
    monkeypatch.setattr(
        KVStorage, "apply", lambda self, moves, freed, reserved: original(self, moves[1:], freed, reserved)
    )


def short_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """The length confirmed so far instead of the optimistic one: the token in flight is left behind."""
    original = KVStorage.apply

    def short(self: KVStorage, moves: Any, freed: Any, reserved: int) -> None:
        original(self, [(src, dst, n - 1) for src, dst, n in moves], freed, reserved)

    monkeypatch.setattr(KVStorage, "apply", short)


def slot_freed_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """The window gives a live slot to the next join."""
    original = SlabLayout._take

    def early(self: SlabLayout) -> int | None:
        slot = original(self)
        live = [s for s in self._slot_of.values() if s != slot]
        return live[0] if slot is not None and len(live) > 2 else slot

    monkeypatch.setattr(SlabLayout, "_take", early)


def block_freed_early(monkeypatch: pytest.MonkeyPatch) -> None:
    original = PagedLayout.extend

    def early(self: PagedLayout, key: str, num_tokens: int) -> Any:
        grant = original(self, key, num_tokens)
        held = self._requests[key]
        if len(held.blocks) == 3:
            self._free.append(held.blocks[1])
        return grant

    monkeypatch.setattr(PagedLayout, "extend", early)


FAULTS: list[tuple[Patch, dict[str, Any]]] = [
    (alias_k_and_v, SLAB),
    (alias_k_and_v, PAGED),
    (wrong_row_start, SLAB),
    (stale_row_start, SLAB),
    (stale_row_start, PAGED),
    (skipped_move, SLAB),
    (short_move, SLAB),
    (slot_freed_early, SLAB),
    (block_freed_early, PAGED),
]


def compare(echo: Path, expected: Any, jobs: Any, options: dict[str, Any]) -> None:
    core: EngineCore = echo_core(echo, max_num_seqs=9, **options)
    core.scheduler.kv.check = lambda: None  # type: ignore[method-assign]  # the tokens alone must tell
    try:
        prefix_equal(expected, run(core, jobs), jobs)
    finally:
        core.shutdown()


@pytest.mark.parametrize(("fault", "options"), FAULTS, ids=lambda p: p.__name__ if callable(p) else p["kv_layout"])
def test_fault_is_caught(echo: Path, monkeypatch: pytest.MonkeyPatch, fault: Patch, options: dict[str, Any]) -> None:
    jobs = random_jobs(random.Random(1), 30, aborts=False)
    expected = run(echo_core(echo, policy="serial", overlap_depth=0, enable_prefix_caching=False), jobs)
    compare(echo, expected, jobs, options)
    fault(monkeypatch)
    with pytest.raises((AssertionError, KeyError, IndexError)):
        compare(echo, expected, jobs, options)
