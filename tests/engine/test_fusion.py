"""Statement (a): EchoModel's tokens are equal however requests are fused. And: everyone makes progress."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from harness import Job, Outcome, as_request, echo_core, prefix_equal, random_jobs, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flover.kv.paged import PagedLayout
from flover.request import FinishReason

SERIAL: dict[str, Any] = {"policy": "serial", "overlap_depth": 0, "enable_prefix_caching": False}

LAYOUTS: list[dict[str, Any]] = [
    {"kv_layout": "paged", "block_size": 16},
    {"kv_layout": "paged", "block_size": 4, "num_kv_blocks": 60},
    {"kv_layout": "paged", "block_size": 8, "num_kv_blocks": 14},  # preempts often
    {"kv_layout": "paged", "block_size": 1, "num_kv_blocks": 130, "enable_prefix_caching": False},
    {"kv_layout": "slab", "reorder": "move"},
    {"kv_layout": "slab", "reorder": "indirect"},
    {"kv_layout": "slab", "reorder": "off"},
]

options = st.fixed_dictionaries(
    {
        "layout": st.sampled_from(LAYOUTS),
        "overlap_depth": st.sampled_from([0, 1]),
        "policy": st.sampled_from(["fused", "fused", "fused", "static", "serial"]),
        "order": st.sampled_from(["fcfs", "priority", "shortest"]),
        "prefill_mode": st.sampled_from(["mixed", "separate", "overlap"]),
        "max_num_batched_tokens": st.sampled_from([1, 7, 32, 2048]),
        "max_num_seqs": st.sampled_from([2, 5, 9]),
    }
)


def check_traces(echo: Path, seed: int, choices: list[dict[str, Any]], count: int = 12) -> None:
    jobs = random_jobs(random.Random(seed), count)
    serial = echo_core(echo, **SERIAL)
    expected = run(serial, jobs)
    serial.shutdown()
    for choice in choices:
        core = echo_core(echo, **choice.pop("layout"), **choice)
        prefix_equal(expected, run(core, jobs), jobs)
        core.shutdown()


@settings(max_examples=24, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), choices=st.lists(options, min_size=5, max_size=5))
def test_tokens_do_not_depend_on_fusion(echo: Path, seed: int, choices: list[dict[str, Any]]) -> None:
    check_traces(echo, seed, choices)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # thousands of traces
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), choices=st.lists(options, min_size=5, max_size=5))
def test_tokens_do_not_depend_on_fusion_at_length(echo: Path, seed: int, choices: list[dict[str, Any]]) -> None:
    check_traces(echo, seed, choices, count=24)


@pytest.mark.parametrize("depth", [0, 1])
def test_everyone_finishes_in_a_cache_for_two(echo: Path, depth: int) -> None:
    """16 requests, room for about two: same tokens, preemption happens, and it does not thrash."""
    rng = random.Random(5)
    jobs = [Job([rng.randrange(97) for _ in range(10)], 40) for _ in range(16)]
    core = echo_core(echo, num_kv_blocks=14, block_size=8, overlap_depth=depth, max_num_seqs=16)
    fused = run(core, jobs)
    serial = run(echo_core(echo, **SERIAL), jobs)
    prefix_equal(serial, fused, jobs)
    assert fused.preemptions > 0
    assert fused.preemptions < 3 * len(jobs), "thrash"
    assert fused.steps < serial.steps


def test_oldest_is_never_preempted(echo: Path) -> None:
    core = echo_core(echo, num_kv_blocks=12, block_size=8, max_num_seqs=8)
    requests = [as_request(i, Job([i] * 9, 80)) for i in range(8)]
    for request in requests:
        core.add(request)
    while core.has_unfinished():
        core.step()
        running = [r for r in requests if not r.finished]
        if running:
            assert min(running, key=lambda r: r.arrival).num_preemptions == 0 or running[0] is not requests[0]
    assert requests[0].num_preemptions == 0
    assert sum(r.num_preemptions for r in requests) > 0


@pytest.mark.parametrize("layout", ["paged", "slab"])
def test_all_that_fit_join_in_the_same_step(echo: Path, layout: str) -> None:
    core = echo_core(echo, kv_layout=layout, max_num_seqs=64, record_timeline=True)
    for i in range(40):
        core.add(as_request(i, Job([i, i + 1], 5)))
    stats = core.step().stats
    assert stats is not None
    assert len(stats.joins) == 40


def test_policies_differ_in_who_shares_the_batch(echo: Path) -> None:
    jobs = [Job([i] * 4, 4 + 6 * (i % 3)) for i in range(9)]
    outcome: dict[str, Outcome] = {}
    for policy in ("fused", "static", "serial"):
        core = echo_core(echo, policy=policy, max_num_seqs=3, overlap_depth=0)
        outcome[policy] = run(core, jobs)
    assert outcome["fused"].steps < outcome["static"].steps < outcome["serial"].steps


def test_order_decides_who_is_admitted_first(echo: Path) -> None:
    def first_done(order: str) -> list[int]:
        core = echo_core(echo, order=order, max_num_seqs=1)
        jobs = [Job([1] * 30, 20), Job([2] * 3, 2), Job([3] * 10, 10)]
        for i, job in enumerate(jobs):
            request = as_request(i, job)
            request.priority = -i
            core.add(request)
        done: list[int] = []
        while core.has_unfinished():
            done += [int(r.request_id[1:]) for r in core.step().finished]
        return done

    assert first_done("fcfs") == [0, 1, 2]
    assert first_done("shortest") == [1, 2, 0]
    assert first_done("priority") == [2, 1, 0]


def test_prefix_reuse_is_reported_and_salted(echo: Path) -> None:
    core = echo_core(echo)
    prompt = list(range(50))

    def cached(salt: str) -> int:
        request = as_request(0, Job(prompt, 3))
        request.cache_salt = salt
        core.add(request)
        while core.has_unfinished():
            core.step()
        return request.num_cached_tokens

    assert cached("") == 0
    assert cached("") == 48
    assert cached("other") == 0
    assert cached("other") == 48


def choices_of(core: Any, prompt: list[int], n: int, max_tokens: int) -> list[list[int]]:
    requests = [as_request(i, Job(prompt, max_tokens, temperature=0.2, seed=i)) for i in range(n)]
    for request in requests[1:]:
        request.sibling = requests[0]
    for request in requests:
        core.add(request)
    while core.has_unfinished():
        core.step()
        core.scheduler.kv.check()
    return [request.output_token_ids for request in requests]


@pytest.mark.parametrize("length", [1, 3, 8, 9, 30])
@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 4}, {"kv_layout": "slab"}, {"num_kv_blocks": 14}])
def test_choices_share_the_prompt_and_not_more(echo: Path, length: int, options: dict[str, Any]) -> None:
    prompt = list(range(length))
    alone = choices_of(echo_core(echo, policy="serial", enable_prefix_caching=False), prompt, 5, 9)
    core = echo_core(echo, **{"block_size": 8, **options})
    assert choices_of(core, prompt, 5, 9) == alone


def test_a_choice_that_writes_a_shared_block_is_caught(echo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy-on-write left out: the choices would see garbage where their copy should be."""
    fork = PagedLayout.fork
    prompt = list(range(13))
    alone = choices_of(echo_core(echo, policy="serial", enable_prefix_caching=False), prompt, 5, 9)

    def uncopied(self: PagedLayout, src: str, key: str, num_tokens: int) -> Any:
        grant = fork(self, src, key, num_tokens)
        return grant and grant._replace(copies=[])

    monkeypatch.setattr(PagedLayout, "fork", uncopied)
    assert choices_of(echo_core(echo, block_size=8), prompt, 5, 9) != alone


