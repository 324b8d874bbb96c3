"""Faults inside a step: NaN in one row, an exception on the device. The smallest scope ends, neighbours go on."""

from __future__ import annotations

import mmap
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import Job, as_request, echo_core, prefix_equal, random_jobs, run

from flover.engine.engine import EngineCore
from flover.kv.storage import KVStorage
from flover.models.echo import EchoModel
from flover.request import FinishReason

LAYOUTS: list[dict[str, Any]] = [{}, {"kv_layout": "slab"}, {"kv_layout": "slab", "reorder": "off"}]


@pytest.mark.parametrize("options", LAYOUTS)
def test_nan_ends_its_row_only(echo: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    jobs = [Job([i, i + 1, i + 2], 12) for i in range(5)]
    expected = run(echo_core(echo), jobs)
    original = EchoModel.compute_logits
    bad: set[int] = set()

    def poisoned(self: EchoModel, hidden: torch.Tensor) -> torch.Tensor:
        logits = original(self, hidden)
        logits[[int(h) in bad for h in hidden[:, 0]]] = float("nan")
        return logits

    seen: list[int] = []

    def watching(self: EchoModel, hidden: torch.Tensor) -> torch.Tensor:
        seen.extend(hidden[:, 0].tolist())
        return original(self, hidden)

    monkeypatch.setattr(EchoModel, "compute_logits", watching)
    alone = echo_core(echo)
    run(alone, [jobs[2]])
    bad.add(seen[6])
    monkeypatch.setattr(EchoModel, "compute_logits", poisoned)
    core = echo_core(echo, **options)
    requests = [as_request(i, job) for i, job in enumerate(jobs)]
    for request in requests:
        core.add(request)
    while core.has_unfinished():
        core.step()
        core.scheduler.kv.check()
    assert requests[2].finish_reason is FinishReason.ERROR
    assert "finite" in (requests[2].error or "")
    for i, request in enumerate(requests):
        if i != 2:
            assert request.output_token_ids == expected.tokens[i]
    assert requests[2].output_token_ids == expected.tokens[2][:6]
    assert core.scheduler.kv.num_used_blocks == 0


def break_step(core: EngineCore, number: int) -> None:
    runner = core._executor._runner  # type: ignore[attr-defined]
    execute = runner.execute

    def failing(plan: Any) -> Any:
        if plan.step == number:
            raise RuntimeError("device on fire")
        return execute(plan)

    runner.execute = failing


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("options", LAYOUTS)
def test_failed_step_ends_its_requests_and_no_others(echo: Path, depth: int, options: dict[str, Any]) -> None:
    jobs = [Job([i, i + 1, i + 2], 10 + i) for i in range(6)]
    expected = run(echo_core(echo), jobs)
    core = echo_core(echo, max_num_seqs=4, overlap_depth=depth, **options)
    break_step(core, 5)
    requests = [as_request(i, job) for i, job in enumerate(jobs)]
    for request in requests:
        core.add(request)
    while core.has_unfinished():
        core.step()
    failed = [r for r in requests if r.finish_reason is FinishReason.ERROR]
    assert len(failed) == 4
    assert all("device on fire" in (r.error or "") for r in failed)
    for i, request in enumerate(requests):
        tokens = request.output_token_ids
        assert tokens == expected.tokens[i][: len(tokens)]
        if request not in failed:
            assert tokens == expected.tokens[i]
    core.scheduler.kv.check()
    assert core.scheduler.kv.num_used_blocks == 0


def test_failure_under_load_keeps_the_rest(echo: Path) -> None:
    jobs = random_jobs(random.Random(3), 20, aborts=False)
    expected = run(echo_core(echo), jobs)
    core = echo_core(echo, max_num_seqs=4, max_num_batched_tokens=16)
    for step in (7, 19, 31):
        break_step(core, step)
    actual = run(core, jobs)
    errors = [i for i, reason in actual.reasons.items() if reason == "error"]
    assert errors
    for i in range(len(jobs)):
        tokens = actual.tokens[i]
        assert tokens == expected.tokens[i][: len(tokens)]
        assert i in errors or tokens == expected.tokens[i]
    prefix_equal(expected, run(core, jobs), jobs)  # and the engine goes on as new


def resident_bytes(storage: KVStorage) -> int:
    """Of the pages that are present or swapped out (bits 63 and 62 of Linux' pagemap)."""
    count = 0
    with open("/proc/self/pagemap", "rb") as pagemap:
        for cache in storage.k + storage.v:
            first, last = cache.data_ptr() // mmap.PAGESIZE, -(-(cache.data_ptr() + cache.nbytes) // mmap.PAGESIZE)
            pagemap.seek(first * 8)
            entries = np.frombuffer(pagemap.read((last - first) * 8), dtype=np.uint64)
            count += int(np.count_nonzero(entries >> np.uint64(62)))
    return count * mmap.PAGESIZE


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="only Linux says which pages are there")
def test_released_tail_goes_back_to_the_system(echo: Path) -> None:
    """Slots are reserved as they are needed, given back when few are left, and taken again."""
    storage = KVStorage(2, 64, 64, 4, 64, torch.float32, torch.device("cpu"))
    empty = resident_bytes(storage)
    for cache in storage.k + storage.v:
        cache.fill_(1.0)
    full = resident_bytes(storage)
    assert full - empty > 0.9 * 4 * 64 * 64 * 4 * 64 * 4
    address = storage.k[0].data_ptr()
    storage.apply([], [], 16)
    assert resident_bytes(storage) < 0.3 * full
    assert torch.equal(storage.k[1][: 16 * 64], torch.ones(16 * 64, 4, 64))
    storage.apply([], [], 64)
    storage.k[0][20 * 64] = 2.0
    assert storage.k[0].data_ptr() == address
    assert storage.k[0][20 * 64, 0, 0] == 2.0