def test_never_fitting_request_is_refused_at_once(echo: Path) -> None:
    core = echo_core(echo, num_kv_blocks=3, block_size=8, max_model_len=96)
    with pytest.raises(ValueError, match="can never fit"):
        core.add(as_request(0, Job([1] * 30, 5)))
    with pytest.raises(ValueError, match="max_tokens=15 would"):
        core.add(as_request(0, Job([1] * 10, 40)))
    core.add(as_request(0, Job([1] * 10, 15)))
    with pytest.raises(ValueError, match="'r0' is already running"):
        core.add(as_request(0, Job([1] * 10, 15)))
    assert run_out(core)["r0"] == FinishReason.LENGTH


def run_out(core: Any) -> dict[str, FinishReason]:
    reasons = {}
    while core.has_unfinished():
        for request in core.step().finished:
            reasons[request.request_id] = request.finish_reason
    return reasons


def test_abort_in_every_phase_frees_within_a_step(echo: Path) -> None:
    """Waiting, mid-prefill, decoding, preempted, already over; with the same id reused at once."""
    core = echo_core(echo, max_num_batched_tokens=8, max_num_seqs=2, overlap_depth=1)
    for i in range(4):
        core.add(as_request(i, Job([i] * 40, 20)))
    core.step()  # r0 is in mid-prefill
    for request_id in ("r0", "r3", "unknown"):
        core.finish(request_id, FinishReason.ABORT)
    core.add(as_request(0, Job([5] * 3, 4)))
    finished = core.step().finished
    assert {r.request_id for r in finished} == {"r0", "r3"}
    reasons = run_out(core)
    assert reasons == dict.fromkeys(("r0", "r1", "r2"), FinishReason.LENGTH)
    assert core.scheduler.kv.num_used_blocks == 0