def test_slots_are_used_again_without_end(echo: Path) -> None:
    """More requests than slots, capacity released and taken again meanwhile: a trap of the paper's release."""
    jobs = [Job([i % 97, 1], 20 + i % 7, arrival_step=(i // 40) * 60 + i % 40) for i in range(120)]
    core = echo_core(echo, kv_layout="slab", max_num_seqs=16, record_timeline=True)
    reserved, moved = [], []
    step = core.step

    def watch() -> Any:
        output = step()
        if output.stats is not None:
            reserved.append(output.stats.kv_reserved_bytes)
            moved.append(output.stats.kv_moved_bytes)
        return output

    core.step = watch  # type: ignore[method-assign]
    actual = run(core, jobs)
    prefix_equal(run(echo_core(echo, policy="serial"), jobs), actual, jobs)
    assert max(reserved) > 2 * min(reserved)
    assert any(moved)


@pytest.mark.parametrize("depth", [0, 1])
def test_out_of_memory_is_tried_again_in_smaller_steps(echo: Path, depth: int) -> None:
    """Nobody loses a token, and the steps are as small as it takes; what no step can serve ends with the error."""
    jobs = [Job(list(range(i, i + 80)), 6) for i in range(8)]
    expected = run(echo_core(echo), jobs)
    core = echo_core(echo, overlap_depth=depth, max_num_batched_tokens=1000, max_num_seqs=8, num_kv_blocks=200)
    runner: Any = core._executor._runner  # type: ignore[attr-defined]
    execute, limit = runner.execute, 75
    sizes: list[int] = []

    def limited(plan: Any) -> Any:
        sizes.append(int(plan.scheduled().sum()))
        if sizes[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return execute(plan)

    runner.execute = limited
    actual = run(core, jobs)
    assert actual.tokens == expected.tokens
    assert set(actual.reasons.values()) == {"length"}
    assert len([size for size in sizes if size > limit]) == 4  # 640, 320, 160, 80
    limit = 0
    failed = run(core, jobs[:1])
    assert set(failed.reasons.values()) == {"error"}
    core.scheduler.kv.check()
